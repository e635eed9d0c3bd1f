"""Leaves that hand codes to the quantized layer behind them: normalise, activate and quantize in one pass.

A fused leaf is the model's own module with another class, so parameters, names and hooks stay what they were and
nothing of it is saved. Where the layer behind it cannot take codes just then (it observes, needs gradients, has
adapters beside its weight, or PEFT stands between), the leaf does what its original does.
"""

import torch
from torch import Tensor, nn

from . import kernels


class FusedGroupNorm(nn.GroupNorm):
    """Group norm, the SiLU that follows where there is one, and the next layer's quantization.

    In: `(B, C, …)` float. Out: codes, uint8, channels last; float where the next layer takes none. Statistics and
    values are computed in float32 whatever the dtype of the input; they agree with torch's to relative 1e-6.
    """

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """See the class.

        Args:
            x (`Tensor`, `(B, C, …)`).
            added (`Tensor`, `(B, C)`, *optional*): added to `x` first.
        """
        layer = getattr(*self.feeds)
        adapter = layer.takes_codes(x) if hasattr(layer, "takes_codes") and x.ndim == 4 and x.numel() else None
        if adapter is None:
            return super().forward(x if added is None else x + added[:, :, None, None])
        x = x.contiguous(memory_format=torch.channels_last)
        prepared = layer.prepared
        arguments = x, self.num_groups, *_affine(self), self.eps, self.silu
        codes, finite = kernels.norm(*arguments, prepared.grid(adapter), added)
        if not finite:
            prepared.refuse_infinite(kernels.norm(*arguments, None, added)[0])
        prepared.codes_dtype = x.dtype
        return codes


def _affine(norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias, `(C,)` float32."""
    if norm.weight is None:
        return torch.ones(norm.num_channels), torch.zeros(norm.num_channels)
    return norm.weight.detach().to(torch.float32), norm.bias.detach().to(torch.float32)


def norm_rows(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """A group norm of `(B, N, C)`, the shape that attention works on: no copy to channels first and back."""
    x = x.contiguous().transpose(1, 2)
    y, finite = kernels.norm(x, norm.num_groups, *_affine(norm), norm.eps, False, None)
    return (y if finite else norm(x)).transpose(1, 2)


class PassingSiLU(nn.SiLU):
    """SiLU that lets codes pass: the norm before it has already applied it."""

    def forward(self, x: Tensor) -> Tensor:
        """SiLU of floats; codes as they are."""
        return x if x.dtype == torch.uint8 else super().forward(x)


_FUSED = {FusedGroupNorm: nn.GroupNorm, PassingSiLU: nn.SiLU}


def fuse_norm(norm: nn.GroupNorm, activation: nn.SiLU | None, parent: nn.Module, name: str) -> None:
    """Let a norm quantize for the layer that `parent` calls `name`.

    Args:
        norm (`nn.GroupNorm`): runs before the layer, with nothing but `activation` and dropout between.
        activation (`nn.SiLU`, *optional*): may be shared with other places.
    """
    norm.__class__ = FusedGroupNorm
    norm.__dict__.update(feeds=(parent, name), silu=activation is not None)
    if activation is not None:
        activation.__class__ = PassingSiLU


def unfuse(module: nn.Module) -> None:
    """Undo what `fuse_norm` did to one module; any other stays as it is."""
    if type(module) in _FUSED:
        module.__class__ = _FUSED[type(module)]
        for name in ("feeds", "silu"):
            module.__dict__.pop(name, None)

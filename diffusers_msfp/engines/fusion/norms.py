"""Leaves that hand codes to the quantized layer behind them: normalise, activate and quantize in one pass.

A fused leaf is the model's own module with another class, so parameters, names and hooks stay what they were and
nothing of it is saved. Where the layer behind it cannot take codes just then (it observes, needs gradients, has
adapters that read floats, or PEFT stands between), the leaf does what its original does.
"""

from dataclasses import dataclass
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor, nn

from ...compat.hooks import is_watched
from ...compat.modules import caller_of_module
from ...layers import QuantLayer
from ...numerics import Codes
from .. import kernels, tuning
from ..engine import PreparedLayer
from ..grid import InputGrid

_KNOWN = ("diffusers.", "diffusers_msfp.")
"""Packages whose blocks run norm, activation and layer in this order."""


class FusedGroupNorm(nn.GroupNorm):
    """Group norm, the SiLU that follows where there is one, and the next layer's quantization.

    In: `(B, C, …)` float. Out: `Codes`, channels last; float where the next layer takes none. Statistics and
    values are computed in float32 whatever the dtype of the input; they agree with torch's to relative 1e-6. So do
    floats for an adapter of PEFT's around the next layer, which come from the same kernel.
    """

    feeds: "Feeds"
    silu: bool

    def forward(self, x: Tensor, added: Tensor | None = None) -> Tensor:
        """See the class.

        Args:
            x (`Tensor`, `(B, C, …)`).
            added (`Tensor`, `(B, C)`, *optional*): added to `x` first.
        """
        if added is not None and added.shape != x.shape[:2]:
            x, added = x + added[:, :, None, None], None
        layer = self.feeds.layer()
        if torch.is_grad_enabled() and any(each.requires_grad for each in self.parameters()):
            x = x if added is None else x + added[:, :, None, None]
            return super().forward(x.contiguous())  # torch 2.13 crashes on channels last that need no gradient
        images = x.ndim == 4 and x.numel() and x.is_floating_point()
        takes = images and isinstance(layer, QuantLayer) and self.feeds.undisturbed(self)
        adapter = cast(QuantLayer, layer).takes_codes(x) if takes else None
        if adapter is not None and not self.feeds.asked_by_parent():
            adapter = None
        if adapter is None:
            if images and _has_adapter(layer, x):
                y, finite = norm(*self._arguments(x), False, None, added)
                if finite:
                    return y.to(x.dtype)
            return super().forward(x if added is None else x + added[:, :, None, None])
        prepared = cast(PreparedLayer, layer.prepared)
        arguments = self._arguments(x)
        codes, finite = norm(*arguments, self.silu, prepared.grid(adapter), added)
        if not finite:
            prepared.refuse_infinite(norm(*arguments, self.silu, None, added)[0])
        return prepared.hand_over(codes, adapter, x.dtype)

    def _arguments(self, x: Tensor) -> tuple[Tensor, int, Tensor, Tensor, float]:
        """The first of `norm`."""
        return x.contiguous(memory_format=torch.channels_last), self.num_groups, *_affine(self), self.eps


@dataclass(frozen=True)
class Feeds:
    """What stands behind a fused norm, looked up at every call.

    Args:
        parent (`nn.Module`): runs the norm, the activation and the layer one right after the other.
        name (`str`): of the layer in it.
        activation, dropout (`str`, *optional*): of the SiLU in it, and of a dropout before the layer.
    """

    parent: nn.Module
    name: str
    activation: str | None
    dropout: str | None

    def layer(self) -> nn.Module:
        """The layer that reads the norm's result."""
        return getattr(self.parent, self.name)

    def undisturbed(self, norm: nn.Module) -> bool:
        """Whether nobody has put a hook or another module in between; hooks on the layer would see codes."""
        between = [norm, self.layer()]
        if self.dropout is not None:
            between.append(getattr(self.parent, self.dropout))
        if self.activation is not None:
            between.append(activation := getattr(self.parent, self.activation))
            if type(activation) is not PassingSiLU:
                return False
        return not any(map(is_watched, between))

    def asked_by_parent(self) -> bool:
        """Whether the parent itself calls the norm, in code of diffusers' or ours: nobody else knows codes."""
        owner, package = caller_of_module()
        return owner is self.parent and package.startswith(_KNOWN)


def _has_adapter(layer: nn.Module, x: Tensor) -> bool:
    """Whether PEFT stands around a quantized layer that would take codes without it."""
    base = getattr(layer, "base_layer", None)
    apart = torch.is_grad_enabled() or x.dtype == torch.float64
    return not apart and isinstance(base, QuantLayer) and base.takes_codes(x) is not None


def _affine(norm: nn.GroupNorm) -> tuple[Tensor, Tensor]:
    """Weight and bias, `(C,)`."""
    weight, bias = norm.weight, norm.bias
    weight = torch.ones(norm.num_channels, dtype=torch.float32, device="cpu") if weight is None else weight
    return weight, torch.zeros(norm.num_channels, dtype=torch.float32, device="cpu") if bias is None else bias


def norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    grid: InputGrid | None,
    added: Tensor | None = None,
) -> tuple[Tensor, bool]:
    """See `kernels.norm`; torch's several passes, in all its threads, where those are faster than one an image."""
    ways = {"one pass": kernels.norm, "torch": kernels.norm_in_passes}
    arguments = x, groups, weight, bias, eps, silu, grid, added
    if not tuning.allowed():
        return kernels.norm(*arguments)
    asked = _question(x.shape, x.dtype, groups, silu, added is not None, grid is not None)
    return ways[tuning.fastest(asked, {name: partial(way, *arguments) for name, way in ways.items()})](*arguments)


@lru_cache(maxsize=1024)
def _question(shape: torch.Size, dtype: torch.dtype, groups: int, silu: bool, added: bool, codes: bool) -> str:
    """How `norm` asks for the fastest way."""
    parts = [name for name, given in (("silu", silu), ("added", added), ("codes", codes)) if given]
    return f"norm {tuning.text_of(shape, dtype)} groups {groups} {' '.join(parts)}"


def norm_rows(module: nn.GroupNorm, x: Tensor) -> Tensor:
    """A group norm of `(B, N, C)`, the shape that attention works on: no copy to channels first and back."""
    x = x.contiguous().transpose(1, 2)
    if type(module) is not nn.GroupNorm or is_watched(module):
        return module(x).transpose(1, 2)
    y, finite = norm(x, module.num_groups, *_affine(module), module.eps, False, None)
    return (y if finite else module(x)).transpose(1, 2)


class PassingSiLU(nn.SiLU):
    """SiLU that lets codes pass: the norm before it has already applied it."""

    def forward(self, x: Tensor) -> Tensor:
        """SiLU of floats; codes as they are."""
        return x if isinstance(x, Codes) else super().forward(x)


_FUSED = {FusedGroupNorm: nn.GroupNorm, PassingSiLU: nn.SiLU}


def fuse_norm(
    norm: nn.GroupNorm, parent: nn.Module, name: str, activation: str | None, dropout: str | None = None
) -> None:
    """Let a norm quantize for the layer that `parent` calls `name`.

    Args:
        norm (`nn.GroupNorm`): runs before the layer, with nothing but the activation and dropout between.
        activation (`str`, *optional*): name of a SiLU in `parent`; it may be shared with other places.
        dropout (`str`, *optional*): name of a dropout in `parent`.
    """
    norm.__class__ = FusedGroupNorm
    norm.__dict__.update(feeds=Feeds(parent, name, activation, dropout), silu=activation is not None)
    if activation is not None:
        getattr(parent, activation).__class__ = PassingSiLU


def unfuse(module: nn.Module) -> None:
    """Undo what `fuse_norm` did to one module; any other stays as it is."""
    if type(module) in _FUSED:
        module.__class__ = _FUSED[type(module)]
        for name in ("feeds", "silu"):
            module.__dict__.pop(name, None)

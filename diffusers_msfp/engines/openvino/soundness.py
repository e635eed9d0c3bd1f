"""Whether NaN or infinity came up within a graph, whose rounding makes numbers of them, or a row that a table lacks.

What is rounded would have to be read once more for that. Most of it need not be: one NaN or infinity makes all of a
norm's group NaN, so one value of each group tells of all that the norm read and gave; layers of 8-bit integers give
nothing large, whatever they read; activations give nothing unsound but for what is.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from diffusers.models import activations
from torch import Tensor, nn
from torch.nn import functional as F

from ...compat.modules import version_of

LARGE = 2.0**40
"""Below which the products of two values, and their sums, are far from infinity, in bfloat16 too."""

_KEEPING = (nn.SiLU, nn.GELU, nn.Mish, nn.ReLU, nn.Dropout, nn.Identity)
_GATED = (activations.GELU, activations.GEGLU, activations.SwiGLU, activations.ApproximateGELU)
"""Activations behind a layer of their own, `proj`."""


def key_of_content(x: Tensor) -> tuple:
    """A tensor as it is now: another one after a write in place. No two are equal where torch does not count those."""
    return id(x), object() if x.is_inference() else version_of(x)


class Soundness:
    """What one recording's soundness depends on."""

    def __init__(self) -> None:
        self._watched: dict[tuple, tuple[Tensor, Tensor]] = {}
        self._trusted: dict[tuple, Tensor] = {}  # tensors are kept, so that their ids stay their own
        self._signs: list[Tensor] = []

    def watch(self, x: Tensor) -> None:
        """A tensor is about to be rounded."""
        state = key_of_content(x)
        if state not in self._trusted and state not in self._watched:
            self._watched[state] = x, x.sum()[None]

    def trust(self, x: Tensor) -> None:
        """A tensor is sound, or what is unsound in it is seen elsewhere."""
        self._trusted[key_of_content(x)] = x

    def sign(self, x: Tensor) -> None:
        """A few values that are NaN or infinite where something is wrong."""
        self._signs.append(x.flatten())

    def total(self) -> Tensor:
        """`(1, 1)`: finite only if all that was watched is. A product, for what leads to an output without one would be
        kept in float32."""
        sums = [total for state, (_, total) in self._watched.items() if state not in self._trusted]
        if not (signs := [*self._signs, *sums]):
            return torch.zeros(1, 1, dtype=torch.float32, device="cpu")
        together = torch.cat(signs)[None]
        return together @ torch.ones(together.shape[1], 1, dtype=torch.float32, device="cpu")

    # ── hooks ────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_table(self, table: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """An `nn.Embedding` is asked for rows."""
        (rows,) = arguments
        outside = (rows < 0) | (rows >= cast(nn.Embedding, table).num_embeddings)
        self.sign(torch.where(outside, torch.inf, 0.0).sum()[None])

    def on_activation(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        """An activation has run."""
        proj = getattr(module, "proj", None)
        if getattr(proj, "is_bounded", False) if proj is not None else key_of_content(arguments[0]) in self._trusted:
            self.trust(output)


class _GraphNorm(nn.Module):
    """What both share."""

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    soundness: Callable[[], Soundness]
    largest: tuple[float, float]

    def remember(self, soundness: Callable[[], Soundness]) -> None:
        """Whose checks it makes, and how large its parameters are."""
        weight = 1.0 if self.weight is None else float(self.weight.detach().abs().max())
        bias = 0.0 if self.bias is None else float(self.bias.detach().abs().max())
        vars(self).update(soundness=soundness, largest=(weight, bias))

    def finish(self, x: Tensor, normal: Tensor, number: int, shape: tuple[int, ...]) -> Tensor:
        """The output; it and the norm's input need not be watched.

        Args:
            x (`Tensor`): the input.
            normal (`Tensor`): of zero mean and variance 1 over `number` values, of which none is above `sqrt(number)`.
            shape (`tuple[int, ...]`): of the parameters.
        """
        y = normal if self.weight is None else normal * self.weight.view(shape)
        y = y if self.bias is None else y + self.bias.view(shape)
        self.soundness().trust(x)
        weight, bias = self.largest
        if weight * number**0.5 + bias < LARGE:
            self.soundness().trust(y)
        return y


class GraphGroupNorm(_GraphNorm, nn.GroupNorm):  # type: ignore[misc]  # torch infers that there is a weight
    """Of an `nn.GroupNorm`; one value of each group is a sign."""

    def forward(self, x: Tensor) -> Tensor:
        """As the original."""
        number = x.numel() // max(1, len(x) * self.num_groups)
        parameters = [each.shape for each in (self.weight, self.bias) if each is not None]
        if x.shape[1] != self.num_channels or number < 2 or any(each != x.shape[1:2] for each in parameters):
            return super().forward(x)  # which may refuse it
        y = F.layer_norm(x.reshape(len(x), self.num_groups, -1), (number,), eps=self.eps)
        self.soundness().sign(y[:, :, 0])
        return self.finish(x, y.view_as(x), number, (-1, *[1] * (x.ndim - 2)))


class GraphLayerNorm(_GraphNorm, nn.LayerNorm):  # type: ignore[misc]
    """Of an `nn.LayerNorm`; one value of each row is a sign."""

    def forward(self, x: Tensor) -> Tensor:
        """As the original."""
        if not x.numel():
            return super().forward(x)
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        rows = y.flatten(-len(self.normalized_shape))
        self.soundness().sign(rows[..., 0].sum()[None])
        return self.finish(x, y, rows.shape[-1], tuple(self.normalized_shape))


_NORMS: dict[type, type] = {nn.GroupNorm: GraphGroupNorm, nn.LayerNorm: GraphLayerNorm}


def install_checks(model: nn.Module, soundness: Callable[[], Soundness]) -> None:
    """Let what a recording passes through say what it needs.

    Args:
        model (`nn.Module`): for recording alone.
        soundness (`Callable`): the current recording's.
    """
    for module in model.modules():
        if type(module) in _NORMS:
            module.__class__ = _NORMS[type(module)]
            cast(_GraphNorm, module).remember(soundness)
        elif isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(lambda *call: soundness().on_table(*call))
        elif isinstance(module, (*_KEEPING, *_GATED)):
            module.register_forward_hook(lambda *call: soundness().on_activation(*call))

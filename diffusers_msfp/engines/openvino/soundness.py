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

LARGE = 2.0**40
"""Below which the products of two values, and their sums, are far from infinity, in bfloat16 too."""

_KEEPING = (nn.SiLU, nn.GELU, nn.Mish, nn.ReLU, nn.Dropout, nn.Identity)
_GATED = (activations.GELU, activations.GEGLU, activations.SwiGLU, activations.ApproximateGELU)
"""Activations behind a layer of their own, `proj`."""


class Soundness:
    """What one recording's soundness depends on."""

    def __init__(self) -> None:
        self._watched: dict[int, Tensor] = {}
        self._trusted: dict[int, Tensor] = {}  # tensors are kept, so that their ids stay their own
        self._signs: list[Tensor] = []

    def watch(self, x: Tensor) -> None:
        """A tensor is about to be rounded."""
        self._watched[id(x)] = x

    def trust(self, x: Tensor) -> None:
        """A tensor is sound, or what is unsound in it is seen elsewhere."""
        self._trusted[id(x)] = x

    def sign(self, x: Tensor) -> None:
        """A few values that are NaN or infinite where something is wrong."""
        self._signs.append(x.flatten())

    def total(self) -> Tensor:
        """`(1, 1)`: finite only if all that was watched is. A product, for what leads to an output without one would be
        kept in float32."""
        sums = [x.sum()[None] for key, x in self._watched.items() if key not in self._trusted]
        if not (signs := [*self._signs, *sums]):
            return torch.zeros(1, 1)
        together = torch.cat(signs)[None]
        return together @ torch.ones(together.shape[1], 1)

    # ── hooks ────────────────────────────────────────────────────────────────────────────────────────────────────

    def on_table(self, table: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        """An `nn.Embedding` is asked for rows."""
        (rows,) = arguments
        outside = (rows < 0) | (rows >= cast(nn.Embedding, table).num_embeddings)
        self.sign(torch.where(outside, torch.inf, 0.0).sum()[None])

    def on_activation(self, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        """An activation has run."""
        proj = getattr(module, "proj", None)
        if getattr(proj, "is_bounded", False) if proj is not None else id(arguments[0]) in self._trusted:
            self.trust(output)


class GraphGroupNorm(nn.GroupNorm):
    """Of an `nn.GroupNorm`; one value of each group is a sign."""

    soundness: Callable[[], Soundness]

    def forward(self, x: Tensor) -> Tensor:
        """As the original."""
        groups = x.reshape(len(x), self.num_groups, -1)
        y = F.layer_norm(groups, groups.shape[2:], eps=self.eps)
        self.soundness().sign(y[:, :, 0])
        y = y.view_as(x)
        if self.weight is not None:
            shape = (-1, *[1] * (x.ndim - 2))
            y = y * self.weight.view(shape) + self.bias.view(shape)
        return _seen(self.soundness(), x, y)


class GraphLayerNorm(nn.LayerNorm):
    """Of an `nn.LayerNorm`; one value of each row is a sign."""

    soundness: Callable[[], Soundness]

    def forward(self, x: Tensor) -> Tensor:
        """As the original."""
        y = F.layer_norm(x, self.normalized_shape, eps=self.eps)
        self.soundness().sign(y.flatten(-len(self.normalized_shape))[..., 0].sum()[None])
        if self.weight is not None:
            y = y * self.weight
        if self.bias is not None:
            y = y + self.bias
        return _seen(self.soundness(), x, y)


def _seen(soundness: Soundness, x: Tensor, y: Tensor) -> Tensor:
    """A norm's output; it and the norm's input need not be watched."""
    soundness.trust(x)
    soundness.trust(y)
    return y


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
            vars(module)["soundness"] = soundness
        elif isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(lambda *call: soundness().on_table(*call))
        elif isinstance(module, (*_KEEPING, *_GATED)):
            module.register_forward_hook(lambda *call: soundness().on_activation(*call))

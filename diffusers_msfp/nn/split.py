"""A layer as a sum over parts of its input channels, for inputs that are concatenations (Q-Diffusion)."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from .layers import QUANT_LAYERS
from .quant_layer import QuantLayer


class SplitLayer(nn.Module):
    """A linear or convolution in parts: `x * W = x₁ * W₁ + x₂ * W₂ + …`, with formats and ranges of each part's own.

    Parts are children called `"0"`, `"1"`, …, float or quantized; the first has the bias. Each knows its `columns`, the
    input channels of the whole that it reads.

    Args:
        parts (`Sequence[nn.Module]`): see `split_layer`.
        axis (`int`): of the input's channels.

    Source:
        Q-Diffusion (arXiv 2302.04304), section 3.3, on shortcuts.
    """

    def __init__(self, parts: Sequence[nn.Module], axis: int) -> None:
        super().__init__()
        self.axis, self.sizes = axis, [part.columns.stop - part.columns.start for part in parts]
        for index, part in enumerate(parts):
            self.add_module(str(index), part)

    def forward(self, x: Tensor) -> Tensor:
        """Sum of the parts."""
        first, *others = (part(piece) for part, piece in zip(self.children(), self.pieces(x), strict=True))
        return sum(others, first)

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each part reads of the input."""
        return x.split(self.sizes, self.axis)

    def merged(self) -> nn.Module:
        """The whole layer; parts must be float."""
        parts = list(self.children())
        whole = _resized(parts[0], sum(self.sizes))
        whole.weight = nn.Parameter(torch.cat([part.weight.detach() for part in parts], 1), requires_grad=False)
        whole.bias = parts[0].bias
        return whole


def can_split(layer: nn.Module) -> bool:
    """Whether each output channel of a layer, float or quantized, reads all input channels."""
    return isinstance(layer, (QuantLayer, *QUANT_LAYERS)) and getattr(layer, "groups", 1) == 1


def whole_name(name: str, layer: nn.Module) -> str:
    """The name of the layer that this one is a part of, which schemes and the float model know; else its own."""
    return name.rpartition(".")[0] if hasattr(layer, "columns") else name


def channel_axis(layer: nn.Module) -> int:
    """The axis of its input that a layer, float or quantized, sums over."""
    return -1 if isinstance(layer, nn.Linear) else 1


def split_layer(layer: nn.Module, sizes: Sequence[int]) -> SplitLayer:
    """A float layer in parts.

    Args:
        layer (`nn.Module`): a class in `QUANT_LAYERS`, ungrouped; on the meta device or not. Not changed.
        sizes (`Sequence[int]`): input channels of each part; their sum is the layer's.
    """
    parts = []
    for end, size in zip(accumulate(sizes), sizes, strict=True):
        part = _resized(layer, size)
        part.columns = slice(end - size, end)
        part.weight = nn.Parameter(layer.weight.detach()[:, part.columns], requires_grad=False)
        part.bias = None if parts else layer.bias
        parts.append(part)
    return SplitLayer(parts, channel_axis(layer))


def _resized(layer: nn.Module, size: int) -> nn.Module:
    """A layer like this one for another number of input channels, without weights."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(size, layer.out_features, bias=False, device="meta")
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return type(layer)(size, layer.out_channels, *shape, bias=False, padding_mode=layer.padding_mode, device="meta")

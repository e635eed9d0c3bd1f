"""A layer as a sum over parts of its input channels, for inputs that are concatenations (Q-Diffusion)."""

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor, nn

from ..compat.hooks import share_hooks
from ..compat.torch import bias_of, put_bias, weight_of
from .logical import PackedLayer
from .quant_layer import QuantLayer
from .stored import lasting
from .transplant import float_layer, transplant


class SplitLayer(PackedLayer):
    """A linear or convolution in parts: `x * W = x₁ * W₁ + x₂ * W₂ + …`, with formats and ranges of each part's own.

    Made by `split_layer`. Parts are children called `"0"`, `"1"`, …, float or quantized; the first has the bias. Each
    knows its `columns`, the input channels of the whole that it reads. The whole keeps the original's class as a base
    and its attributes, so PEFT can put adapters on it.

    Attributes:
        axis (`int`): of the input's channels.
        sizes (`list[int]`): input channels of each part.

    Source:
        Q-Diffusion (arXiv 2302.04304), section 3.3, on shortcuts.
    """

    axis: int
    sizes: list[int]

    @property
    def packed_weight(self) -> Tensor:
        """The first part's own tensor; where it is tells where the layer is."""
        part = next(self.children())
        return part.packed_weight if isinstance(part, QuantLayer) else weight_of(part)

    @property
    def weight_dtype(self) -> torch.dtype:
        """Of the parts."""
        return weight_of(next(self.children())).dtype

    @property
    def logical_shape(self) -> tuple[int, ...]:
        """Shape of the whole weight; output channels first."""
        rows, _, *rest = weight_of(next(self.children())).shape
        return (rows, sum(self.sizes), *rest)

    def decode_whole(self) -> Tensor:
        """See `PackedLayer`."""
        return torch.cat([weight_of(part).detach().to(torch.float32) for part in self.children()], 1)

    @property
    def bias(self) -> Tensor | None:
        """The first part's own."""
        return bias_of(next(self.children()))

    @bias.setter
    def bias(self, value: Tensor | None) -> None:
        self._put_bias(value)

    def _put_bias(self, value: Tensor | None) -> None:
        for part in list(self.children())[:1]:
            put_bias(part, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of `PackedLayer`; the bias is the first part's."""
        if name == "bias":
            self._put_bias(param)
        else:
            super().register_parameter(name, param)

    def float_copy(self) -> nn.Module:
        """See `PackedLayer`."""
        return float_layer(self, self.float_class)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 – as the original calls it
        """Sum of the parts."""
        first, *others = (part(piece) for part, piece in zip(self.children(), self.pieces(input), strict=True))
        return sum(others, first)

    def pieces(self, x: Tensor) -> tuple[Tensor, ...]:
        """What each part reads of the input."""
        return x.split(self.sizes, self.axis)

    @lasting
    def merged(self) -> nn.Module:
        """The whole layer, with the hooks that this one has; parts must be float."""
        parts = list(self.children())
        whole = _resized(parts[0], sum(self.sizes))
        whole.weight = nn.Parameter(torch.cat([weight_of(part).detach() for part in parts], 1))
        put_bias(whole, bias_of(parts[0]))
        share_hooks(self, whole)
        return whole


class SplitLinear(SplitLayer, nn.Linear):  # type: ignore[misc]  # torch infers that a linear always has a bias
    """`nn.Linear` in parts."""

    float_class = nn.Linear


class SplitConv2d(SplitLayer, nn.Conv2d):
    """`nn.Conv2d` in parts."""

    float_class = nn.Conv2d


class SplitConv1d(SplitLayer, nn.Conv1d):
    """`nn.Conv1d` in parts."""

    float_class = nn.Conv1d


SPLIT_LAYERS: dict[type[nn.Module], type[SplitLayer]] = {
    cls.float_class: cls for cls in (SplitLinear, SplitConv2d, SplitConv1d)
}


def can_split(layer: nn.Module) -> bool:
    """Whether a float layer can be split: each output channel reads all input channels, and it is no part itself."""
    return type(layer) in SPLIT_LAYERS and getattr(layer, "groups", 1) == 1 and getattr(layer, "columns", None) is None


def whole_name(name: str, layer: nn.Module) -> str:
    """The name of the layer that this one is a part of, which schemes and the float model know; else its own."""
    return name.rpartition(".")[0] if getattr(layer, "columns", None) is not None else name


def channel_axis(layer: nn.Module) -> int:
    """The axis of its input that a layer, float or quantized, sums over."""
    return -1 if isinstance(layer, nn.Linear) else 1


def split_layer(layer: nn.Module, sizes: Sequence[int], module_name: str = "a split layer") -> SplitLayer:
    """A float layer in parts.

    Args:
        layer (`nn.Module`): see `can_split`; on the meta device or not. Not changed.
        sizes (`Sequence[int]`): input channels of each part; their sum is the layer's.
        module_name (`str`): its full name in the model, for messages.
    """
    whole = transplant(layer, SPLIT_LAYERS[type(layer)])
    whole.axis, whole.sizes, whole.module_name = channel_axis(layer), list(sizes), module_name
    for index, (end, size) in enumerate(zip(accumulate(sizes), sizes, strict=True)):
        part, columns = _resized(layer, size), slice(end - size, end)
        vars(part).update(columns=columns)
        part.weight = nn.Parameter(weight_of(layer).detach()[:, columns])
        put_bias(part, bias_of(layer) if index == 0 else None)
        whole.add_module(str(index), part)
    return whole


def is_complete(layer: SplitLayer) -> bool:
    """Whether its parts are quantized layers, with no adapters around one of them alone."""
    return all(isinstance(part, QuantLayer) for part in layer.children())


def _resized(layer: nn.Module, size: int) -> nn.Module:
    """A layer like this one for another number of input channels, without weights."""
    if isinstance(layer, nn.Linear):
        return nn.Linear(size, layer.out_features, bias=False, device="meta")
    shape = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    return type(layer)(size, layer.out_channels, *shape, bias=False, padding_mode=layer.padding_mode, device="meta")

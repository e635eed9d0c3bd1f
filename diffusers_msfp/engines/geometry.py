"""Convolutions of any kind as what kernels know: two dimensions, a batch, the same padding on both sides."""

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor
from torch.nn import functional as F

from ..compat.modules import padding_ends
from ..compat.torch import ConvNd
from ..layers import QuantLayer
from .grid import output_size


class Geometry:
    """Sizes of a convolution's two-dimensional case.

    Padding that is not zeros, or not the same on both sides, is put on before the input is quantized, which changes
    nothing: both work value by value.

    Args:
        layer: a quantized `nn.Conv2d` or `nn.Conv1d`.
    """

    def __init__(self, layer: QuantLayer) -> None:
        self.flat, self.groups = len(layer.kernel_size) == 1, layer.groups
        self.kernel_size = self._pair(layer.kernel_size, 1)
        self.stride, self.dilation = self._pair(layer.stride, 1), self._pair(layer.dilation, 1)
        ends = padding_ends(cast(ConvNd, layer))  # (left, right, top, bottom)
        simple = layer.padding_mode == "zeros" and ends[::2] == ends[1::2]
        self.padding = self._pair(ends[::2][::-1], 0) if simple else [0, 0]
        self.ends = None if simple else ends
        self._mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode

    @property
    def where(self) -> tuple[list[int], list[int], list[int]]:
        """Stride, padding and dilation."""
        return self.stride, self.padding, self.dilation

    @property
    def is_pointwise(self) -> bool:
        """Whether each position of the output is a product with one of the input, in the same order."""
        return self.kernel_size == [1, 1] == self.stride and self.padding == [0, 0]

    @property
    def text(self) -> str:
        """All of it in words, for those who compare."""
        pairs = {"kernel": self.kernel_size, "stride": self.stride, "padding": self.padding, "dilation": self.dilation}
        said = [f"{name} {'x'.join(map(str, pair))}" for name, pair in pairs.items()]
        return " ".join([*said, f"groups {self.groups}"])

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Height and width of the output for an input of this height and width."""
        return output_size(size, self.kernel_size, *self.where)

    def _pair(self, values: Sequence[int], first: int) -> list[int]:
        return [first, *values] if self.flat else list(values)

    def apply(self, convolve: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """`convolve`, which takes and returns images `(B, C, H, W)`, for an input of the layer."""
        unbatched = x.ndim == len(self.kernel_size) + 1 - self.flat
        x = x.unsqueeze(0) if unbatched else x
        x = x if self.ends is None else F.pad(x, self.ends, mode=self._mode)
        y = convolve(x.unsqueeze(2)).squeeze(2) if self.flat else convolve(x)
        return y.squeeze(0) if unbatched else y

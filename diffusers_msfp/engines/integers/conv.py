"""Convolutions in 8-bit integers."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...compat.torch import pack_int8_conv, pack_int8_linear
from ...layers import QuantLayer
from .. import kernels
from ..geometry import Geometry
from .layer import Int8Layer, Planes, Weight
from .products import convolution, linear

_FEW_POSITIONS = 1024  # of an output, up to which a product with patches is the default
_MANY_PATCHES = 2**27  # bytes, above which it is not tried


class Int8Conv(Int8Layer):
    """`nn.Conv2d` and `nn.Conv1d` in 8-bit integers, channels last."""

    def __init__(self, layer: QuantLayer, keep: bool) -> None:
        super().__init__(layer, keep)
        self.geometry = Geometry(layer)
        self._about += f" {self.geometry.text}"
        self._shape: tuple[int, ...] = ()

    @property
    def reads_codes(self) -> bool:
        """As for all, if the padding can be put on codes."""
        return self.geometry.ends is None and super().reads_codes

    def expand(self, bank: int, way: str) -> Weight:
        """See `PreparedLayer.expand`."""
        (weight, units), at = self.integers(bank), self.geometry
        weight = weight.unsqueeze(2) if at.flat else weight
        if way == "columns":
            return pack_int8_linear(weight.permute(0, 2, 3, 1).flatten(1)), units
        if way == "bfloat16":
            return weight.to(torch.bfloat16).contiguous(memory_format=torch.channels_last), units
        return pack_int8_conv(weight, units, at.stride, at.padding, at.dilation, at.groups, self._shape), units

    def multiply(
        self, x: Tensor, planes: Planes, bank: int | Tensor, adapter: int | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """`(B, in, …)` float or bytes → `(B, out, …)`."""
        if not x.numel():
            return self.nothing(x)

        def convolve(images: Tensor) -> Tensor:
            images = images.contiguous(memory_format=torch.channels_last)
            return self._convolve(images, planes, bank, adapter, dtype)

        return self.geometry.apply(convolve, x)

    def _convolve(
        self, x: Tensor, planes: Planes, bank: int | Tensor, adapter: int | Tensor, dtype: torch.dtype
    ) -> Tensor:
        self._shape = self._shape or tuple(x.shape)
        codes = planes(x, adapter)

        def compute(way: str) -> Tensor:
            return self.sum_of_planes(partial(getattr(self, f"_{way}"), self.weight(bank, way)), codes, adapter, dtype)

        return self.by_fastest(codes, dtype, compute)

    def ways(self, codes: list[Tensor], dtype: torch.dtype) -> tuple[str, ...]:
        """See `Int8Layer.ways`."""
        at = self.geometry
        ways: tuple[str, ...] = ("convolution",)
        positions = len(codes[0]) * math.prod(at.output_size(codes[0].shape[2:]))
        if at.groups == 1 and (at.is_pointwise or positions * self.layer.matrix_shape[1] <= _MANY_PATCHES):
            by_patches = at.kernel_size != [1, 1] and positions <= _FEW_POSITIONS
            ways = ("columns", *ways) if by_patches else (*ways, "columns")
        return (*ways, "bfloat16") if self.in_bfloat16(codes, dtype) else ways

    def _convolution(
        self, weight: Weight, codes: Tensor, unit: float, zero: int, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        at = self.geometry
        return convolution(codes, unit, zero, *weight, bias, *at.where, at.groups, out)

    def _columns(
        self, weight: Weight, codes: Tensor, unit: float, zero: int, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        at = self.geometry
        if at.is_pointwise:
            patches = codes.permute(0, 2, 3, 1)
        else:
            patches = kernels.columns(codes, at.kernel_size, *at.where, zero)
        y = linear(patches.flatten(0, 2), unit, zero, *weight, bias, out)
        return y.view(*patches.shape[:3], -1).permute(0, 3, 1, 2)

    def _bfloat16(
        self, weight: Weight, codes: Tensor, unit: float, zero: int, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        at, (integers, units) = self.geometry, weight
        sums = F.conv2d(codes.to(torch.bfloat16).sub_(zero), integers, None, *at.where, at.groups)
        return self.scaled(sums, units * unit, bias, 1).to(out)

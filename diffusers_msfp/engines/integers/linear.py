"""Linear layers in 8-bit integers."""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from ...compat.torch import pack_int8_linear
from .layer import Int8Layer, Planes, Weight
from .products import linear


class Int8Linear(Int8Layer):
    """`nn.Linear` in 8-bit integers."""

    def expand(self, bank: int, way: str = "product") -> Weight:
        """See `PreparedLayer.expand`."""
        integers, units = self.integers(bank)
        return integers.to(torch.bfloat16) if way == "bfloat16" else pack_int8_linear(integers), units

    def multiply(
        self, x: Tensor, planes: Planes, bank: int | Tensor, adapter: int | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """`(*, in)` float or bytes → `(*, out)`."""
        rows = x.reshape(-1, x.shape[-1])
        if not rows.numel():
            return self.nothing(x)
        codes = planes(rows.contiguous(), adapter)

        def compute(way: str) -> Tensor:
            multiply = self._bfloat16 if way == "bfloat16" else self._product
            return self.sum_of_planes(partial(multiply, self.weight(bank, way)), codes, adapter, dtype)

        return self.by_fastest(codes, dtype, compute).view(*x.shape[:-1], -1)

    def ways(self, codes: list[Tensor], dtype: torch.dtype) -> tuple[str, ...]:
        """See `Int8Layer.ways`."""
        return ("product", "bfloat16") if self.in_bfloat16(codes, dtype) else ("product",)

    def _product(
        self, weight: Weight, codes: Tensor, unit: float, zero: int, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        return linear(codes, unit, zero, *weight, bias, out)

    def _bfloat16(
        self, weight: Weight, codes: Tensor, unit: float, zero: int, bias: Tensor | None, out: torch.dtype
    ) -> Tensor:
        integers, units = weight
        sums = F.linear(codes.to(torch.bfloat16).sub_(zero), integers)
        return self.scaled(sums, units * unit, bias, 1).to(out)

"""Layers as the CUDA engine makes them ready; needs Triton. Nothing here waits for the device."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..formats import FPFormat
from ..layers import QuantLayer
from ..numerics import QParams
from ..numerics.rounding import zero_point_steps
from .engine import PreparedLayer, weight_unit
from .geometry import Geometry
from .triton import conv2d, gemm, w4a16
from .triton.device_codes import code_offset, weight_codes
from .triton.input_codes import quantize


@dataclass(frozen=True)
class DeviceGrid:
    """An input's quantizer as tensors `()` on the device; `x ≈ (code - zero) * unit`.

    Args:
        unit (`Tensor`): real size of one lattice step.
        inverse (`Tensor`): `1 / unit`, computed once.
        k (`Tensor`): the zero point in lattice steps.
        zero (`Tensor`): the code of the real 0.
    """

    unit: Tensor
    inverse: Tensor
    k: Tensor
    zero: Tensor


class FloatLinear(PreparedLayer):
    """`nn.Linear` with packed 4-bit weights and a float input; nothing is ever expanded."""

    def __init__(self, layer: QuantLayer, keep: bool) -> None:
        super().__init__(layer, keep)
        self._units = weight_unit(layer)

    def expand(self, bank: int) -> Tensor:
        """See `PreparedLayer.expand`."""
        return self.layer.packed_bank(bank)

    def run(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:  # noqa: ARG002
        """`(*, in)` → `(*, out)`."""
        layer = self.layer
        return w4a16.linear(x, self.weight(bank), layer.bias, weight_unit=self._units, fmt=layer.weight_format)


class _CodeLayer(PreparedLayer):
    """What layers on codes share.

    Args:
        layer, keep: see `PreparedLayer`.
        dtype (`torch.dtype`): of the codes.
        flag (`Tensor`, `(1,)`, int32): set to 1 by an input that is not finite.
    """

    def __init__(self, layer: QuantLayer, keep: bool, dtype: torch.dtype, flag: Tensor) -> None:
        super().__init__(layer, keep)
        self.dtype, self._flag, self._units = dtype, flag, weight_unit(layer)
        self._format = cast(FPFormat, layer.input_format)
        self._offset = code_offset(self._format, dtype)

    def make_grid(self, qparams: QParams) -> DeviceGrid:
        """See `PreparedLayer.make_grid`."""
        unit, k = qparams.unit, zero_point_steps(qparams)
        return DeviceGrid(unit, 1 / unit, k, k - self._offset)

    def expand(self, bank: int) -> tuple[Tensor, Tensor]:
        """See `weight_codes`."""
        layer = self.layer
        return weight_codes(layer.packed_bank(bank), layer.weight_format, layer.logical_shape, self.dtype)

    def codes(self, x: Tensor, adapter: int | Tensor) -> Tensor:
        """Codes of a float input."""
        grid: DeviceGrid = self.grid(adapter)
        return quantize(x, grid.inverse, grid.k, self._format, dtype=self.dtype, offset=self._offset, bad=self._flag)

    def multiply(
        self, kernel: Callable, x: Tensor, bank: int | Tensor, adapter: int | Tensor, **geometry: Any
    ) -> Tensor:
        """The layer's output in the dtype of `x`, by a kernel for codes."""
        grid, (weight, total) = self.grid(adapter), self.weight(bank)
        return kernel(
            self.codes(x, adapter),
            weight,
            self.layer.bias,
            weight_sum=total,
            weight_unit=self._units,
            unit=grid.unit,
            zero=grid.zero,
            dtype=x.dtype,
            **geometry,
        )


class CudaLinear(_CodeLayer):
    """`nn.Linear` on codes: int8 through torch's own product, others in Triton. Which is faster was not measured."""

    def expand(self, bank: int) -> tuple[Tensor, Tensor]:
        """See `weight_codes`; int8 padded to the shapes that `torch._int_mm` takes."""
        weight, total = super().expand(bank)
        return gemm.pad_weight(weight) if self.dtype == torch.int8 else weight, total

    def run(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
        """`(*, in)` → `(*, out)`."""
        return self.multiply(gemm.linear if self.dtype == torch.int8 else conv2d.linear, x, bank, adapter)


class CudaConv(_CodeLayer):
    """`nn.Conv2d` and `nn.Conv1d` on codes, channels last."""

    def __init__(self, layer: QuantLayer, keep: bool, dtype: torch.dtype, flag: Tensor) -> None:
        super().__init__(layer, keep, dtype, flag)
        self._geometry = Geometry(layer)

    def expand(self, bank: int) -> tuple[Tensor, Tensor]:
        """See `weight_codes`; always with two axes for the kernel."""
        weight, total = super().expand(bank)
        return weight.unsqueeze(1) if self._geometry.flat else weight, total

    def run(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
        """`(B, in, …)` → `(B, out, …)`."""
        at = self._geometry
        sizes = {"stride": at.stride, "padding": at.padding, "dilation": at.dilation, "groups": at.groups}
        return at.apply(lambda images: self.multiply(conv2d.conv2d, images, bank, adapter, **sizes), x)

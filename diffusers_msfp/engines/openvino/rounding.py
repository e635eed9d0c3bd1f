"""A format's rounding in operations of a graph, exact: the definition of `numerics.rounding` without bits of floats.

The difference `T - y` of float32 is rounded to whole multiples of its last place, half to even. With
`T = y * 2^(23 - M)` that place is `2^(floor(log2|y|) - M)`, the local step of the format, and `T` is an even multiple
of it wherever `y` is a tie; where all steps are 1, `T = 1.5 * 2^23` serves. So `T - (T - y)` is the rounded value.
`T - y` is smaller than `T`, so right above a power of two it may have the finer last place below, which does no harm;
the sum `T + y` could have the coarser one above, of which `T` need not be a multiple.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from ...formats import UINT8_MAX, FPFormat
from ...numerics import QParams
from ...numerics.rounding import lattice_range, zero_point_steps
from ..grid import byte_offset

_ONES = 1.5 * 2.0**23  # floats around it have a last place of 1


class Grid(NamedTuple):
    """An input's quantizer as a graph has it: as plain numbers, which another layer's may equal.

    Args:
        format (`FPFormat`): of the input.
        unit (`float`): real size of one lattice step.
        inverse (`float`): `1 / unit` as float32 computes it.
        zero (`int`): the zero point k in lattice steps.
    """

    format: FPFormat
    unit: float
    inverse: float
    zero: int

    @classmethod
    def of(cls, qparams: QParams) -> "Grid":
        """From a scale and zero point of shape `()`."""
        unit = qparams.unit
        return cls(qparams.format, unit.item(), (1 / unit).item(), int(zero_point_steps(qparams).item()))

    @property
    def offset(self) -> int:
        """What makes lattice integers ≥ 0; bytes without a sign are what most processors multiply fastest."""
        return byte_offset(self.format)


def round_in_graph(y: Tensor, fmt: FPFormat) -> Tensor:
    """What `numerics.rounding.round_to_lattice` gives; above the format's range, a multiple of the top binade's step.

    Args:
        y (`Tensor`, any shape, float32): in lattice steps.
        fmt (`FPFormat`): whose lattice it is.

    Returns:
        `Tensor`, float32, shape of `y`: lattice integers; -0 may stay.
    """
    if fmt.exponent_bits == 1:  # all steps are 1
        return torch.round(y)
    large = y * 2.0 ** (23 - fmt.mantissa_bits)
    if fmt.signed:
        large = torch.where(y.abs() < 2.0 ** (fmt.mantissa_bits + 1), _ONES, large)
    else:
        large = large.clamp(min=_ONES)
    return large - (large - y)


def lattice_integers(x: Tensor, fmt: FPFormat, inverse: float | Tensor, zero: float | Tensor) -> Tensor:
    """`q - zero` with the lattice integers `q` of `x`, float32: `x ≈ (q - zero) * unit`.

    The product is limited before anything is added to it: OpenVINO contracts a product and a sum that follow each other
    to one operation, which does not round in between, and moves a product through `Clamp`. Limits from above commute
    with rounding and stand behind it.
    """
    low, high = lattice_range(fmt)
    has_zero = isinstance(zero, Tensor) or bool(zero)
    y = torch.maximum(x * inverse, torch.as_tensor(low, device="cpu") - zero)
    rounded = round_in_graph(y + zero if has_zero else y, fmt)
    return torch.minimum(rounded - zero if has_zero else rounded, high - torch.as_tensor(zero, device="cpu"))


def quantize_as_byte(x: Tensor, grid: Grid) -> Tensor:
    """`(q - zero) * unit` as a graph's `FakeQuantize` gives it, which OpenVINO turns into bytes and 8-bit products.

    The `FakeQuantize` is uniform, of this unit, and the format's rounding stands before it: it finds nothing to round.

    Args:
        x (`Tensor`, any shape, float32).
        grid (`Grid`): whose integers fit a byte.
    """
    values = lattice_integers(x, grid.format, grid.inverse, float(grid.zero)) * grid.unit
    return torch.fake_quantize_per_tensor_affine(values, grid.unit, grid.zero + grid.offset, 0, UINT8_MAX)

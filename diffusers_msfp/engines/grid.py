"""How an input's real values become lattice integers in bytes: what kernels and engines pass to each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..formats import INT8_MAX, FPFormat
from ..numerics import QParams
from ..numerics.rounding import zero_point_steps


def byte_offset(fmt: FPFormat) -> int:
    """What is added to a lattice integer so that it is ≥ 0: oneDNN's convolutions read unsigned bytes only."""
    return fmt.lattice_max if fmt.signed else 0


def low_bits(fmt: FPFormat) -> int:
    """Bits of an input's integers, made ≥ 0, beyond the upper eight: 0 where one byte holds them all."""
    return max(0, (fmt.lattice_max + byte_offset(fmt)).bit_length() - 8)


def largest_byte(fmt: FPFormat) -> int:
    """The largest byte that an input's integers take."""
    bits = low_bits(fmt)
    return max((fmt.lattice_max + byte_offset(fmt)) >> bits, 2**bits - 1)


def are_bytes(read: FPFormat | None, largest_weight: int) -> bool:
    """Whether one byte each holds what a layer reads (None: floats) and its weight."""
    return read is not None and read.fits_byte and largest_weight <= INT8_MAX


_PAIR_MAX = 2**15 - 1


def pairs_fit_16_bits(fmt: FPFormat, largest_weight: int) -> bool:
    """Whether 16 bits hold the sum of any two products of an input's byte and a weight.

    Processors without 8-bit dot products (VNNI, AMX) add pairs in 16 bits, with saturation.
    """
    return 2 * largest_byte(fmt) * largest_weight <= _PAIR_MAX


def lattice_numbers(low: int, high: int, mantissa_bits: int) -> tuple[np.number, ...]:
    """A lattice as compiled kernels take it: its range, and what makes a step of an exponent; see `numba_rows`."""
    shifts = np.int32((127 + mantissa_bits) << 23), np.int32((23 - mantissa_bits) << 23)
    return np.float32(low), np.float32(high), *shifts


@dataclass(frozen=True)
class InputGrid:
    """An input's quantizer as plain numbers; `x ≈ (integer - zero - offset) * unit`.

    Args:
        unit (`float`): real size of one lattice step.
        inverse (`float`): `1 / unit` as float32 computes it, once.
        zero (`int`): the zero point k in lattice steps.
        low, high (`int`): range of the lattice.
        mantissa_bits (`int`): M.
        offset (`int`): what makes lattice integers ≥ 0.
        low_bits (`int`): see `low_bits`; with more than 0 the integers are kept in two bytes.
    """

    unit: float
    inverse: float
    zero: int
    low: int
    high: int
    mantissa_bits: int
    offset: int
    low_bits: int

    @classmethod
    def of(cls, qparams: QParams) -> "InputGrid":
        """From a scale and zero point of shape `()`."""
        fmt, unit = qparams.format, qparams.unit
        zero = int(zero_point_steps(qparams).item())
        bounds = fmt.lattice[0], fmt.lattice_max
        return cls(unit.item(), (1 / unit).item(), zero, *bounds, fmt.mantissa_bits, byte_offset(fmt), low_bits(fmt))

    @cached_property
    def numbers(self) -> tuple[np.number, ...]:
        """The grid as compiled kernels take it: inverse, zero, `lattice_numbers`, offset."""
        lattice = lattice_numbers(self.low, self.high, self.mantissa_bits)
        return np.float32(self.inverse), np.float32(self.zero), *lattice, np.int32(self.offset)

    @cached_property
    def planes(self) -> list[tuple[float, int]]:
        """Unit and byte of the real 0 of each byte that holds an integer: `x ≈ sum((byte - zero) * unit)`."""
        zero, bits = self.zero + self.offset, self.low_bits
        upper = self.unit * 2**bits, zero >> bits
        return [upper, (self.unit, zero & (2**bits - 1))] if bits else [upper]


def output_size(
    shape: Sequence[int], size: Sequence[int], stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int]
) -> tuple[int, ...]:
    """Height and width of a convolution's output; every argument is such a pair."""
    pairs = zip(shape, size, stride, padding, dilation, strict=True)
    return tuple((n + 2 * pad - d * (k - 1) - 1) // s + 1 for n, k, s, pad, d in pairs)

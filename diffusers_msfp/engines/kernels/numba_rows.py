# ruff: noqa: ARG001 – Numba passes arguments that intrinsics and overloads do not use
"""Arithmetic of the CPU kernels in Numba: LLVM compiles them on the user's machine without a compiler being installed.

Inner loops run over slices of contiguous memory and have no branches, so LLVM vectorises them for the processor at
hand. A lattice step is a power of two, so rounding to it needs no division: adding `1.5 * 2^23 * step` leaves a sum
whose last bit is worth `step`, rounded half to even by the hardware; subtracting it again gives the rounded value. That
is bit for bit `numerics.round_to_lattice`. Nothing here may be compiled with `fastmath`.
"""

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

EXPONENT = np.int32(0x7F800000)
_HALF = np.int32(0x400000)
_ONE, _LOG2E = np.float32(1.0), np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23


def jit(**options):
    """`numba.njit` with a cache on disk where there is a place for one."""

    def decorate(function):
        try:
            return numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:  # no writable place for the cache
            return numba.njit(nogil=True, error_model="numpy", **options)(function)

    return decorate


@intrinsic
def _bits(typing_context, value):
    """float32 → int32 with the same bits."""

    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), code


@intrinsic
def _real(typing_context, value):
    """int32 → float32 with the same bits."""

    def code(context, builder, signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), code


def _widen(value):
    """A float32 as it is; the upper half of one (bfloat16, held as uint16) filled up with zeros."""


@overload(_widen)
def _widen_overload(value):
    if value == types.uint16:
        return lambda value: _real(np.int32(value) << np.int32(16))
    return lambda value: value


@jit()
def _round(y, low, high, least, shift):
    """The lattice integer of a position, as float32, and the bits of the position's exponent."""
    y = low if y < low else y
    y = high if y > high else y
    exponent = _bits(y) & EXPONENT
    exponent = least if exponent < least else exponent
    magic = _real((exponent + shift) | _HALF)
    return (y + magic) - magic


@jit()
def _exp(x):
    """Cephes' expf: relative error below 2e-7."""
    x = np.float32(-87.0) if x < np.float32(-87.0) else x
    x = np.float32(88.0) if x > np.float32(88.0) else x
    n = (x * _LOG2E + _MAGIC) - _MAGIC
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    return (p * r * r + r + _ONE) * _real((np.int32(n) + np.int32(127)) << np.int32(23))


@jit()
def quantize_row(x, out, inverse, zero, low, high, least, shift, offset):
    """Bytes of a row; the return value is the largest exponent field that came, all ones for NaN and infinity."""
    largest = np.int32(0)
    for i in range(x.size):
        value = _widen(x[i])
        exponent = _bits(value) & EXPONENT
        largest = exponent if exponent > largest else largest
        q = _round(value * inverse + zero, low, high, least, shift)
        out[i] = np.uint8(np.int32(q) + offset)
    return largest


@jit()
def centre_row(x, out, inverse, zero, low, high, least, shift):
    """As `quantize_row`, but the integers minus the zero point as float32, or its upper half as bfloat16."""
    largest = np.int32(0)
    for i in range(x.size):
        value = _widen(x[i])
        exponent = _bits(value) & EXPONENT
        largest = exponent if exponent > largest else largest
        _narrow(out, i, _round(value * inverse + zero, low, high, least, shift) - zero)
    return largest


def _narrow(out, i, value):
    """Store a float32 that the array's type can hold exactly."""


@overload(_narrow)
def _narrow_overload(out, i, value):
    if out.dtype == types.uint16:

        def store(out, i, value):
            out[i] = np.uint16(_bits(value) >> np.int32(16))

    else:

        def store(out, i, value):
            out[i] = value

    return store


@jit()
def add_moments(x, sums, squares):
    """Add a slab's values `(rows, C)` and their squares to sums per channel."""
    for row in range(x.shape[0]):
        values = x[row]
        for c in range(values.size):
            value = _widen(values[c])
            sums[c] += value
            squares[c] += value * value


@jit()
def affine(moments, count, groups, weight, bias, eps):
    """Group norm as `x * factor + shift` per channel, from the slabs' moments `(slabs, 2, C)`, added up in float64."""
    slabs, _, channels = moments.shape
    size = channels // groups
    factor, shift = np.empty(channels, np.float32), np.empty(channels, np.float32)
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        total = square = 0.0
        for slab in range(slabs):
            for c in members:
                total += moments[slab, 0, c]
                square += moments[slab, 1, c]
        mean = total / (count * size)
        scale = 1.0 / np.sqrt(max(square / (count * size) - mean * mean, 0.0) + eps)
        for c in members:
            factor[c] = scale * weight[c]
            shift[c] = bias[c] - mean * scale * weight[c]
    return factor, shift


@jit()
def _normalised(value, factor, shift, silu):
    y = value * factor + shift
    return y / (_ONE + _exp(-y)) if silu else y


@jit()
def norm_quantize_rows(x, out, factor, shift, silu, inverse, zero, low, high, least, step, offset):
    """Bytes of normalised rows `(N, C)`."""
    for row in range(x.shape[0]):
        values, codes = x[row], out[row]
        for c in range(values.size):
            y = _normalised(_widen(values[c]), factor[c], shift[c], silu)
            codes[c] = np.uint8(np.int32(_round(y * inverse + zero, low, high, least, step)) + offset)


@jit()
def norm_rows(x, out, factor, shift, silu):
    """Normalised rows `(N, C)` as float32."""
    for row in range(x.shape[0]):
        values, result = x[row], out[row]
        for c in range(values.size):
            result[c] = _normalised(_widen(values[c]), factor[c], shift[c], silu)

# ruff: noqa: ARG001 – Numba passes arguments that intrinsics and overloads do not use
"""Arithmetic of the CPU kernels in Numba: LLVM compiles them on the user's machine without a compiler being installed.

Inner loops run over slices of contiguous memory and have no branches, so LLVM vectorises them for the processor at
hand. A lattice step is a power of two, so rounding to it needs no division: adding `1.5 * 2^23 * step` leaves a sum
whose last bit is worth `step`, rounded half to even by the hardware; subtracting it again gives the rounded value. That
is bit for bit `numerics.rounding.round_to_lattice`. What computes codes may not be compiled with `fastmath`.
"""

import hashlib
from pathlib import Path

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic, overload

from . import user_cache

EXPONENT = np.int32(0x7F800000)
_HALF = np.int32(0x400000)
_ONE, _LOG2E = np.float32(1.0), np.float32(1.44269504)
_LN2_HIGH, _LN2_LOW = np.float32(0.693359375), np.float32(-2.12194440e-4)
_MAGIC = np.float32(12582912.0)  # 1.5 * 2^23
LOOPS = dict.fromkeys(("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False)
LOOPS["prange"] = True  # each parallel region costs 30 µs: only the loops that say so
_SOURCES = (file.read_bytes() for file in sorted(Path(__file__).parent.glob("numba_*.py")))
_VERSION = hashlib.sha256(b"".join(_SOURCES)).hexdigest()[:12]


def jit(**options):
    """`numba.njit` with a cache on disk: in `NUMBA_CACHE_DIR` if that is set, else in `user_cache.folder("numba")`.

    Numba's own default, the source's folder, is left out; where there is no place, each process compiles anew. Numba
    looks at the file of a kernel alone, and not at those of what it calls: each version of all has a folder of its own.
    """

    def decorate(function):
        chosen = numba.config.CACHE_DIR
        try:
            numba.config.CACHE_DIR = str(Path(chosen or user_cache.folder("numba")) / _VERSION)
            compiled = numba.njit(nogil=True, error_model="numpy", cache=True, **options)(function)
            in_sources = Path(compiled.stats.cache_path).parent == Path(__file__).parent
        except RuntimeError:  # no writable place at all
            in_sources = True
        finally:
            numba.config.CACHE_DIR = chosen
        return numba.njit(nogil=True, error_model="numpy", **options)(function) if in_sources else compiled

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
        return lambda value: _real(np.int32(np.int32(value) << np.int32(16)))
    return lambda value: value


@intrinsic
def _pointer(typing_context, address):
    """An address as a pointer."""

    def code(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(types.voidptr))

    return types.voidptr(types.int64), code


@jit()
def array_at(address, shape, kind):
    """A tensor's memory as an array: making one of NumPy's from each tensor takes longer than some kernels."""
    return numba.carray(_pointer(np.int64(address)), shape, kind)


@jit()
def _round(y, low, high, least, shift):
    """The lattice integer of a position, as float32, and the bits of the position's exponent."""
    y = low if y < low else y
    y = high if y > high else y
    exponent = np.int32(_bits(y) & EXPONENT)
    exponent = least if exponent < least else exponent
    magic = _real(np.int32(np.int32(exponent + shift) | _HALF))
    return (y + magic) - magic


@jit(fastmath={"contract"})
def _exp(x):
    """Cephes' expf: relative error below 2e-7; may use fused multiply-add, as `_affine` may."""
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
def split_row(x, out, rest, bits, inverse, zero, low, high, least, shift, offset):
    """As `quantize_row`, in two bytes: the lowest `bits` in `rest`, those above in `out`."""
    mask = np.int32((1 << bits) - 1)
    largest = np.int32(0)
    for i in range(x.size):
        value = _widen(x[i])
        exponent = np.int32(_bits(value) & EXPONENT)
        largest = exponent if exponent > largest else largest
        q = np.int32(np.int32(_round(value * inverse + zero, low, high, least, shift)) + offset)
        out[i] = np.uint8(q >> bits)
        rest[i] = np.uint8(q & mask)
    return largest


@jit()
def quantize_row(x, out, inverse, zero, low, high, least, shift, offset):
    """Bytes of a row; the return value is the largest exponent field that came, all ones for NaN and infinity."""
    largest = np.int32(0)
    for i in range(x.size):
        value = _widen(x[i])
        exponent = np.int32(_bits(value) & EXPONENT)
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
        exponent = np.int32(_bits(value) & EXPONENT)
        largest = exponent if exponent > largest else largest
        _narrow(out, i, _round(value * inverse + zero, low, high, least, shift) - zero)
    return largest


def _narrow(out, i, value):
    """Store a float32, rounded half to even where the array holds bfloat16."""


@overload(_narrow)
def _narrow_overload(out, i, value):
    if out.dtype == types.uint16:

        def store(out, i, value):
            bits = _bits(value)
            out[i] = np.uint16((bits + np.int32(0x7FFF) + ((bits >> np.int32(16)) & np.int32(1))) >> np.int32(16))

    else:

        def store(out, i, value):
            out[i] = value

    return store


def _store(out, i, value, grid):
    """Store a float32 as what the array holds: its byte on the grid, itself, or bfloat16."""


@overload(_store)
def _store_overload(out, i, value, grid):
    if out.dtype == types.uint8:

        def store(out, i, value, grid):
            inverse, zero, low, high, least, shift, offset = grid
            out[i] = np.uint8(np.int32(_round(value * inverse + zero, low, high, least, shift)) + offset)

    else:

        def store(out, i, value, grid):
            _narrow(out, i, value)

    return store

"""The CPU kernels in Numba, over both cores: see `numba_rows` for the arithmetic."""

import threading

import numba
import numpy as np
import torch
from torch import Tensor

from ..grid import InputGrid
from . import torch_kernels
from .numba_rows import EXPONENT, add_moments, affine, centre_row, jit, norm_quantize_rows, norm_rows, quantize_row

_CHUNK = 16384  # values that one thread takes at a time
_SERIAL = 2 * _CHUNK  # below this, waking a second thread costs more than it gains
_LOOPS = dict.fromkeys(("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion"), False)
_LOOPS["prange"] = True  # each parallel region costs 30 µs: only the loops that say so


@jit(parallel=_LOOPS)
def _quantize(x, out, inverse, zero, low, high, least, shift, offset):
    chunks = (x.size + _CHUNK - 1) // _CHUNK
    largest = np.zeros(chunks, np.int32)
    for chunk in numba.prange(chunks):
        part = slice(chunk * _CHUNK, min(x.size, (chunk + 1) * _CHUNK))
        largest[chunk] = quantize_row(x[part], out[part], inverse, zero, low, high, least, shift, offset)
    return largest.max()


@jit(parallel=_LOOPS)
def _centre(x, out, inverse, zero, low, high, least, shift):
    chunks = (x.size + _CHUNK - 1) // _CHUNK
    largest = np.zeros(chunks, np.int32)
    for chunk in numba.prange(chunks):
        part = slice(chunk * _CHUNK, min(x.size, (chunk + 1) * _CHUNK))
        largest[chunk] = centre_row(x[part], out[part], inverse, zero, low, high, least, shift)
    return largest.max()


@jit(parallel=_LOOPS)
def _norm(x, groups, weight, bias, eps, silu, real, codes, inverse, zero, low, high, least, step, offset):
    """Group norm of `(B, N, C)`, with the result in `codes`, or in `real` where `codes` is empty."""
    batch, length, channels = x.shape
    rows = max(1, _SERIAL // channels)
    slabs = (length + rows - 1) // rows
    moments = np.zeros((batch, slabs, 2, channels), np.float32)
    for job in numba.prange(batch * slabs):
        b, slab = job // slabs, job % slabs
        part = slice(slab * rows, min(length, (slab + 1) * rows))
        add_moments(x[b, part], moments[b, slab, 0], moments[b, slab, 1])
    factor, shift = np.empty((batch, channels), np.float32), np.empty((batch, channels), np.float32)
    for b in range(batch):
        factor[b], shift[b] = affine(moments[b], length, groups, weight, bias, eps)
    for job in numba.prange(batch * slabs):
        b, slab = job // slabs, job % slabs
        part = slice(slab * rows, min(length, (slab + 1) * rows))
        if codes.size:
            norm_quantize_rows(
                x[b, part], codes[b, part], factor[b], shift[b], silu, inverse, zero, low, high, least, step, offset
            )
        else:
            norm_rows(x[b, part], real[b, part], factor[b], shift[b], silu)
    return np.isfinite(factor).all() and np.isfinite(shift).all()


@jit(parallel=_LOOPS)
def _expand_pairs(packed, table, out):
    """4-bit codes, two to a byte: `table` holds both integers of each byte."""
    length = out.shape[1]
    for row in numba.prange(packed.shape[0]):
        source, target = packed[row], out[row]
        for i in range(length // 2):
            target[2 * i] = table[source[i], 0]
            target[2 * i + 1] = table[source[i], 1]
        if length % 2:
            target[length - 1] = table[source[length // 2], 0]


# ── calls from torch ─────────────────────────────────────────────────────────────────────────────────────────────

_LOCK = threading.Lock()  # one of Numba's thread pools ends the process when two threads use it at once


def _array(x: Tensor):
    """A NumPy view; bfloat16 as uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _flat(x: Tensor):
    return _array(x.as_strided((x.numel(),), (1,)))


def _readable(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.to(torch.float32)


def _numbers(grid: InputGrid) -> tuple:
    """A grid as the kernels' arguments, from `inverse` to `shift`."""
    real = (np.float32(v) for v in (grid.inverse, grid.zero, grid.low, grid.high))
    return (*real, np.int32((127 + grid.mantissa_bits) << 23), np.int32((23 - grid.mantissa_bits) << 23))


def _run(kernel, *arguments):
    with _LOCK:
        numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
        return kernel(*arguments)


def quantize(x: Tensor, grid: InputGrid) -> tuple[Tensor, bool]:
    """See `kernels.quantize`."""
    codes = torch.empty_like(x, dtype=torch.uint8)
    arguments = _flat(_readable(x)), _flat(codes), *_numbers(grid), np.int32(grid.offset)
    largest = quantize_row(*arguments) if x.numel() < _SERIAL else _run(_quantize, *arguments)
    return codes, largest < EXPONENT


def centre(x: Tensor, grid: InputGrid, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """See `kernels.centre`."""
    out = torch.empty_like(x, dtype=dtype)
    arguments = _flat(_readable(x)), _flat(out), *_numbers(grid)
    largest = centre_row(*arguments) if x.numel() < _SERIAL else _run(_centre, *arguments)
    return out, largest < EXPONENT


def norm(
    x: Tensor, groups: int, weight: Tensor, bias: Tensor, eps: float, silu: bool, grid: InputGrid | None
) -> tuple[Tensor, bool]:
    """See `kernels.norm`."""
    out = torch.empty_like(x, dtype=torch.float32 if grid is None else torch.uint8)
    batch, channels = x.shape[:2]

    def rows(tensor: Tensor):  # (B, C, …) channels last → (B, N, C)
        return _array(tensor.movedim(1, -1).reshape(batch, -1, channels))

    none = np.empty((0, 0, 0), np.uint8), np.empty((0, 0, 0), np.float32)
    real, codes = (rows(out), none[0]) if grid is None else (none[1], rows(out))
    numbers = (*_numbers(grid), np.int32(grid.offset)) if grid else (*[np.float32(0)] * 4, *[np.int32(0)] * 3)
    affine = _array(weight), _array(bias), float(eps), bool(silu)
    return out, bool(_run(_norm, rows(_readable(x)), groups, *affine, real, codes, *numbers))


def expand(packed: Tensor, bits: int, length: int, table: Tensor) -> Tensor:
    """See `kernels.expand`."""
    if bits != 4:
        return torch_kernels.expand(packed, bits, length, table)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1)  # low nibble first
    out = torch.empty(packed.shape[0], length, dtype=table.dtype)
    _run(_expand_pairs, packed.numpy(), pairs.numpy(), out.numpy())
    return out

"""The CPU kernels in Numba, over both cores: see `numba_rows` for the arithmetic."""

import functools
import os
import threading
from collections.abc import Sequence
from types import FunctionType

import numba
import numpy as np
import torch
from torch import Tensor

from ..grid import InputGrid, output_size
from . import torch_kernels
from .numba_rows import EXPONENT, centre_row, jit, norm_image, quantize_row, softmax_row, split_row

_CHUNK = 16384  # values that one thread takes at a time
# Waking a second thread takes 0.03 to 0.15 ms, in which one thread quantizes two million values or normalises and
# activates 64 thousand: below these numbers of values it works alone.
_SERIAL_QUANTIZE, _SERIAL_NORM = 2**21, 2**17
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
def _split(x, out, rest, bits, inverse, zero, low, high, least, shift, offset):
    chunks = (x.size + _CHUNK - 1) // _CHUNK
    largest = np.zeros(chunks, np.int32)
    for chunk in numba.prange(chunks):
        part = slice(chunk * _CHUNK, min(x.size, (chunk + 1) * _CHUNK))
        largest[chunk] = split_row(x[part], out[part], rest[part], bits, inverse, zero, low, high, least, shift, offset)
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
def _norm(x, added, groups, weight, bias, eps, silu, grid, out):
    """Group norm of `(B, N, C)`; each image is one thread's, so that its second pass finds it in the cache."""
    finite = np.ones(x.shape[0], np.bool_)
    for b in numba.prange(x.shape[0]):
        finite[b] = norm_image(x[b], added[b], groups, weight, bias, eps, silu, grid, out[b])
    return finite.all()


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


@jit()
def _columns(x, size, stride, padding, dilation, zero, out):
    """Patches of `(B, H, W, C)` as rows `(B, rows, columns, size * C)`."""
    batch, height, width, channels = x.shape
    for b in range(batch):
        for row in range(out.shape[1]):
            for column in range(out.shape[2]):
                target = out[b, row, column]
                at = 0
                for i in range(size[0]):
                    h = row * stride[0] - padding[0] + i * dilation[0]
                    for j in range(size[1]):
                        w = column * stride[1] - padding[1] + j * dilation[1]
                        if 0 <= h < height and 0 <= w < width:
                            target[at : at + channels] = x[b, h, w]
                        else:
                            target[at : at + channels] = zero
                        at += channels


@jit(parallel=_LOOPS)
def _softmax(scores, sums):
    for row in numba.prange(scores.shape[0]):
        sums[row] = softmax_row(scores[row])


# ── calls from torch ─────────────────────────────────────────────────────────────────────────────────────────────

_LOCK = threading.Lock()  # one of Numba's thread pools ends the process when two threads use it at once


class _Pool:
    """Numba's threads: a process that was forked when they had started does not have them.

    GNU OpenMP ends such a process, a DataLoader's worker for one, when it tries to use them.
    """

    started = lost = False

    @classmethod
    def forked(cls) -> None:
        """In a new child: once lost, they cannot be had again."""
        cls.lost = cls.started


if hasattr(os, "register_at_fork"):  # not on Windows, which does not fork
    os.register_at_fork(after_in_child=_Pool.forked)


@functools.cache
def _alone(kernel):
    """A parallel kernel's twin for the calling thread: same code, same results."""
    code = kernel.py_func
    twin = FunctionType(code.__code__, code.__globals__, f"{code.__name__}_alone")
    twin.__qualname__, twin.__module__ = twin.__name__, code.__module__  # the cache on disk goes by the name
    return jit()(twin)


def _array(x: Tensor):
    """A NumPy view; bfloat16 as uint16."""
    return (x.view(torch.uint16) if x.dtype == torch.bfloat16 else x).numpy()


def _flat(x: Tensor):
    return _array(x.as_strided((x.numel(),), (1,)))


def _readable(x: Tensor) -> Tensor:
    return x if x.dtype in (torch.float32, torch.bfloat16) else x.to(torch.float32)


def _lattice(low: int, high: int, mantissa_bits: int) -> tuple:
    """A lattice as the kernels' arguments, from `low` to `shift`."""
    shifts = np.int32((127 + mantissa_bits) << 23), np.int32((23 - mantissa_bits) << 23)
    return np.float32(low), np.float32(high), *shifts


def _numbers(grid: InputGrid) -> tuple:
    """A grid as the kernels' arguments, from `inverse` to `shift`."""
    return np.float32(grid.inverse), np.float32(grid.zero), *_lattice(grid.low, grid.high, grid.mantissa_bits)


def _run(kernel, *arguments):
    """A parallel kernel with as many threads as torch has; Numba's start would change that number for torch too."""
    if _Pool.lost:
        return _alone(kernel)(*arguments)
    with _LOCK:
        _Pool.started = True
        threads = torch.get_num_threads()
        numba.set_num_threads(min(threads, numba.config.NUMBA_NUM_THREADS))
        result = kernel(*arguments)
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        return result


def quantize(x: Tensor, grid: InputGrid) -> tuple[list[Tensor], bool]:
    """See `kernels.quantize`."""
    few, numbers = x.numel() < _SERIAL_QUANTIZE, (*_numbers(grid), np.int32(grid.offset))
    planes = [torch.empty_like(x, dtype=torch.uint8) for _ in grid.planes]
    arguments = _flat(_readable(x)), *map(_flat, planes)
    if grid.low_bits:
        arguments = *arguments, np.int32(grid.low_bits), *numbers
        largest = split_row(*arguments) if few else _run(_split, *arguments)
    else:
        largest = quantize_row(*arguments, *numbers) if few else _run(_quantize, *arguments, *numbers)
    return planes, largest < EXPONENT


def centre(x: Tensor, grid: InputGrid, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """See `kernels.centre`."""
    out = torch.empty_like(x, dtype=dtype)
    arguments = _flat(_readable(x)), _flat(out), *_numbers(grid)
    largest = centre_row(*arguments) if x.numel() < _SERIAL_QUANTIZE else _run(_centre, *arguments)
    return out, largest < EXPONENT


def norm(
    x: Tensor,
    groups: int,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    silu: bool,
    grid: InputGrid | None,
    added: Tensor | None = None,
) -> tuple[Tensor, bool]:
    """See `kernels.norm`."""
    x = _readable(x)
    out = torch.empty_like(x, dtype=x.dtype if grid is None else torch.uint8)
    batch, channels = x.shape[:2]

    def rows(tensor: Tensor):  # (B, C, …) channels last → (B, N, C)
        return _array(tensor.movedim(1, -1).reshape(batch, -1, channels))

    added = torch.zeros(batch, channels) if added is None else added.to(torch.float32)
    added = added.expand(batch, channels).contiguous()
    numbers = (*_numbers(grid), np.int32(grid.offset)) if grid else (*[np.float32(0)] * 4, *[np.int32(0)] * 3)
    affine = _array(weight), _array(bias), float(eps), bool(silu)
    arguments = rows(x), added.numpy(), groups, *affine, numbers, rows(out)
    return out, bool(_alone(_norm)(*arguments) if x.numel() < _SERIAL_NORM else _run(_norm, *arguments))


def expand(packed: Tensor, bits: int, length: int, table: Tensor) -> Tensor:
    """See `kernels.expand`."""
    if bits != 4:
        return torch_kernels.expand(packed, bits, length, table)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1)  # low nibble first
    out = torch.empty(packed.shape[0], length, dtype=table.dtype)
    _run(_expand_pairs, packed.numpy(), pairs.numpy(), out.numpy())
    return out


def columns(
    codes: Tensor,
    size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    zero: int,
) -> Tensor:
    """See `kernels.columns`."""
    shape = output_size(codes.shape[2:], size, stride, padding, dilation)
    out = torch.empty(codes.shape[0], *shape, size[0] * size[1] * codes.shape[1], dtype=torch.uint8)
    geometry = (tuple(pair) for pair in (size, stride, padding, dilation))
    _columns(codes.permute(0, 2, 3, 1).numpy(), *geometry, np.uint8(zero), out.numpy())
    return out


def softmax_numerators(scores: Tensor) -> Tensor:
    """See `kernels.softmax_numerators`."""
    rows = scores.view(-1, scores.shape[-1])
    sums = torch.empty(len(rows), dtype=torch.float32)
    _run(_softmax, _array(rows), sums.numpy())
    return sums.view(*scores.shape[:-1], 1)

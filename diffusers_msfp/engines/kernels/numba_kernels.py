"""The CPU kernels in Numba, in parallel: see `numba_rows` for the arithmetic."""

import functools
import os
import threading
from collections.abc import Sequence
from types import FunctionType

import numba
import numpy as np
import torch
from torch import Tensor

from ...compat.torch import address_says_all
from ..grid import InputGrid, output_size
from . import torch_kernels
from .numba_norm import norm_images, norm_parts
from .numba_rows import EXPONENT, LOOPS, array_at, centre_row, jit, quantize_row, split_row
from .numba_softmax import softmax_row

_CHUNK = 16384  # values that one thread takes at a time
# Waking a second thread takes 0.03 to 0.15 ms, in which one thread quantizes two million values or normalises and
# activates 64 thousand: below these numbers of values it works alone.
SEVERAL_QUANTIZE, _SEVERAL_NORM = 2**21, 2**17
_BYTE = np.dtype(np.uint8)
_KINDS = {torch.uint8: _BYTE, torch.bfloat16: np.dtype(np.uint16), torch.float32: np.dtype(np.float32)}
_NO_GRID = (*[np.float32(0)] * 4, *[np.int32(0)] * 3)


@jit(parallel=LOOPS)
def _quantize(x, kind, size, out, grid):
    x, out = array_at(x, (size,), kind), array_at(out, (size,), _BYTE)
    inverse, zero, low, high, least, shift, offset = grid
    chunks = max(1, (size + _CHUNK - 1) // _CHUNK)
    largest = np.zeros(chunks, np.int32)
    for chunk in numba.prange(chunks):
        part = slice(chunk * _CHUNK, min(size, (chunk + 1) * _CHUNK))
        largest[chunk] = quantize_row(x[part], out[part], inverse, zero, low, high, least, shift, offset)
    return largest.max()


@jit(parallel=LOOPS)
def _split(x, kind, size, out, rest, bits, grid):
    x, out, rest = array_at(x, (size,), kind), array_at(out, (size,), _BYTE), array_at(rest, (size,), _BYTE)
    inverse, zero, low, high, least, shift, offset = grid
    chunks = max(1, (size + _CHUNK - 1) // _CHUNK)
    largest = np.zeros(chunks, np.int32)
    for chunk in numba.prange(chunks):
        part = slice(chunk * _CHUNK, min(size, (chunk + 1) * _CHUNK))
        largest[chunk] = split_row(x[part], out[part], rest[part], bits, inverse, zero, low, high, least, shift, offset)
    return largest.max()


@jit(parallel=LOOPS)
def _centre(x, kind, size, out, out_kind, grid):
    x, out = array_at(x, (size,), kind), array_at(out, (size,), out_kind)
    inverse, zero, low, high, least, shift, _ = grid
    chunks = max(1, (size + _CHUNK - 1) // _CHUNK)
    largest = np.zeros(chunks, np.int32)
    for chunk in numba.prange(chunks):
        part = slice(chunk * _CHUNK, min(size, (chunk + 1) * _CHUNK))
        largest[chunk] = centre_row(x[part], out[part], inverse, zero, low, high, least, shift)
    return largest.max()


@jit(parallel=LOOPS)
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
def _columns(x, shape, size, stride, padding, dilation, zero, out, out_shape):
    """Patches of `(B, H, W, C)` as rows `(B, rows, columns, size * C)`."""
    batch, height, width, channels = shape
    x, out = array_at(x, shape, _BYTE), array_at(out, out_shape, _BYTE)
    for b in range(batch):
        for row in range(out_shape[1]):
            for column in range(out_shape[2]):
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


@jit(parallel=LOOPS)
def _softmax(scores, sums):
    for row in numba.prange(scores.shape[0]):
        sums[row] = softmax_row(scores[row])


# ── calls from torch ─────────────────────────────────────────────────────────────────────────────────────────────

_LOCK = threading.Lock()  # one of Numba's thread pools ends the process when two threads use it at once
if "NUMBA_THREADING_LAYER_PRIORITY" not in os.environ:
    # Numba's own first choice is TBB, which it finds wherever OpenVINO has brought it: on one core a process whose
    # kernels have run in another thread than the main one would never end.
    vars(numba.config)["THREADING_LAYER_PRIORITY"] = ["omp", "tbb", "workqueue"]


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
    return x if x.dtype in _KINDS else x.to(torch.float32)


def _address(x: Tensor) -> int:
    """Of a tensor's first value, for kernels that write nothing to be differentiated."""
    if x.requires_grad and torch.is_grad_enabled():
        raise RuntimeError("Compiled kernels have no gradient. Call them under `torch.no_grad()`.")
    return x.data_ptr()


@functools.lru_cache(maxsize=64)
def _zeros(size: int, dtype: torch.dtype) -> Tensor:
    return torch.zeros(size, dtype=dtype, device="cpu")


def _call_alone(kernel, *arguments):
    return _alone(kernel)(*arguments)


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


def quantize(x: Tensor, grid: InputGrid, several: bool | None = None) -> tuple[list[Tensor], bool]:
    """See `kernels.quantize`."""
    if not address_says_all(x):
        return torch_kernels.quantize(x, grid)
    planes = [torch.empty_like(x, dtype=torch.uint8) for _ in grid.planes]
    x, size = _readable(x), x.numel()
    several = size >= SEVERAL_QUANTIZE if several is None else several
    call = _run if several else _call_alone
    arguments = _address(x), _KINDS[x.dtype], size, *(plane.data_ptr() for plane in planes)
    if grid.low_bits:
        return planes, bool(call(_split, *arguments, np.int32(grid.low_bits), grid.numbers) < EXPONENT)
    return planes, bool(call(_quantize, *arguments, grid.numbers) < EXPONENT)


def centre(x: Tensor, grid: InputGrid, dtype: torch.dtype) -> tuple[Tensor, bool]:
    """See `kernels.centre`."""
    if not address_says_all(x):
        return torch_kernels.centre(x, grid, dtype)
    out = torch.empty_like(x, dtype=dtype)
    x, size = _readable(x), x.numel()
    call = _run if size >= SEVERAL_QUANTIZE else _call_alone
    arguments = _address(x), _KINDS[x.dtype], size, out.data_ptr(), _KINDS[dtype], grid.numbers
    return out, bool(call(_centre, *arguments) < EXPONENT)


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
    more = [] if added is None else [added]
    if not all(map(address_says_all, (x, weight, bias, *more))):
        return torch_kernels.norm(x, groups, weight, bias, eps, silu, grid, added)
    x, (batch, channels) = _channels_last(_readable(x)), x.shape[:2]
    out = torch.empty_like(x, dtype=x.dtype if grid is None else torch.uint8)
    shape = batch, x.numel() // max(1, batch * channels), channels
    given = [weight, bias, *(each.expand(batch, channels) for each in more)]
    dtype = x.dtype if all(each.dtype == x.dtype for each in given) else torch.float32
    weight, bias, *rest = (each.to(dtype).contiguous() for each in given)  # mostly as they are
    (added,) = rest or [_zeros(batch * channels, dtype)]
    parameters = _address(added), _address(weight), _address(bias), _KINDS[dtype]
    numbers = _NO_GRID if grid is None else grid.numbers
    arguments = _address(x), _KINDS[x.dtype], shape, *parameters, groups, float(eps), bool(silu), numbers
    call = _run if x.numel() >= _SEVERAL_NORM else _call_alone
    kernel = norm_parts if call is _run and batch < torch.get_num_threads() else norm_images
    return out, bool(call(kernel, *arguments, out.data_ptr(), _KINDS[out.dtype]))


def _channels_last(x: Tensor) -> Tensor:
    """A tensor `(B, C, …)` whose channels lie next to each other, one dense piece of memory."""
    if x.ndim == 4:
        return x.contiguous(memory_format=torch.channels_last)
    rows = x.movedim(1, -1)
    return x if rows.is_contiguous() else rows.contiguous().movedim(-1, 1)


def expand(packed: Tensor, bits: int, length: int, table: Tensor) -> Tensor:
    """See `kernels.expand`."""
    if bits != 4:
        return torch_kernels.expand(packed, bits, length, table)
    pairs = torch.stack((table.repeat(16), table.repeat_interleave(16)), dim=1)  # low nibble first
    out = torch.empty(packed.shape[0], length, dtype=table.dtype, device="cpu")
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
    if not address_says_all(codes):
        return torch_kernels.columns(codes, size, stride, padding, dilation, zero)
    codes, (batch, channels, height, width) = _channels_last(codes), codes.shape
    shape = batch, *output_size((height, width), size, stride, padding, dilation), size[0] * size[1] * channels
    out = torch.empty(shape, dtype=torch.uint8, device="cpu")
    geometry = (tuple(pair) for pair in (size, stride, padding, dilation))
    _columns(_address(codes), (batch, height, width, channels), *geometry, np.uint8(zero), out.data_ptr(), shape)
    return out


def softmax_numerators(scores: Tensor) -> Tensor:
    """See `kernels.softmax_numerators`."""
    rows = scores.view(-1, scores.shape[-1])
    sums = torch.empty(len(rows), dtype=torch.float32, device="cpu")
    _run(_softmax, _array(rows), sums.numpy())
    return sums.view(*scores.shape[:-1], 1)

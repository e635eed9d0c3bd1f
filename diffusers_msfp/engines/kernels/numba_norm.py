"""Group norm, SiLU and quantization in Numba: see `numba_rows`.

An image is one thread's, so that its second pass finds it in the cache, or, where there are fewer images than threads,
each of its parts is. Sums are the same in both: float32 within a block of rows, float64 over blocks, and over parts.
"""

import numba
import numpy as np

from .numba_rows import _ONE, LOOPS, _exp, _store, _widen, array_at, jit

_BLOCK, _PART = 64, 256  # rows


@jit()
def _channel_sums(x, sums, squares, totals, total_squares):
    """Sums of the columns of `(N, C)` and of their squares, added to the totals."""
    for first in range(0, x.shape[0], _BLOCK):
        sums[:] = np.float32(0.0)
        squares[:] = np.float32(0.0)
        last = min(x.shape[0], first + _BLOCK)
        for row in range(first, last - 3, 4):  # four rows for each time that the sums are read and written
            one, two, three, four = x[row], x[row + 1], x[row + 2], x[row + 3]
            for c in range(sums.size):
                p, q, r, s = _widen(one[c]), _widen(two[c]), _widen(three[c]), _widen(four[c])
                sums[c] += (p + q) + (r + s)
                squares[c] += (p * p + q * q) + (r * r + s * s)
        for row in range(last - (last - first) % 4, last):
            rest = x[row]
            for c in range(sums.size):
                value = _widen(rest[c])
                sums[c] += value
                squares[c] += value * value
        for c in range(sums.size):
            totals[c] += sums[c]
            total_squares[c] += squares[c]


@jit()
def _part_sums(x, totals):
    """Sums of a part of an image, `(N, C)`, and of the squares: `(2, C)` float64."""
    channels = x.shape[1]
    _channel_sums(x, np.empty(channels, np.float32), np.empty(channels, np.float32), totals[0], totals[1])


@jit(fastmath={"contract"})
def _affine(x, factor, shift):
    return x * factor + shift


@jit()
def _coefficients(length, parts, added, groups, weight, bias, eps, factor, shift):
    """What makes `x` of an image its norm, from the sums of its parts `(P, 2, C)`; False where some are not finite."""
    channels = factor.size
    size = channels // groups
    totals, squares = np.zeros(channels), np.zeros(channels)
    for part in range(parts.shape[0]):
        for c in range(channels):
            totals[c] += parts[part, 0, c]
            squares[c] += parts[part, 1, c]
    finite = True
    for group in range(groups):
        members = range(group * size, (group + 1) * size)
        total = square = 0.0
        for c in members:
            more = _widen(added[c])
            total += totals[c] + length * more
            square += squares[c] + 2.0 * more * totals[c] + length * more * more
        mean = total / (length * size)
        scale = 1.0 / np.sqrt(max(square / (length * size) - mean * mean, 0.0) + eps)
        finite = finite and np.isfinite(mean) and np.isfinite(scale)
        for c in members:
            factor[c] = scale * _widen(weight[c])
            shift[c] = _widen(bias[c]) + (_widen(added[c]) - mean) * scale * _widen(weight[c])
            finite = finite and np.isfinite(factor[c]) and np.isfinite(shift[c])
    return finite


@jit()
def _apply(x, factor, shift, silu, grid, out):
    """Rows normalised, activated, and stored in `out`."""
    for row in range(x.shape[0]):
        given, result = x[row], out[row]
        if silu:
            for c in range(factor.size):
                y = _affine(_widen(given[c]), factor[c], shift[c])
                _store(result, c, y / (_ONE + _exp(-y)), grid)
        else:
            for c in range(factor.size):
                _store(result, c, _affine(_widen(given[c]), factor[c], shift[c]), grid)


@jit()
def _arrays(x, kind, shape, added, weight, bias, parameter_kind, out, out_kind):
    """What kernels are given addresses of: `(B, N, C)`, `(B, C)`, `(C,)` twice, `(B, N, C)`."""
    batch, _, channels = shape
    return (
        array_at(x, shape, kind),
        array_at(added, (batch, channels), parameter_kind),
        array_at(weight, (channels,), parameter_kind),
        array_at(bias, (channels,), parameter_kind),
        array_at(out, shape, out_kind),
    )


@jit(parallel=LOOPS)
def norm_images(x, kind, shape, added, weight, bias, parameter_kind, groups, eps, silu, grid, out, out_kind):
    """Group norm of `(B, N, C)` at an address, image by image; whether statistics and parameters are finite."""
    batch, length, channels = shape
    x, added, weight, bias, out = _arrays(x, kind, shape, added, weight, bias, parameter_kind, out, out_kind)
    finite = np.ones(batch, np.bool_)
    for b in numba.prange(batch):
        parts = np.zeros(((length + _PART - 1) // _PART, 2, channels))
        for part in range(parts.shape[0]):
            _part_sums(x[b, part * _PART : (part + 1) * _PART], parts[part])
        factor, shift = np.empty(channels, np.float32), np.empty(channels, np.float32)
        finite[b] = _coefficients(length, parts, added[b], groups, weight, bias, eps, factor, shift)
        _apply(x[b], factor, shift, silu, grid, out[b])
    return finite.all()


@jit(parallel=LOOPS)
def norm_parts(x, kind, shape, added, weight, bias, parameter_kind, groups, eps, silu, grid, out, out_kind):
    """As `norm_images`, the parts of each image by several threads."""
    batch, length, channels = shape
    x, added, weight, bias, out = _arrays(x, kind, shape, added, weight, bias, parameter_kind, out, out_kind)
    number = (length + _PART - 1) // _PART
    parts = np.zeros((batch, number, 2, channels))
    for job in numba.prange(batch * number):
        b, part = job // number, job % number
        _part_sums(x[b, part * _PART : (part + 1) * _PART], parts[b, part])
    factor, shift = np.empty((batch, channels), np.float32), np.empty((batch, channels), np.float32)
    finite = True
    for b in range(batch):
        finite &= _coefficients(length, parts[b], added[b], groups, weight, bias, eps, factor[b], shift[b])
    for job in numba.prange(batch * number):
        b, rows = job // number, slice(job % number * _PART, (job % number + 1) * _PART)
        _apply(x[b, rows], factor[b], shift[b], silu, grid, out[b, rows])
    return finite

"""Fake quantization for training in Numba: forward and backward, one pass over memory each."""

import numba
import numpy as np
import torch
from torch import Tensor

from ...formats import FPFormat
from .numba_kernels import _CHUNK, _LOOPS, _alone, _flat, _run
from .numba_rows import _round, jit

_SERIAL = 2**16  # below so many values one thread works alone
_REORDER = {"reassoc"}  # sums may be vectorised; a product and a sum are never joined


@jit()
def _forward_row(x, out, inverse, unit, zero, low, high, least, shift):
    for i in range(x.size):
        out[i] = (_round(x[i] * inverse + zero, low, high, least, shift) - zero) * unit


@jit(parallel=_LOOPS)
def _forward(x, out, inverse, unit, zero, low, high, least, shift):
    rows = inverse.size
    length = x.size // rows
    chunks = (length + _CHUNK - 1) // _CHUNK
    for part in numba.prange(rows * chunks):
        row, first = part // chunks, part % chunks * _CHUNK
        span = slice(row * length + first, row * length + min(length, first + _CHUNK))
        _forward_row(x[span], out[span], inverse[row], unit[row], zero[row], low, high, least, shift)


@jit(fastmath=_REORDER)
def _backward_row(grad, x, values, out, inverse, zero, border, low, high):
    """Gradient of a row, and the sums of its terms for the scale and for the zero point."""
    for_scale = np.float32(0.0)
    outside = np.float32(0.0)
    for i in range(x.size):
        y = x[i] * inverse + zero
        inside = grad[i] if (y >= low) & (y <= high) else np.float32(0.0)
        rest = grad[i] - inside
        out[i] = inside
        for_scale += grad[i] * values[i] - inside * x[i] + rest * border
        outside += rest
    return for_scale, outside


@jit(parallel=_LOOPS)
def _backward(grad, x, values, out, inverse, zero, border, low, high, sums):
    rows = inverse.size
    length = x.size // rows
    chunks = (length + _CHUNK - 1) // _CHUNK
    for part in numba.prange(rows * chunks):
        row, first = part // chunks, part % chunks * _CHUNK
        span = slice(row * length + first, row * length + min(length, first + _CHUNK))
        for_scale, outside = _backward_row(
            grad[span], x[span], values[span], out[span], inverse[row], zero[row], border[row], low, high
        )
        sums[row, part % chunks, 0] = for_scale
        sums[row, part % chunks, 1] = outside


def _call(kernel, size: int, *arguments) -> None:
    _alone(kernel)(*arguments) if size < _SERIAL else _run(kernel, *arguments)


def forward(x: Tensor, inverse: Tensor, unit: Tensor, zero: Tensor, fmt: FPFormat) -> Tensor:
    """See `kernels.fake_quantize_forward`."""
    out = torch.empty_like(x)
    bounds = np.float32(fmt.lattice[0]), np.float32(fmt.lattice_max)
    shifts = np.int32((127 + fmt.mantissa_bits) << 23), np.int32((23 - fmt.mantissa_bits) << 23)
    parameters = (each.numpy() for each in (inverse, unit, zero))
    _call(_forward, x.numel(), _flat(x), _flat(out), *parameters, *bounds, *shifts)
    return out


def backward(
    grad: Tensor, x: Tensor, values: Tensor, inverse: Tensor, zero: Tensor, border: Tensor, fmt: FPFormat
) -> tuple[Tensor, Tensor]:
    """See `kernels.fake_quantize_backward`."""
    out, rows = torch.empty_like(x), len(inverse)
    sums = torch.zeros(rows, -(-(x.numel() // rows) // _CHUNK), 2)
    bounds = np.float32(fmt.lattice[0]), np.float32(fmt.lattice_max)
    parameters = (each.numpy() for each in (inverse, zero, border))
    flat = (_flat(each) for each in (grad, x, values, out))
    _call(_backward, x.numel(), *flat, *parameters, *bounds, sums.numpy())
    return out, sums.double().sum(1).float()

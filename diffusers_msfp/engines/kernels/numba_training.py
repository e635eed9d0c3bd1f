"""Fake quantization for training in Numba: forward and backward, one pass over memory each."""

import numba
import numpy as np
import torch
from torch import Tensor

from ...formats import FPFormat
from ..grid import lattice_numbers
from .numba_kernels import _CHUNK, _alone, _flat, _run
from .numba_rows import LOOPS, _round, jit

_SERIAL = 2**16  # below so many values one thread works alone
_REORDER = {"reassoc"}  # sums may be vectorised; a product and a sum are never joined


@jit()
def _forward_row(x, out, inverse, unit, zero, low, high, least, shift):
    for i in range(x.size):
        out[i] = (_round(x[i] * inverse + zero, low, high, least, shift) - zero) * unit


@jit(parallel=LOOPS)
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


@jit(parallel=LOOPS)
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
    """Values of the grid for `x`, see `numerics.fake_quantize`.

    Args:
        x (`Tensor`, dense, float32): as many equal rows as there are parameters, one after the other in memory.
        inverse, unit, zero (`Tensor`, `(R,)`, float32): `1 / unit`, the lattice step, and the zero point in steps.
        fmt (`FPFormat`): of the grid.
    """
    out = torch.empty_like(x)
    parameters = (each.numpy() for each in (inverse, unit, zero))
    lattice = lattice_numbers(fmt.lattice[0], fmt.lattice_max, fmt.mantissa_bits)
    _call(_forward, x.numel(), _flat(x), _flat(out), *parameters, *lattice)
    return out


def backward(
    grad: Tensor, x: Tensor, values: Tensor, inverse: Tensor, zero: Tensor, border: Tensor, fmt: FPFormat
) -> tuple[Tensor, Tensor]:
    """Gradient of `x`, and for each row the sums of what scale and zero point get, `(R, 2)`, float32.

    Args:
        grad (`Tensor`): of the values, laid out as `x`.
        x, inverse, zero, fmt: as in `forward`; values (`Tensor`): its result.
        border (`Tensor`, `(R,)`): what the scale gets for each unit of gradient outside the range.
    """
    out, rows = torch.empty_like(x), len(inverse)
    sums = torch.zeros(rows, -(-(x.numel() // rows) // _CHUNK), 2, dtype=torch.float32, device="cpu")
    parameters = (each.numpy() for each in (inverse, zero, border))
    flat = (_flat(each) for each in (grad, x, values, out))
    low, high, *_ = lattice_numbers(fmt.lattice[0], fmt.lattice_max, fmt.mantissa_bits)
    _call(_backward, x.numel(), *flat, *parameters, low, high, sums.numpy())
    return out, sums.double().sum(1).float()

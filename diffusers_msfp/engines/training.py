"""Fake quantization with gradients, by the fastest that gives the same numbers: for layers that are being trained."""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from .. import numerics
from ..formats import FPFormat
from ..numerics import QParams
from ..numerics.rounding import zero_point_steps

numba_training: Any = None
with suppress(ImportError):  # Numba is not installed
    from .kernels import numba_training


class _Fused(torch.autograd.Function):
    """`numerics.fake_quantize` in one pass forward and one backward; the gradients' sums have another order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, fmt: FPFormat) -> Tensor:
        unit, zero = _by_row(QParams.unchecked(fmt, scale, zero_point))
        values = numba_training.forward(x, 1 / unit, unit, zero, fmt)
        ctx.save_for_backward(x, values, scale, zero_point)
        ctx.format = fmt
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, values, scale, zero_point = ctx.saved_tensors
        unit, zero = _by_row(QParams.unchecked(ctx.format, scale, zero_point))
        moves = ctx.needs_input_grad[2] and not ctx.format.signed
        border = zero * unit if moves else torch.zeros_like(unit)
        grad = grad.contiguous(memory_format=_format_of(x))
        inside, sums = numba_training.backward(grad, x, values, 1 / unit, zero, border, ctx.format)
        for_scale = sums[:, 0].view(scale.shape) / scale if ctx.needs_input_grad[1] else None
        return inside, for_scale, sums[:, 1].view(zero_point.shape) if moves else None, None


def _by_row(qparams: QParams) -> tuple[Tensor, Tensor]:
    """Lattice step and zero point in steps, `(R,)` each; R is 1 for one scale for all."""
    unit = qparams.unit.reshape(-1)
    return unit, zero_point_steps(qparams).reshape(-1).expand_as(unit).contiguous()


def _format_of(x: Tensor) -> torch.memory_format:
    last = x.ndim == 4 and not x.is_contiguous() and x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if last else torch.contiguous_format


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """As `numerics.fake_quantize`, bit for bit; gradients of scale and zero point up to the order of their sums.

    Fused are dense float32 tensors on the CPU with one scale for all, or one for each entry of the first axis.

    Args:
        x (`Tensor`), qparams (`QParams`): as there.
    """
    scale = qparams.scale
    rows = scale.ndim == 0 or (x.ndim > 1 and scale.shape == (len(x), *[1] * (x.ndim - 1)))
    dense = x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last))
    suits = numba_training is not None and x.device.type == "cpu" and x.dtype == torch.float32 and rows and dense
    if not suits or not x.numel() or torch.compiler.is_compiling() or qparams.zero_point.shape not in (scale.shape, ()):
        return numerics.fake_quantize(x, qparams)
    return _Fused.apply(x, scale, qparams.zero_point, qparams.format)

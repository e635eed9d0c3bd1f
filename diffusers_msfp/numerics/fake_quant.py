"""Fake quantization: float in, float out, with gradients for value, scale and zero point."""

from typing import Any

import torch
from torch import Tensor

from ..formats import FPFormat
from .qparams import QParams
from .rounding import check_broadcast, lattice_range, round_to_lattice, zero_point_steps


class _FakeQuantize(torch.autograd.Function):
    """One node instead of a dozen: training keeps the input and the result, and nothing in between."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, zero_point: Tensor, fmt: FPFormat) -> Tensor:
        qparams = QParams.unchecked(fmt, scale, zero_point)
        values = _values(x, qparams)
        ctx.save_for_backward(x, values, scale, zero_point)
        ctx.format = fmt
        return values

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, values, scale, zero_point = ctx.saved_tensors
        qparams = QParams.unchecked(ctx.format, scale, zero_point)
        low, high = lattice_range(ctx.format)
        k = zero_point_steps(qparams)
        y = _lattice_position(x, qparams, k)
        inside = grad * ((y >= low) & (y <= high))
        for_scale = for_zero_point = None
        moves = ctx.needs_input_grad[2] and not ctx.format.signed
        if moves:
            for_zero_point = (grad - inside).sum_to_size(zero_point.shape)
        if ctx.needs_input_grad[1]:
            terms = grad * values - inside * x
            if moves:  # the border lies at (q - k) * unit, and k * unit stays where it is
                terms = terms + (grad - inside) * (k * qparams.unit)
            for_scale = terms.sum_to_size(scale.shape) / scale
        return inside.to(x.dtype), for_scale, for_zero_point, None


def _lattice_position(x: Tensor, qparams: QParams, k: Tensor) -> Tensor:
    return x.to(torch.float32) * (1 / qparams.unit) + k


def _values(x: Tensor, qparams: QParams) -> Tensor:
    k = zero_point_steps(qparams)
    y = _lattice_position(x, qparams, k).clamp(*lattice_range(qparams.format))
    return (round_to_lattice(y, qparams.format) - k) * qparams.unit


def fake_quantize(x: Tensor, qparams: QParams) -> Tensor:
    """Round `x` to the nearest values that `qparams` can represent; values outside the range are saturated.

    Computed in float32 as `(q - k) * unit`; ties go to the even multiple of the local step. Gradients are those of
    LSQ with a straight-through rounding: for `x` 1 inside the range and 0 outside, for the scale
    `(x_hat - x) / scale` inside and the border's grid value outside, for the zero point 0 inside and 1 outside.

    Args:
        x (`Tensor`, any shape, float32/bfloat16/float16): values, any unit. NaN gives NaN.
        qparams (`QParams`): scale and zero point in the unit of `x`, broadcastable to it.

    Returns:
        `Tensor`, shape and dtype of `x`: values of the grid, rounded once more if `dtype` cannot hold them.

    Raises:
        ShapeError: `qparams` does not broadcast to `x`.

    Source:
        arXiv 2505.21591 (as reconstructed) on the grid of arXiv 2208.09225; gradients: LSQ+, arXiv 2004.09576.

    Example:
        >>> fake_quantize(torch.tensor([0.3, 9.0]), QParams("fp4_e2m1", scale=1.0))
        tensor([0.5000, 6.0000])
    """
    check_broadcast(x, qparams)
    inputs = (x, qparams.scale, qparams.zero_point)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs):
        values = _FakeQuantize.apply(*inputs, qparams.format)
    else:
        values = _values(x, qparams)
    if x.dtype == torch.float16:
        values = values.clamp(-65504.0, 65504.0)
    return values.to(x.dtype)

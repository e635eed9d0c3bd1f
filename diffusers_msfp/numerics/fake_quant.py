"""Fake quantization: float in, float out, with gradients for value, scale and zero point."""

import torch
from torch import Tensor

from .qparams import QParams
from .rounding import check_broadcast, lattice_range, round_to_lattice, zero_point_steps


class _Straight(torch.autograd.Function):
    """The value of the second argument with the gradient of the first (straight-through estimator)."""

    @staticmethod
    def forward(ctx, exact: Tensor, rounded: Tensor) -> Tensor:  # noqa: ARG004
        return rounded.view_as(rounded)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:  # noqa: ARG004
        return grad, None


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
    fmt, unit = qparams.format, qparams.unit
    k = zero_point_steps(qparams)
    if qparams.zero_point.requires_grad and not fmt.signed:
        k = _Straight.apply(-qparams.zero_point / unit, k)
    y = x.to(torch.float32) * (1 / unit) + k
    clamped = y.clamp(*lattice_range(fmt))
    q = round_to_lattice(clamped.detach(), fmt)
    if clamped.requires_grad:
        q = _Straight.apply(clamped, q)
    values = (q - k) * unit
    if x.dtype == torch.float16:
        values = values.clamp(-65504.0, 65504.0)
    return values.to(x.dtype)

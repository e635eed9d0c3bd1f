"""AdaRound on floating-point grids: a weight between two neighbours of the grid, pulled to one of them.

The neighbours are taken towards zero and away from it, at the distance that the grid has around the float weight; it
is frozen, so a weight that is rounded up across a power of two needs no care: that is a grid value too.

Sources: arXiv 2004.10568 (AdaRound), 2408.06995 (on floating-point grids), 2503.15465 (scale-aware parameter).
"""

import torch
from torch import Tensor, nn

from ...errors import FormatError
from ...numerics import QParams
from ...numerics.rounding import check_broadcast, check_finite, lattice_range, local_step, round_to_lattice

LOW, HIGH = -0.1, 1.1  # the stretched sigmoid's ends, cut to [0, 1]
ON_GRID = 4 * torch.finfo(torch.float32).eps  # what a grid value times scale may miss its lattice integer by
WARM_UP, FIRST_EXPONENT, LAST_EXPONENT = 0.2, 20.0, 2.0


class SoftRounding(nn.Module):
    """A weight that learns which way to round: `sign · (floor + step · h)`, `h` in [0, 1].

    At first it is the float weight itself, saturated. Weights at or beyond the largest grid value stay there.

    Args:
        weight (`Tensor`, any shape, float32/bfloat16/float16): finite; kept neither by reference nor changed.
        qparams (`QParams`): of a signed format; broadcastable to `weight`, e.g. scale `(C, 1)` for a matrix.
        scale_aware (`bool`): the parameter is `h`'s logit times the local step, in mean steps of the row (FP4DiT).
            An optimizer then moves all weights equally far, and `h` of those in wide cells more slowly.

    Attributes:
        logit (`nn.Parameter`, shape of `weight`, float32): what is learned.

    Raises:
        FormatError: the format is unsigned.
        NonFiniteError: `weight` holds NaN or infinity.
        ShapeError: `qparams` does not broadcast to `weight`.

    Example:
        >>> soft = SoftRounding(torch.tensor([0.3, -9.0]), QParams("fp4_e2m1", scale=1.0))
        >>> soft().tolist(), soft.hard().tolist()
        ([0.30000001192092896, -6.0], [0.5, -6.0])
    """

    unit: Tensor
    floor: Tensor
    step: Tensor
    sensitivity: Tensor | None

    def __init__(self, weight: Tensor, qparams: QParams, *, scale_aware: bool = True) -> None:
        super().__init__()
        if not qparams.format.signed:
            raise FormatError(f"Learned rounding needs a signed format, but got `{qparams.format}`.")
        check_finite(weight, "A weight to round")
        check_broadcast(weight, qparams)
        weight = weight.detach().to(torch.float32)
        largest = lattice_range(qparams.format)[1]
        magnitude = (weight.abs() * (1 / qparams.unit)).clamp_max(largest)  # (*S), lattice steps
        nearest = round_to_lattice(magnitude, qparams.format)
        magnitude = torch.where((magnitude - nearest).abs() <= ON_GRID * nearest, nearest, magnitude)
        step, inverse = local_step(magnitude, qparams.format)
        floor = torch.floor(magnitude * inverse) * step
        free = magnitude < largest
        sign = torch.where(weight < 0, -1.0, 1.0)
        self.register_buffer("unit", qparams.unit.detach(), persistent=False)
        self.register_buffer("floor", sign * floor, persistent=False)  # in lattice steps, as the next
        self.register_buffer("step", sign * step * free, persistent=False)
        logit = torch.logit(((magnitude - floor) * inverse - LOW) / (HIGH - LOW))
        sensitivity = step / step.mean(-1, keepdim=True) if scale_aware else None
        self.register_buffer("sensitivity", sensitivity, persistent=False)
        self.logit = nn.Parameter(logit if sensitivity is None else logit * sensitivity)

    def fraction(self) -> Tensor:
        """`h`: where each weight stands between its neighbours; `(*S)` in [0, 1], with gradients."""
        logit = self.logit if self.sensitivity is None else self.logit / self.sensitivity
        return (torch.sigmoid(logit) * (HIGH - LOW) + LOW).clamp(0, 1)

    def forward(self) -> Tensor:
        """The soft weight, float32, with gradients to `logit`."""
        return (self.floor + self.step * self.fraction()) * self.unit

    @torch.no_grad()
    def hard(self) -> Tensor:
        """The weight rounded as learned, float32: values of the grid, which `encode` leaves as they are."""
        return (self.floor + self.step * (self.logit >= 0)) * self.unit  # h ≥ 1/2

    def penalty(self, exponent: float) -> Tensor:
        """AdaRound's regulariser `Σ (1 - |2h - 1|^exponent)`, `()`: 0 where every `h` is 0 or 1."""
        return (1 - (2 * self.fraction() - 1).abs().pow(exponent)).sum()


def annealed_exponent(progress: float) -> float | None:
    """The exponent of `SoftRounding.penalty` over a run.

    Args:
        progress (`float`): done share of the run, 0 to 1.

    Returns:
        `float`, *optional*: 20 falling linearly to 2; None during the first fifth, which has no penalty.

    Source:
        arXiv 2004.10568 and BRECQ's code.
    """
    if progress < WARM_UP:
        return None
    remaining = 1 - (progress - WARM_UP) / (1 - WARM_UP)
    return LAST_EXPONENT + (FIRST_EXPONENT - LAST_EXPONENT) * max(0.0, remaining)

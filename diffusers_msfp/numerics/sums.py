"""A weight and what an adapter adds to it, as 8-bit integers of one unit for each output channel.

An adapter that reads what its layer reads adds to the weight, `W x + B (A x) = (W + B A) x`, so one product of integers
computes both. The sum is rounded once more, to steps that are a whole fraction of the weight's own: where nothing is
added the weight stays what it is.
"""

import torch
from torch import Tensor

from ..formats import INT8_MAX


def sum_unit(total: Tensor, unit: Tensor, largest: int) -> Tensor:
    """Real size of an integer of each output channel.

    Args:
        total (`Tensor`, `(C, …)`, float32): weight and addition.
        unit (`Tensor`, `(C,)`, float32): of the weight's own integers.
        largest (`int`): that none of these exceeds.

    Returns:
        `Tensor`, `(C,)`, float32: `max(unit / max(1, floor(127 / largest)), max |total| / 127)`.
    """
    if not total.numel():
        return unit
    return torch.maximum(unit / max(1, INT8_MAX // largest), total.flatten(1).abs().amax(1) / INT8_MAX)


def sum_integers(total: Tensor, unit: Tensor) -> Tensor:
    """Nearest integers of a sum, ties to even; `(C, …)`, float32, within ±127.

    Args:
        total (`Tensor`, `(C, …)`, float32).
        unit (`Tensor`, `(C,)`): see `sum_unit`.
    """
    return (total * (1 / _by_channel(unit, total))).round().clamp(-INT8_MAX, INT8_MAX)


def rounded_sum(total: Tensor, unit: Tensor, largest: int) -> Tensor:
    """The real numbers that the integers of a sum stand for; gradients pass through the rounding.

    Args:
        total (`Tensor`, `(C, …)`, float32): weight and addition.
        unit (`Tensor`, `(C,)`), largest (`int`): see `sum_unit`.

    Returns:
        `Tensor`: of the shape of `total`, float32.

    Example:
        >>> import torch
        >>> rounded_sum(torch.tensor([[3.0, -1.26]]), unit=torch.tensor([1.0]), largest=12)
        tensor([[ 3.0000, -1.3000]])
    """
    fixed = total.detach()
    own = sum_unit(fixed, unit, largest)
    values = sum_integers(fixed, own) * _by_channel(own, fixed)
    return values + (total - fixed) if total.requires_grad else values


def _by_channel(unit: Tensor, total: Tensor) -> Tensor:
    return unit.view(-1, *[1] * (total.ndim - 1))

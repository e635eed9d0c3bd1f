"""Group scales in integers: consecutive weights of an output channel share a small multiplier of the channel's unit.

A weight is then `q * m * unit`: lattice integer, multiplier of its group, unit of its output channel. `q * m` is an
integer of up to 7 bits and a sign again, so engines see an 8-bit weight with one unit for each channel, and nothing has
to be rescaled within a sum. Multipliers take 4 bits each.
"""

from torch import Tensor


def num_groups(length: int, size: int) -> int:
    """Groups of a channel of so many weights; the last one may be shorter."""
    return -(-length // size)


def by_weight(multipliers: Tensor, size: int, length: int) -> Tensor:
    """The multiplier of each weight: `(C, groups)` → `(C, length)`."""
    return multipliers.repeat_interleave(size, 1)[:, :length]


def multiply_groups_(integers: Tensor, multipliers: Tensor, size: int) -> Tensor:
    """Lattice integers times the multipliers of their groups, in place.

    Args:
        integers (`Tensor`, `(C, length)`, any dtype that holds ±127): lattice integers of a weight.
        multipliers (`Tensor`, `(C, ⌈length / size⌉)`, uint8).
        size (`int`): weights of a group.

    Returns:
        `Tensor`: `integers`.
    """
    whole = integers.shape[1] // size
    factors = multipliers.to(integers.dtype)
    integers[:, : whole * size].unflatten(1, (whole, size)).mul_(factors[:, :whole, None])
    if whole < factors.shape[1]:
        integers[:, whole * size :].mul_(factors[:, whole:])
    return integers

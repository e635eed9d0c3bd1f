"""Search for format, channel units and group multipliers of a weight with the smallest squared error.

For a given unit the multiplier of each group is found by trying all of them on all its weights. The unit of each
channel is searched over ratios, then moved twice to where the chosen integers have their least squares, with
multipliers found anew each time; what does not lower the error is not taken.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ..errors import ConfigError
from ..formats import FORMATS, FPFormat, largest_multiplier
from ..numerics import QParams
from ..numerics.groups import num_groups
from ..numerics.qparams import TINY
from ..numerics.rounding import check_finite, round_in_place
from .search import SearchResult

UNIT_RATIOS = (0.85, 1.5)
"""Of the unit with which the channel's largest weight would have the largest product."""
NUM_UNITS = 8
"""Units tried per channel and format before they are refined; 24 lower the error by less than 0.5 % more."""
NUM_REFINED = 2
_BLOCK = 2**18  # weights worked on at once: the passes stay in the cache


def search_groups(weight: Tensor, formats: Sequence[str], size: int) -> SearchResult:
    """Best format of a layer, unit of each output channel and multiplier of each group.

    Args:
        weight (`Tensor`, `(C, …)`, float32/bfloat16/float16): finite; axis 0 is the output channel, the others are
            flattened.
        formats (`Sequence[str]`): names of signed formats; the one with the smallest error over all channels wins.
        size (`int`): weights of a group; the last one of a channel may be shorter.

    Returns:
        `SearchResult` with scale `(C, 1, …)` and multipliers `(C, ⌈length / size⌉)`. A channel of zeros gets scale 1.

    Raises:
        NonFiniteError: `weight` holds NaN or infinity.
        ConfigError: an unsigned format, none, or one whose integers leave no room for multipliers.
    """
    check_finite(weight, "A weight")
    candidates = [FORMATS[name] for name in formats]
    if not candidates or not all(fmt.signed and largest_multiplier(fmt) for fmt in candidates):
        raise ConfigError(
            f"Weights with group scales need signed formats whose integers fit a byte, at least one, but got "
            f"{list(formats)}."
        )
    matrix = weight.detach().flatten(1)
    channels, length = matrix.shape
    number = num_groups(length, size)
    found = [_Found(matrix.new_ones(channels, dtype=torch.float32), number) for _ in candidates]
    step = max(1, _BLOCK // max(1, length))
    energy = 0.0
    for start in range(0, channels if length else 0, step):
        part = slice(start, start + step)
        rows = matrix[part].to(torch.float32).abs()  # a copy
        energy += rows.square().sum(dtype=torch.float64).item()
        largest = rows.amax(1)  # (R,)
        rows /= largest.clamp_min(TINY)[:, None]
        columns = F.pad(rows, (0, number * size - length)).view(-1, size).T.contiguous()  # (size, R * groups)
        for fmt, best in zip(candidates, found, strict=True):
            error, ratios, multipliers = _search(columns, len(rows), fmt)
            units = torch.where(largest > 0, ratios * largest, fmt.step)
            units = units.clamp(TINY, torch.finfo(torch.float32).max / (fmt.lattice_max * largest_multiplier(fmt)))
            best.put(part, error * largest.to(torch.float64).square(), units, multipliers)
    winner = min(range(len(candidates)), key=lambda i: found[i].error)
    best, shape = found[winner], (channels,) + (1,) * (weight.ndim - 1)
    scale = (best.units / candidates[winner].step).view(shape)
    error = torch.tensor(best.error / energy if energy else 0.0, dtype=torch.float32, device=weight.device)
    return SearchResult(QParams(candidates[winner], scale), error, best.multipliers)


class _Found:
    """What was found for a format so far."""

    def __init__(self, units: Tensor, number: int) -> None:
        self.units, self.error = units, 0.0
        self.multipliers = torch.ones(len(units), number, dtype=torch.uint8, device=units.device)

    def put(self, part: slice, error: Tensor, units: Tensor, multipliers: Tensor) -> None:
        self.error += error.sum().item()
        self.units[part], self.multipliers[part] = units, multipliers.view(len(units), -1)


def _search(columns: Tensor, channels: int, fmt: FPFormat) -> tuple[Tensor, Tensor, Tensor]:
    """Error and unit of each channel `(R,)`, and multipliers `(R * groups,)`; columns `(size, R * groups)`, 0 to 1."""
    top = fmt.lattice_max * largest_multiplier(fmt)
    low, high = UNIT_RATIOS
    number = columns.shape[1] // channels

    def tried(units: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        error, multipliers = _best_multipliers(columns, units.repeat_interleave(number), fmt)
        return error.view(-1, number).sum(1), units, multipliers

    first, *others = (low * (high / low) ** (i / (NUM_UNITS - 1)) / top for i in range(NUM_UNITS))
    best = tried(columns.new_full((channels,), first))
    for unit in others:
        best = _better(tried(columns.new_full((channels,), unit)), best)
    for _ in range(NUM_REFINED):
        _, units, multipliers = best
        factors = multipliers.to(torch.float32)
        integers = columns / (units.repeat_interleave(number) * factors)
        integers = round_in_place(integers.clamp_max_(fmt.lattice_max), fmt.mantissa_bits).mul_(factors)
        products, squares = ((integers * other).sum(0).view(-1, number).sum(1) for other in (columns, integers))
        best = _better(tried(torch.where(squares > 0, products / squares, units)), best)
    return best


def _better(new: tuple[Tensor, Tensor, Tensor], old: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """For each channel the one with less error."""
    wins = new[0] < old[0]
    of_groups = wins.repeat_interleave(len(old[2]) // len(wins))
    error, units = (torch.where(wins, a, b) for a, b in zip(new[:2], old[:2], strict=True))
    return error, units, torch.where(of_groups, new[2], old[2])


def _best_multipliers(columns: Tensor, units: Tensor, fmt: FPFormat) -> tuple[Tensor, Tensor]:
    """The least squared error of each group and its multiplier, `(N,)` each; columns `(size, N)`, units `(N,)`."""
    steps = columns / units
    scaled, rounded = torch.empty_like(steps), torch.empty_like(steps)
    error, multipliers = torch.full_like(units, torch.inf), torch.ones_like(units, dtype=torch.uint8)
    for multiplier in range(1, largest_multiplier(fmt) + 1):
        torch.mul(steps, 1 / multiplier, out=scaled)
        torch.clamp(scaled, max=fmt.lattice_max, out=rounded)
        round_in_place(rounded, fmt.mantissa_bits)
        apart = rounded.sub_(scaled).square_().sum(0).mul_(multiplier**2)
        multipliers[apart < error] = multiplier
        torch.minimum(error, apart, out=error)
    return error.mul_(units.square()), multipliers

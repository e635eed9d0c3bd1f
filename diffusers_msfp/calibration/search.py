"""Search for format, scale and zero point with the smallest squared error.

Squared error is a sum over the cells of the grid, so with the values sorted once and prefix sums of x and x² every
candidate costs one binary search per cell border, whatever the number of values: `Σ x² - 2 g Σ x + g² n` per cell.
The minimum is the one that trying all candidates on all values finds.

Search ranges (our choice, since the paper's were not found): weights 0.3 to 2.0 times the largest magnitude of their
channel, because 4-bit formats want to clip and wide-exponent formats to stretch; activations 0.001 to 1.2 times the
range, in equal ratios, for with outliers the best lies far below the largest value. The neighbourhood of the best is
searched again more finely. The zero point runs over the lattice integers on the grid that reach down to the smallest
value.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import cast

import numpy as np
import torch
from torch import Tensor

from ..errors import ConfigError, ShapeError
from ..formats import FORMATS, FPFormat
from ..numerics import QParams
from ..numerics.qparams import TINY
from ..numerics.rounding import check_finite

WEIGHT_RATIOS = (0.3, 2.0)
ACTIVATION_RATIOS = (0.001, 1.2)
NUM_SCALES = 100
"""Scales of weights tried per format; on the embedded model 30 cost 2 to 10 % more error."""
NUM_RATIOS = 80
"""Scales of activations tried per format."""
SKEW = 1.25
"""So many times further the positives reach than the negatives where unsigned formats are tried."""
NUM_REFINED = 15
"""Scales tried between the neighbours of the best."""
MAX_ZERO_POINTS = 8
"""Zero points tried per scale: all if there are no more, else 0 and the upper half of the reach, evenly."""
_CHUNK = 2**18  # candidate levels held at once; more would not fit into the cache


@dataclass(frozen=True)
class SearchResult:
    """The best candidate.

    Args:
        qparams (`QParams`): scale `(C, 1, …)` per channel, `()` per tensor.
        error (`Tensor`, `()`, float32): squared error divided by the sum of squares; 0 for all-zero values.
        multipliers (`Tensor`, *optional*, `(C, groups)`, uint8): of the scale, for each group of a channel's weights.
    """

    qparams: QParams
    error: Tensor
    multipliers: Tensor | None = None


class _SortedRows:
    """Rows of values, sorted, with prefix sums: the squared error of any grid in O(cells · log n)."""

    def __init__(self, rows: Tensor) -> None:
        self.values = _sort(rows.to(torch.float32))  # (R, n)
        exact = self.values.to(torch.float64)
        self.sums = torch.nn.functional.pad(exact.cumsum(1), (1, 0))  # (R, n + 1)
        self.energy = exact.square().sum(1)  # (R,)

    def error(self, levels: Tensor) -> Tensor:
        """Squared error of each candidate: `levels` `(R, S, L)` float64, ascending → `(R, S)` float64."""
        rows, num, cells = levels.shape
        borders = ((levels[..., 1:] + levels[..., :-1]) / 2).to(torch.float32).flatten(1)
        inner = torch.searchsorted(self.values, borders).view(rows, num, cells - 1)
        first = inner.new_zeros(rows, num, 1)
        index = torch.cat([first, inner, first + self.values.shape[1]], dim=-1)  # (R, S, L + 1)
        sums = self.sums.gather(1, index.flatten(1)).view_as(index).diff(dim=-1)
        counts = index.diff(dim=-1)
        gain = (levels * (2 * sums - levels * counts)).sum(-1)
        return (self.energy[:, None] - gain).clamp_min(0)


def _sort(rows: Tensor) -> Tensor:
    """Rows in ascending order; NumPy's vectorised sort is an order of magnitude faster than torch's on a CPU."""
    if rows.device.type == "cpu":
        return torch.from_numpy(np.sort(rows.numpy(), axis=1))
    return torch.sort(rows, dim=1).values


def _unit_scale(scale: Tensor, fmt: FPFormat) -> Tensor:
    """Scales with which `unit` is a normal float32 and `maxval` finite."""
    return scale.clamp(TINY / fmt.step, torch.finfo(torch.float32).max / fmt.max)


def _weight_ratios(device: torch.device) -> Tensor:
    return torch.linspace(*WEIGHT_RATIOS, NUM_SCALES, dtype=torch.float32, device=device)


def _activation_ratios(device: torch.device) -> Tensor:
    low, high = ACTIVATION_RATIOS
    return torch.logspace(math.log10(low), math.log10(high), NUM_RATIOS, dtype=torch.float32, device=device)


def _refined(ratios: Tensor, best: Tensor) -> Tensor:
    """Ratios between the neighbours of the best ones: indices of any shape → `(…, NUM_REFINED)`."""
    low, high = (ratios[(best + step).clamp(0, len(ratios) - 1)][..., None] for step in (-1, 1))
    between = torch.linspace(0, 1, NUM_REFINED + 2, dtype=torch.float32, device=ratios.device)[1:-1]
    return low + (high - low) * between


def search_weight(weight: Tensor, formats: Sequence[str]) -> SearchResult:
    """Best format of a layer and best scale of each output channel.

    Args:
        weight (`Tensor`, `(C, …)`, float32/bfloat16/float16): finite; axis 0 is the output channel.
        formats (`Sequence[str]`): names of signed formats; the one with the smallest error over all channels wins.

    Returns:
        `SearchResult` with scale `(C, 1, …)`. A channel of zeros gets scale 1.

    Raises:
        NonFiniteError: `weight` holds NaN or infinity.
        ConfigError: an unsigned format, or none.
    """
    check_finite(weight, "A weight")
    signed = [FORMATS[name] for name in formats]
    if not signed or not all(fmt.signed for fmt in signed):
        raise ConfigError(f"Weights need at least one format, all of them signed, but got {list(formats)}.")
    matrix = weight.detach().flatten(1)  # (C, n)
    channels = matrix.shape[0]
    shape = (channels,) + (1,) * (weight.ndim - 1)
    if matrix.numel() == 0:
        return SearchResult(
            QParams(signed[0], weight.new_ones(shape, dtype=torch.float32)), weight.new_zeros(()).float()
        )

    errors = [matrix.new_zeros(channels, dtype=torch.float64) for _ in signed]
    scales = [matrix.new_ones(channels, dtype=torch.float32) for _ in signed]
    energy: float | Tensor = 0.0
    largest = NUM_SCALES * max(len(fmt.magnitudes) for fmt in signed)
    step = max(1, _CHUNK // max(largest, matrix.shape[1]))
    for start in range(0, channels, step):
        rows = _SortedRows(matrix[start : start + step].abs())
        energy += rows.energy.sum()
        amax = rows.values[:, -1]
        for i, fmt in enumerate(signed):
            grid = torch.tensor(fmt.magnitudes, dtype=torch.float64, device=weight.device) * fmt.step
            ratios = _weight_ratios(weight.device)
            error, found, index = _best_ratio(rows, amax, fmt, grid, ratios)
            finer_error, finer, _ = _best_ratio(rows, amax, fmt, grid, _refined(ratios, index))
            errors[i][start : start + step] = torch.minimum(error, finer_error)
            found = torch.where(finer_error < error, finer, found)
            scales[i][start : start + step] = torch.where(amax > 0, found, 1.0)
    winner = min(range(len(signed)), key=lambda i: errors[i].sum().item())
    relative = (errors[winner].sum() / energy).nan_to_num(0.0)
    return SearchResult(QParams(signed[winner], scales[winner].view(shape)), relative.to(torch.float32))


def _best_ratio(
    rows: _SortedRows, amax: Tensor, fmt: FPFormat, grid: Tensor, ratios: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row the least error, its scale and the index of its ratio, `(R,)` each; ratios `(S,)` or `(R, S)`."""
    scale = _unit_scale(ratios * amax[:, None] / fmt.max, fmt)  # (R, S)
    best = rows.error(scale.to(torch.float64)[..., None] * grid).min(dim=1)
    return best.values, scale.gather(1, best.indices[:, None])[:, 0], best.indices


def is_skewed(low: float, high: float) -> bool:
    """Whether unsigned formats are worth trying: the positives reach clearly further than the negatives.

    Source:
        arXiv 2505.21591 takes unsigned formats for layers behind SiLU, whose values never fall below -0.28 (it calls
        them anomalous-activation layers); the test on the data instead of the network's structure is our choice, so
        that any skewed input may have a zero point where that lowers the error.
    """
    return -low * SKEW < high


def search_qparams(x: Tensor, formats: Sequence[str], *, per_channel: bool = False) -> QParams:
    """Format, scale and zero point with the smallest squared error (mixup-sign search).

    Args:
        x (`Tensor`, any shape, float32/bfloat16/float16): finite values; a sample of an activation, or a weight.
        formats (`Sequence[str]`): candidate names. Unsigned ones are tried, with a zero point, only where they can
            win: with `per_channel` never, else if the largest value exceeds 1.25 times the magnitude of the smallest.
        per_channel (`bool`): one scale per index of axis 0 instead of one per tensor.

    Returns:
        `QParams`: scale and zero point of shape `()`; with `per_channel` a scale `(C, 1, …)`.

    Raises:
        NonFiniteError: `x` holds NaN or infinity.
        ConfigError: no candidate that may be used for these values.
        ShapeError: `per_channel` for a tensor without axes.

    Source:
        arXiv 2505.21591 (mixup-sign search), as reconstructed; candidates and ranges are ours.

    Example:
        >>> search_qparams(torch.nn.functional.silu(torch.linspace(-5, 5, 999)), ["fp4_e2m1", "fp4_ue2m2"]).format.name
        'fp4_ue2m2'
    """
    if not per_channel:
        return search_activation(x, formats).qparams
    if x.ndim == 0:
        raise ShapeError("A search per channel needs at least one axis, but got a tensor of shape ().")
    return search_weight(x, [name for name in formats if FORMATS[name].signed]).qparams


def search_activation(x: Tensor, formats: Sequence[str], bounds: tuple[float, float] | None = None) -> SearchResult:
    """`search_qparams` for one tensor, with the error that remains.

    Args:
        x (`Tensor`), formats (`Sequence[str]`): as in `search_qparams`.
        bounds (`tuple[float, float]`, *optional*): smallest and largest of all values of which `x` is a sample.
    """
    check_finite(x, "Values to search a range for")
    values = x.detach().flatten().to(torch.float32)
    low, high = bounds or ((v.item() for v in torch.aminmax(values)) if values.numel() else (0.0, 0.0))
    allowed = [FORMATS[name] for name in formats if FORMATS[name].signed or is_skewed(low, high)]
    if not allowed:
        raise ConfigError(f"Values from {low:.4g} to {high:.4g} need a signed format, but got only {list(formats)}.")
    if low == high == 0.0:
        one = torch.ones((), dtype=torch.float32, device=x.device)
        return SearchResult(QParams(allowed[0], one), torch.zeros_like(one))

    rows = _SortedRows(values[None])
    best: tuple[float, QParams | None] = (torch.inf, None)
    for fmt in allowed:
        ratios = _activation_ratios(values.device)
        coarse = _best_of(rows, fmt, ratios, low, high)
        finer = _best_of(rows, fmt, _refined(ratios, coarse[2]), low, high)
        best = min(best, coarse[:2], finer[:2], key=lambda found: found[0])
    energy = rows.energy.item()  # of a sample; it may be of zeros alone
    return SearchResult(
        cast(QParams, best[1]), torch.tensor(best[0] / energy if energy else 0.0, dtype=torch.float32, device=x.device)
    )


def _best_of(
    rows: _SortedRows, fmt: FPFormat, ratios: Tensor, low: float, high: float
) -> tuple[float, QParams, Tensor]:
    """Error and parameters of the best candidate of a format, and the index of its ratio."""
    scale, k, ratio = _tensor_candidates(fmt, low, high, ratios)
    lattice = torch.tensor(fmt.lattice, dtype=torch.float64, device=ratios.device)
    unit = (scale * fmt.step).to(torch.float64)
    errors = [
        rows.error(((lattice - k[part, None]) * unit[part, None])[None])[0]
        for part in torch.arange(len(scale), device=ratios.device).split(max(1, _CHUNK // len(lattice)))
    ]
    error, chosen = torch.cat(errors).min(0)
    zero_point = -k[chosen].to(torch.float32) * (scale[chosen] * fmt.step)
    return error.item(), QParams(fmt, scale[chosen].clone(), zero_point), ratio[chosen]


def _tensor_candidates(fmt: FPFormat, low: float, high: float, ratios: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scale (float32), zero point in lattice steps (float64) and index of the ratio, `(P,)` each."""
    span = max(-low, high) if fmt.signed else high - min(low, 0.0)
    scale = _unit_scale(ratios * (span / fmt.max), fmt)
    index = torch.arange(len(ratios), device=ratios.device)
    if fmt.signed:
        return scale, torch.zeros_like(scale, dtype=torch.float64), index
    magnitudes = torch.tensor(fmt.magnitudes, dtype=torch.float64, device=ratios.device)
    units = (scale.to(torch.float64) * fmt.step)[:, None]
    reach = (magnitudes * units < -low).sum(1) + 1  # up to the first that covers `low`
    picks = [_zero_point_picks(min(each, len(magnitudes))) for each in reach.tolist()]
    counts = torch.tensor([len(each) for each in picks], device=ratios.device)
    steps = magnitudes[torch.cat(picks).to(ratios.device)]
    return scale.repeat_interleave(counts), steps, index.repeat_interleave(counts)


@cache
def _zero_point_picks(reach: int) -> Tensor:
    """Indices of the magnitudes to try as zero points, out of `reach`."""
    if reach <= MAX_ZERO_POINTS:
        return torch.arange(reach, device="cpu")
    upper = torch.linspace((reach - 1) / 2, reach - 1, MAX_ZERO_POINTS - 1, dtype=torch.float32, device="cpu")
    return torch.cat([torch.zeros(1, dtype=torch.long, device="cpu"), upper.round().long()])

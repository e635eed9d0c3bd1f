"""One option for each item, so that a sum of costs is least while a sum of weights stays below a limit.

The multiple-choice knapsack problem, knowing nothing of models. The convex hull of each item's options and its steps by
gain per weight solve the linear relaxation exactly; what the last step leaves of the limit is filled by single moves
and exchanges of two items until none helps. How far the result can be from the optimum is returned with it.

Source: Sinha and Zoltners 1979, "The multiple-choice knapsack problem" (relaxation on the hulls); the repair is a plain
local search.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import ConfigError

Options = Sequence[tuple[float, float]]
"""(weight, cost) of each option of an item."""
MAX_PAIRS = 2**24
"""Exchanges that are looked at together; beyond that single moves alone repair."""


@dataclass(frozen=True)
class Solution:
    """What was chosen.

    Args:
        options (`tuple[int, ...]`): for each item, which of its options.
        weight, cost (`float`): sums.
        bound (`float`): no choice within the limit costs less.
    """

    options: tuple[int, ...]
    weight: float
    cost: float
    bound: float


def lightest(items: Sequence[Options]) -> float:
    """The least weight that a choice can have."""
    return sum(min(weight for weight, _ in options) for options in items)


def solve(items: Sequence[Options], limit: float) -> Solution:
    """Choose an option for each item.

    Args:
        items (`Sequence[Options]`): of each item its options; weights and costs ≥ 0.
        limit (`float`): of the sum of weights, never exceeded.

    Raises:
        ConfigError: even the lightest options together exceed the limit.

    Example:
        >>> solve([[(1, 9.0), (2, 1.0)], [(1, 5.0), (2, 4.0)]], limit=3).options
        (1, 0)
    """
    if lightest(items) > limit:
        raise ConfigError(f"A limit must allow the lightest options, {lightest(items):g} together, but is {limit:g}.")
    chosen: list[int] = []
    bound = 0.0
    for options, weight, cost, rate in _path(items):
        if weight > limit:
            before = sum(items[i][option][0] for i, option in enumerate(chosen))
            bound = cost + rate * (weight - limit) if before < limit else bound
            break
        chosen, bound = options, cost
    repaired = _repair(items, list(chosen), limit)
    weight, cost = (sum(items[i][option][axis] for i, option in enumerate(repaired)) for axis in (0, 1))
    return Solution(tuple(repaired), weight, cost, min(bound, cost))


def front(items: Sequence[Options]) -> list[tuple[int, ...]]:
    """Choices from the lightest to the cheapest, each the best of its weight."""
    return [tuple(options) for options, *_ in _path(items)]


def _path(items: Sequence[Options]) -> Iterator[tuple[list[int], float, float, float]]:
    """Choices with their weight, cost, and the cost that the step to them saved per weight."""
    hulls = [_hull(options) for options in items]
    steps = []
    for item, hull in enumerate(hulls):
        for before, after in zip(hull, hull[1:], strict=False):
            (w0, c0), (w1, c1) = items[item][before], items[item][after]
            steps.append(((c0 - c1) / (w1 - w0), item, after, w1 - w0, c1 - c0))
    chosen = [hull[0] for hull in hulls]
    weight = sum(items[i][option][0] for i, option in enumerate(chosen))
    cost = sum(items[i][option][1] for i, option in enumerate(chosen))
    yield list(chosen), weight, cost, 0.0
    for rate, item, option, more, less in sorted(steps, key=lambda step: -step[0]):
        chosen[item] = option
        weight, cost = weight + more, cost + less
        yield list(chosen), weight, cost, rate


def _hull(options: Options) -> list[int]:
    """Options on the lower convex hull from the lightest to the cheapest, ascending in weight."""
    order = sorted(range(len(options)), key=lambda i: options[i])
    found: list[int] = []
    for i in order:
        weight, cost = options[i]
        if found and cost >= options[found[-1]][1]:
            continue
        while len(found) > 1:
            (w0, c0), (w1, c1) = options[found[-2]], options[found[-1]]
            if (c0 - c1) * (weight - w1) > (c1 - cost) * (w1 - w0):
                break
            found.pop()
        found.append(i)
    return found


def _repair(items: Sequence[Options], chosen: list[int], limit: float) -> list[int]:
    """Single moves and exchanges of two items, the best first, until none saves anything."""
    slack = limit - sum(items[i][option][0] for i, option in enumerate(chosen))
    while True:
        moves = [
            (i, option, weight - items[i][chosen[i]][0], cost - items[i][chosen[i]][1])
            for i, options in enumerate(items)
            for option, (weight, cost) in enumerate(options)
            if option != chosen[i]
        ]
        best = _best(moves, slack)
        if not best:
            return chosen
        for i, option, weight, _ in best:
            chosen[i], slack = option, slack - weight


def _best(moves: list[tuple[int, int, float, float]], slack: float) -> list[tuple[int, int, float, float]]:
    """The move, or the two of different items, that saves most within the slack; none if nothing does."""
    if not moves:
        return []
    owner, weight, cost = (np.array([move[axis] for move in moves], dtype=float) for axis in (0, 2, 3))
    single = np.where(weight <= slack, cost, np.inf)
    found = [moves[int(single.argmin())]] if single.min() < 0 else []
    least = min(float(single.min()), 0.0)
    if len(moves) ** 2 <= MAX_PAIRS:
        fits = (weight[:, None] + weight[None] <= slack) & (owner[:, None] != owner[None])
        both = np.where(fits, cost[:, None] + cost[None], np.inf)
        a, b = np.unravel_index(int(both.argmin()), both.shape)
        if both[a, b] < least * (1 + 1e-12) - 1e-300:
            return [moves[a], moves[b]]
    return found

"""From the error of the model's output to the PSNR of pictures, by a few pairs that were measured."""

import math
from collections.abc import Sequence


def psnr_of(error: float, measured: Sequence[tuple[float, float]]) -> float:
    """PSNR that an error means.

    Between measured errors it is linear in the logarithm; beyond them it falls by 10 dB for each factor of ten, as a
    mean squared error does. Pairs that contradict each other (a larger error, a higher PSNR) are averaged.

    Args:
        error (`float`): > 0, squared.
        measured (`Sequence[tuple[float, float]]`): (error, PSNR in decibels), at least one.

    Example:
        >>> psnr_of(0.01, [(0.1, 20.0)])
        30.0
    """
    x, points = math.log10(error), _monotone(measured)
    if x <= points[0][0]:
        return points[0][1] + 10 * (points[0][0] - x)
    if x >= points[-1][0]:
        return points[-1][1] - 10 * (x - points[-1][0])
    (x0, y0), (x1, y1) = next(pair for pair in zip(points, points[1:], strict=False) if x <= pair[1][0])
    return y0 + (y1 - y0) * (x - x0) / (x1 - x0)


def error_for(psnr: float, measured: Sequence[tuple[float, float]]) -> float:
    """The largest error that means at least this PSNR; inverse of `psnr_of`."""
    low, high = -30.0, 10.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if psnr_of(10**middle, measured) >= psnr else (low, middle)
    return 10**low


def _monotone(measured: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Points of (log10 error, PSNR), the PSNR never rising."""
    groups: list[list[tuple[float, float]]] = []
    for error, psnr in sorted(measured):
        groups.append([(math.log10(error), psnr)])
        while len(groups) > 1 and _mean(groups[-1], 1) >= _mean(groups[-2], 1):
            last = groups.pop()
            groups[-1] = groups[-1] + last
    return [(_mean(group, 0), _mean(group, 1)) for group in groups]


def _mean(group: Sequence[tuple[float, float]], axis: int) -> float:
    return sum(point[axis] for point in group) / len(group)

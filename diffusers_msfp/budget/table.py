"""What is known of all choices, and what follows from it: the best choice for a target, and the front of all."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from ..errors import ConfigError
from .knapsack import Solution, front, lightest, solve
from .psnr import psnr_of
from .record import BudgetPlan, FrontPoint, Option, PlannedLayer

POINTS = 25
"""Of a front, at most."""


@dataclass(frozen=True)
class Table:
    """All that is known of the choices.

    Args:
        errors, sizes (`Mapping[str, Mapping[str, float]]`): layer → scheme → squared error; bytes.
        rest (`int`): bytes of all that is no choice.
        times (`Mapping`, *optional*): layer → scheme → seconds.
        around (`float`): seconds of all that is no choice.
    """

    errors: Mapping[str, Mapping[str, float]]
    sizes: Mapping[str, Mapping[str, int]]
    rest: int
    times: Mapping[str, Mapping[str, float]] | None = None
    around: float = 0.0

    def _items(self, weights: Mapping, costs: Mapping) -> list[list[tuple[float, float]]]:
        return [
            [(weights[name][scheme], max(0.0, costs[name][scheme])) for scheme in options]
            for name, options in self.errors.items()
        ]

    def choice(self, options: Sequence[int]) -> dict[str, str]:
        """Layer → scheme by the options' numbers."""
        return {name: list(own)[option] for (name, own), option in zip(self.errors.items(), options, strict=True)}

    def sums(self, choice: Mapping[str, str]) -> tuple[int, float, float | None]:
        """Bytes of the file, squared error, seconds of a step."""
        size = self.rest + sum(self.sizes[name][scheme] for name, scheme in choice.items())
        error = sum(max(0.0, self.errors[name][scheme]) for name, scheme in choice.items())
        if self.times is None:
            return size, error, None
        return size, error, self.around + sum(self.times[name][scheme] for name, scheme in choice.items())

    def least_error(self, target: str, value: float) -> Solution:
        """Within bytes or seconds."""
        weights, fixed, unit = (
            (self.sizes, self.rest, "bytes") if target == "bytes" else (self.times or {}, self.around, "seconds")
        )
        items = self._items(weights, self.errors)
        least = fixed + lightest(items)
        if least > value:
            raise ConfigError(
                f"`target_{target}` must be at least {_said(least, unit)} with these choices, of which "
                f"{_said(fixed, unit)} belong to no choice, but got {_said(value, unit)}. Take that, or allow other "
                f"`choices`."
            )
        return solve(items, value - fixed)

    def least_bytes(self, error: float) -> Solution:
        """Within a squared error."""
        return solve(self._items(self.errors, self.sizes), error * (1 + 1e-9))  # sums of floats depend on their order

    def ends(self) -> tuple[dict[str, str], dict[str, str]]:
        """The smallest choice and the best."""
        path = front(self._items(self.sizes, self.errors))
        return self.choice(path[0]), self.choice(path[-1])

    def front(self, runs: Sequence[tuple[float, float]]) -> tuple[FrontPoint, ...]:
        """Choices from the smallest to the best, evenly taken."""
        path = [self.choice(options) for options in front(self._items(self.sizes, self.errors))]
        numbers = sorted({round(i * (len(path) - 1) / (POINTS - 1)) for i in range(POINTS)})
        points = []
        for choice in (path[number] for number in numbers):
            size, error, seconds = self.sums(choice)
            points.append(
                FrontPoint(
                    bytes=size,
                    error=sqrt(error),
                    psnr_db=psnr_of(error, runs) if runs and error > 0 else None,
                    step_seconds=seconds,
                    bits=dict(sorted(Counter(choice.values()).items())),
                )
            )
        return tuple(points)

    def plan(self, solution: Solution, runs: Sequence[tuple[float, float]], **given: Any) -> BudgetPlan:
        """The record of a choice."""
        choice = self.choice(solution.options)
        size, error, seconds = self.sums(choice)
        layers = tuple(
            PlannedLayer(
                name=name,
                scheme=scheme,
                options=tuple(
                    Option(
                        scheme=other,
                        bytes=self.sizes[name][other],
                        error=self.errors[name][other],
                        seconds=self.times[name][other] if self.times else None,
                    )
                    for other in self.errors[name]
                ),
            )
            for name, scheme in choice.items()
        )
        return BudgetPlan(
            layers=layers,
            bytes=size,
            error=sqrt(error),
            error_bound=self.rest + solution.bound if given["target"] == "psnr" else sqrt(solution.bound),
            psnr_db=psnr_of(error, runs) if runs else None,
            step_seconds=seconds,
            front=self.front(runs),
            runs=tuple(runs),
            **given,
        )


def _said(value: float, unit: str) -> str:
    return f"{value:,.0f} bytes" if unit == "bytes" else f"{value * 1e3:.3g} ms"

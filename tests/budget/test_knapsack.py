"""The solver against all choices, and the map from errors to PSNR."""

import itertools
import math

import numpy as np
import pytest

from diffusers_msfp.budget.knapsack import front, lightest, solve
from diffusers_msfp.budget.psnr import error_for, psnr_of
from diffusers_msfp.errors import ConfigError


def random_items(seed: int) -> list[list[tuple[float, float]]]:
    rng = np.random.default_rng(seed)
    return [
        [(float(w), float(c)) for w, c in zip(rng.integers(1, 40, 3), rng.random(3) ** 3, strict=True)]
        for _ in range(6)
    ]


@pytest.mark.parametrize("seed", range(12))
def test_near_the_best_of_all_choices_and_never_above_the_limit(seed):
    items = random_items(seed)
    every = [(sum(o[0] for o in chosen), sum(o[1] for o in chosen)) for chosen in itertools.product(*items)]
    for share in (0.0, 0.2, 0.5, 0.9, 1.0):
        limit = lightest(items) + share * (max(w for w, _ in every) - lightest(items))
        best = min(cost for weight, cost in every if weight <= limit)
        found = solve(items, limit)
        assert found.weight <= limit
        assert found.weight == sum(items[i][o][0] for i, o in enumerate(found.options))
        assert found.bound <= best + 1e-12
        assert found.cost <= 1.25 * best + 1e-12


def test_a_limit_that_cannot_be_kept_is_refused():
    with pytest.raises(ConfigError, match="3 together, but is 2"):
        solve([[(1, 1.0), (2, 0.5)], [(2, 1.0)]], 2)


def test_a_front_falls():
    items = random_items(3)
    sums = [[sum(items[i][o][axis] for i, o in enumerate(chosen)) for axis in (0, 1)] for chosen in front(items)]
    assert sums[0][0] == lightest(items)
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(sums))
    assert math.isclose(sums[-1][1], sum(min(cost for _, cost in options) for options in items))


def test_options_that_are_worse_in_both_are_never_taken():
    assert solve([[(1, 1.0), (2, 3.0), (3, 2.0)]], 3).options == (0,)


def test_psnr_falls_with_the_error_and_goes_through_what_was_measured():
    measured = [(1e-4, 40.0), (1e-2, 25.0)]
    assert psnr_of(1e-4, measured) == pytest.approx(40)
    assert psnr_of(1e-3, measured) == pytest.approx(32.5)
    assert psnr_of(1e-5, measured) == pytest.approx(50)
    assert psnr_of(1e-1, measured) == pytest.approx(15)
    for psnr in (12.0, 27.0, 39.0, 44.0):
        assert psnr_of(error_for(psnr, measured), measured) == pytest.approx(psnr)


def test_measured_pairs_that_contradict_each_other_are_averaged():
    measured = [(1e-4, 30.0), (2e-4, 31.0), (1e-2, 20.0)]
    values = [psnr_of(10**x, measured) for x in np.linspace(-5, -1, 40)]
    assert values == sorted(values, reverse=True)

"""The prefix-sum search finds what brute force finds."""

import pytest
import torch
from reference import grid_of, squared_error

from diffusers_msfp import FORMATS, fake_quantize, search_qparams
from diffusers_msfp.calibration import is_skewed, search_activation, search_weight
from diffusers_msfp.calibration.search import (
    _activation_ratios,
    _refined,
    _SortedRows,
    _tensor_candidates,
    _unit_scale,
    _weight_ratios,
)
from diffusers_msfp.errors import ConfigError, NonFiniteError, ShapeError
from diffusers_msfp.schemes import candidates

SIGNED4, UNSIGNED4 = candidates(4, signed=True), candidates(4, signed=False)


def brute_force_weight(weight: torch.Tensor, names) -> tuple[str, torch.Tensor, float]:
    """Every format and scale tried on every value, and again between the neighbours of the best."""
    best, ratios = None, _weight_ratios(weight.device)
    for name in names:
        fmt = FORMATS[name]
        error, scales = 0.0, []
        for channel in weight.flatten(1):
            amax = channel.abs().max()
            tried = _unit_scale(ratios * amax / fmt.max, fmt)
            errors = [squared_error(channel, grid_of(name), s.item()) for s in tried]
            finer = _unit_scale(_refined(ratios, torch.tensor(errors.index(min(errors)))) * amax / fmt.max, fmt)
            tried, errors = (
                torch.cat([tried, finer]),
                errors + [squared_error(channel, grid_of(name), s.item()) for s in finer],
            )
            error += min(errors)
            scales.append(tried[errors.index(min(errors))])
        if best is None or error < best[2]:
            best = (name, torch.stack(scales), error)
    return best


def embedded_weight(embedded) -> torch.Tensor:
    return embedded.unet.get_parameter("down_blocks.1.resnets.0.conv1.weight").detach()[:6]


@pytest.mark.parametrize("make", [lambda _: torch.randn(5, 40), lambda _: torch.rand(3, 7, 3, 3), embedded_weight])
def test_weight_search_equals_brute_force(make, embedded):
    weight = make(embedded)
    name, scales, error = brute_force_weight(weight, SIGNED4)
    found = search_weight(weight, SIGNED4)
    assert found.qparams.format.name == name
    assert torch.equal(found.qparams.scale.flatten(), scales)
    assert found.error.item() == pytest.approx(error / weight.double().square().sum().item(), rel=1e-5)


@pytest.mark.parametrize("shift", [0.0, 1.0])
def test_activation_search_equals_brute_force(shift):
    x = torch.nn.functional.silu(torch.randn(300) * 2 + shift)
    low, high = x.min().item(), x.max().item()
    best = (float("inf"),)
    for name in SIGNED4 + UNSIGNED4:
        fmt, ratios = FORMATS[name], _activation_ratios(x.device)
        for _ in range(2):
            tried = []
            for scale, k, index in zip(*_tensor_candidates(fmt, low, high, ratios), strict=True):
                zero_point = -k.item() * scale.item() * fmt.step
                error = squared_error(x, grid_of(name), scale.item(), zero_point)
                tried.append((error, name, scale.item(), index))
            best = min(best, min(tried)[:3])
            ratios = _refined(ratios, min(tried)[3])
    found = search_activation(x, SIGNED4 + UNSIGNED4)
    assert (found.qparams.format.name, found.qparams.scale.item()) == best[1:]
    assert found.error.item() == pytest.approx(best[0] / x.double().square().sum().item(), rel=1e-5)


def test_error_of_any_grid_is_exact():
    x = torch.randn(2, 500)
    levels = torch.randn(2, 3, 9, dtype=torch.float64).sort(-1).values
    errors = _SortedRows(x).error(levels)
    for row in range(2):
        for candidate in range(3):
            nearest = (x[row].double()[:, None] - levels[row, candidate]).square().min(1).values.sum()
            assert errors[row, candidate].item() == pytest.approx(nearest.item(), rel=1e-9)


def test_unsigned_wins_behind_silu_and_where_values_are_skewed():
    formats = SIGNED4 + UNSIGNED4
    silu = torch.nn.functional.silu(torch.randn(20000) * 2)
    mixed, signed = search_activation(silu, formats), search_activation(silu, SIGNED4)
    assert not mixed.qparams.format.signed
    assert mixed.qparams.zero_point < -0.15
    assert mixed.error < 0.4 * signed.error
    assert search_qparams(torch.randn(1000), formats).format.signed
    assert is_skewed(-0.2784, 5.0)
    assert not is_skewed(-3.1, 3.3)
    skewed = torch.rand(20000) * 1.4 - 0.4
    assert not search_qparams(skewed, formats).format.signed
    positive = search_qparams(torch.rand(1000), formats)
    assert not positive.format.signed


def test_zero_has_a_code_with_any_zero_point():
    qparams = search_qparams(torch.nn.functional.silu(torch.randn(5000)), UNSIGNED4 + SIGNED4)
    assert fake_quantize(torch.zeros(1), qparams).item() == 0.0


def test_degenerate_values_have_defined_results():
    for x in (torch.zeros(10), torch.zeros(0), torch.full((4,), 1e-42)):
        qparams = search_qparams(x, SIGNED4)
        assert torch.isfinite(fake_quantize(x, qparams)).all()
    constant = search_qparams(torch.full((5,), 3.0), SIGNED4)
    assert fake_quantize(torch.tensor(3.0), constant).item() == pytest.approx(3.0, rel=0.02)
    weight = torch.randn(3, 4)
    weight[1] = 0
    weight[2] = 1e-40
    qparams = search_qparams(weight, SIGNED4, per_channel=True)
    assert qparams.scale.shape == (3, 1)
    assert qparams.scale[1].item() == 1.0
    assert torch.isfinite(fake_quantize(weight, qparams)).all()
    huge = search_qparams(torch.tensor([3e38, -3e38]), SIGNED4)
    assert torch.isfinite(fake_quantize(torch.tensor([3e38]), huge)).all()
    assert search_weight(torch.zeros(0, 4), SIGNED4).qparams.scale.shape == (0, 1)


def test_bad_requests_are_refused():
    with pytest.raises(NonFiniteError, match="NaN"):
        search_qparams(torch.tensor([1.0, float("nan")]), SIGNED4)
    with pytest.raises(NonFiniteError, match="A weight must be finite, but got infinity"):
        search_weight(torch.tensor([[1.0, float("inf")]]), SIGNED4)
    with pytest.raises(ConfigError, match="need a signed format"):
        search_qparams(-torch.rand(50), UNSIGNED4)
    with pytest.raises(ConfigError, match="all of them signed"):
        search_weight(torch.randn(2, 2), UNSIGNED4)
    with pytest.raises(ShapeError, match="at least one axis"):
        search_qparams(torch.tensor(1.0), SIGNED4, per_channel=True)


def test_outliers_do_not_choose_the_range_and_are_no_part_of_the_sample():
    bulk = torch.randn(20000)
    alone = search_activation(bulk, SIGNED4)
    seen = search_activation(bulk, SIGNED4, bounds=(-3.0, 400.0))
    assert seen.error.item() == pytest.approx(alone.error.item(), rel=0.03)
    assert seen.qparams.scale.item() == pytest.approx(alone.qparams.scale.item(), rel=0.1)

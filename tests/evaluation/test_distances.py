"""Distances against their definitions, torchmetrics and known truth; what their intervals promise."""

import math

import pytest
import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore

from diffusers_msfp.evaluation.images.distances import (
    NEIGHBOURS,
    bootstrap,
    classifier_score,
    frechet_distance,
    frechet_estimate,
    mean_of,
    resamples_for,
    within_manifold,
)


def normal(rows: int, width: int = 6, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Rows(nn.Module):
    """Pictures are their own features."""

    num_features = 6

    def forward(self, images):
        return images.flatten(1)


def test_frechet_distance_of_known_moments():
    a = normal(50) @ normal(6, seed=1)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    shift = normal(1, seed=2)
    assert frechet_distance(a, a + shift) == pytest.approx(shift.square().sum().item(), rel=1e-9)
    centred = a - a.mean(0)
    assert frechet_distance(centred, 3 * centred) == pytest.approx(4 * a.T.cov().trace().item(), rel=1e-9)
    counts = torch.arange(50).double() % 3
    repeated = a.repeat_interleave(counts.long(), 0)
    assert frechet_distance(a, repeated) == pytest.approx(frechet_distance(a, a, None, counts), rel=1e-9)


def test_frechet_distance_and_score_against_torchmetrics():
    a, b = normal(40) @ normal(6, seed=1), 1 + normal(60, seed=2)
    metric = FrechetInceptionDistance(Rows(), normalize=True).set_dtype(torch.float64)
    metric.update(a.view(-1, 1, 2, 3), real=True)
    metric.update(b.view(-1, 1, 2, 3), real=False)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=1e-6)
    score = InceptionScore(Rows(), splits=1)
    score.update(a.view(-1, 1, 2, 3))
    assert classifier_score(a).value == pytest.approx(score.compute()[0].item(), rel=1e-6)


def test_classifier_score_of_extremes():
    assert classifier_score(torch.zeros(8, 5, dtype=torch.float64)).value == pytest.approx(1)
    sure = 1e3 * torch.eye(5, dtype=torch.float64).repeat(2, 1)
    assert classifier_score(sure).value == pytest.approx(5)


def test_manifold_against_its_definition():
    points, manifold = 0.3 + normal(31), normal(40, seed=1)
    own = (manifold[:, None] - manifold).norm(dim=-1)
    radii = own.sort(dim=1).values[:, NEIGHBOURS]
    expected = ((points[:, None] - manifold).norm(dim=-1) <= radii).any(1)
    assert 0 < expected.sum() < 31
    assert torch.equal(within_manifold(points, manifold), expected)
    assert within_manifold(manifold, manifold).all()
    assert not within_manifold(points + 100, manifold).any()


def test_the_interval_of_a_mean():
    values = normal(400, 1).flatten()
    found = mean_of(values)
    error = values.std().item() / math.sqrt(400)
    assert found.value == pytest.approx(values.mean().item())
    assert found.bias == 0
    assert found.low == pytest.approx(found.value - 1.96 * error, abs=0.4 * error)
    assert found.high == pytest.approx(found.value + 1.96 * error, abs=0.4 * error)
    assert mean_of(values) == found
    assert mean_of(values, seed=1) != found
    assert mean_of(torch.ones(9)).to_dict() == {"value": 1, "low": 1, "high": 1, "bias": 0}


def test_frechet_intervals_cover_the_figure_at_this_number_and_know_its_bias():
    pairs = [(normal(60, 4, seed=i), 0.5 + normal(60, 4, seed=100 + i)) for i in range(24)]
    truth = 4 * 0.25
    found = [frechet_estimate(a, b) for a, b in pairs]
    expected = sum(f.value for f in found) / len(found)
    assert expected > truth + 0.1, "the distance is biased upwards"
    assert sum(f.low <= expected <= f.high for f in found) >= 20
    corrected = sum(f.value - f.bias for f in found) / len(found)
    assert abs(corrected - truth) < 0.4 * (expected - truth)
    assert all(0 <= f.low <= f.value <= f.high for f in found)


def test_paired_sets_are_resampled_in_pairs():
    a = normal(60)
    noise = 0.01 * normal(60, seed=1)
    paired, apart = frechet_estimate(a, a + noise, paired=True), frechet_estimate(a, a + noise)
    assert paired.value == apart.value
    assert paired.high - paired.low < 0.1 * (apart.high - apart.low)
    assert frechet_estimate(a, a, paired=True).high < 1e-9


def test_wide_features_are_resampled_less_often():
    asked = []
    bootstrap(lambda counts: asked.append(counts.sum().item()) or 1.0, [7], biased=True, resamples=resamples_for(2048))
    assert asked == [7] * 51
    assert resamples_for(64) == 400

"""What is stored for a finite set of timesteps, and how calls find it."""

import copy
import pickle

import pytest
import torch

from diffusers_msfp.errors import CheckpointError, UnsupportedError
from diffusers_msfp.methods.temporal import FeatureTable, FiniteSet, TemporalPlan, finite_set_search, store_features
from diffusers_msfp.numerics import QParams, fake_quantize


def finite_set(*timesteps: float) -> FiniteSet:
    return FiniteSet(torch.tensor(timesteps, dtype=torch.float32))


@pytest.mark.parametrize("kind", [float, torch.tensor, lambda t: torch.tensor([t, t], dtype=torch.float64)])
@pytest.mark.parametrize(
    ("timestep", "entry", "exact"),
    [(0.0, 0, True), (0.25, 1, True), (0.2, 1, False), (-3.0, 0, False), (9.0, 2, False)],
)
def test_any_timestep_takes_the_nearest(kind, timestep, entry, exact):
    (found,) = finite_set(0.0, 0.25, 1.0).lookup(kind(timestep))
    assert (found.uniform, found.certainly) == (entry, exact)
    assert (int(found.index), bool(found.exact)) == (entry, exact)


def test_samples_of_a_batch_find_their_own():
    (found,) = finite_set(0, 500, 999).lookup(torch.tensor([999, 3, 500]))
    assert found.uniform is None
    assert found.certainly is None
    assert found.index.tolist() == [2, 0, 1]
    assert found.exact.tolist() == [True, False, True]
    (near,) = finite_set(0, 500).lookup(torch.tensor([0, 3]))  # one entry, but only one of them is exact
    assert (near.uniform, near.certainly) == (0, None)


def test_features_are_looked_up_and_the_rest_is_computed():
    known = finite_set(0, 500)
    table = FeatureTable(torch.tensor([[1.0, 2.0], [3.0, 4.0]]).half())
    calls = []

    def compute(x):
        calls.append(len(x))
        return torch.full((*x.shape[:-1], 2), 9.0)

    def recall(timestep, x):
        return table.recall(known.lookup(timestep)[0], x, compute).tolist()

    assert recall(500, torch.zeros(2, 5)) == [[3, 4]] * 2
    assert recall(torch.tensor([500, 0]), torch.zeros(4, 1, 5)) == [[[3, 4]]] * 2 + [[[1, 2]]] * 2
    assert calls == []
    assert recall(499, torch.zeros(2, 5)) == [[9, 9]] * 2
    assert recall(torch.tensor([0, 3]), torch.zeros(2, 5)) == [[1, 2], [9, 9]]
    assert calls == [2, 2]
    known.cached = False
    assert recall(500, torch.zeros(1, 5)) == [[9, 9]]
    known.cached = True
    with pytest.raises(UnsupportedError, match="multiple of as many rows, but got 3"):
        recall(torch.tensor([0, 500]), torch.zeros(3, 5))


def test_a_layer_alone_must_be_told_the_timestep():
    known = finite_set(0, 500)
    with pytest.raises(UnsupportedError, match=r"within `with model.temporal_set.at\(timestep\):`"):
        known.route()
    with known.at(500):
        assert known.route().uniform == 1


@pytest.mark.parametrize("again", [copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s)), lambda s: s.bfloat16()])
def test_copies_and_casts_keep_timesteps_exact(again):
    other = again(finite_set(0, 0.1, 999))
    assert torch.equal(other.timesteps, torch.tensor([0, 0.1, 999]))
    assert other.lookup(0.1)[0].certainly


@pytest.mark.parametrize(
    "bad",
    [
        torch.tensor([0.0, 0.0]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.0, torch.nan]),
        torch.tensor([0.0, torch.inf]),
        torch.tensor([0, 1]),
        torch.zeros(1, 1),
        torch.zeros(0),
    ],
)
def test_sets_that_no_calibration_wrote_are_refused(bad):
    with pytest.raises(CheckpointError, match="finite and ascending, float32 of shape .* damaged file"):
        FiniteSet(bad)


def test_features_that_no_network_gave_are_refused():
    with pytest.raises(CheckpointError, match=r"`a.recall.features` must be finite"):
        FeatureTable(torch.tensor([[torch.nan]])).check("a.recall")


def test_features_take_half_the_bytes_where_that_is_exact_enough():
    features = torch.randn(5, 30)
    assert store_features(features, 1e-3).dtype == torch.float16
    assert torch.equal(store_features(features * 1e-8, 1e-3), features * 1e-8)
    assert torch.equal(store_features(features * 1e6, 1e-3), features * 1e6)


def test_each_timestep_gets_the_parameters_that_fit_it():
    x = torch.nn.functional.silu(torch.randn(3, 2, 400) * torch.tensor([0.5, 2.0, 8.0])[:, None, None])
    default = QParams("fp4_ue2m2", 0.5, -0.25)
    scale, zero_point, error = finite_set_search(x, default)
    assert (scale.diff() > 0).all()
    fixed = (fake_quantize(x, default) - x).square().sum((1, 2))
    assert (error < fixed).all()
    entry = QParams("fp4_ue2m2", scale[2], zero_point[2])
    assert torch.allclose((fake_quantize(x[2], entry) - x[2]).square().sum(), error[2])


def test_an_unsigned_format_keeps_its_parameters_where_it_does_not_fit():
    x = torch.stack([torch.rand(50), -torch.rand(50)])
    scale, zero_point, _ = finite_set_search(x, QParams("fp4_ue2m2", 0.5, -0.25))
    assert (scale[1].item(), zero_point[1].item()) == (0.5, -0.25)
    assert scale[0] != 0.5


def plan(**changes) -> dict:
    return {"num_timesteps": 3, "block": ["a", "b"], "sets": ["a"], "cached": {"float16": ["b"]}} | changes


def test_a_plan_knows_its_layers():
    made = TemporalPlan.from_dict(plan())
    assert made.layers == ["a", "b"]
    assert TemporalPlan.from_dict(made.to_dict()) == made


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_timesteps": 0}, "`num_timesteps` must lie in 1"),
        ({"num_timesteps": True}, "`num_timesteps` must lie in 1"),
        ({"num_timesteps": 2**30}, "`num_timesteps` must lie in 1"),
        ({"cached": {"int8": ["b"]}}, "`cached` must map float16 or float32"),
        ({"cached": ["b"]}, "`cached` must map"),
        ({"cached": {"float16": ["c"]}}, "names others"),
        ({"sets": ["a", "a"]}, "different names"),
        ({"sets": "a"}, "different names"),
        ({"block": [1]}, "different names"),
        ({"more": 1}, "malformed"),
    ],
)
def test_plans_that_no_calibration_wrote_are_refused(changes, message):
    with pytest.raises(CheckpointError, match=message):
        TemporalPlan.from_dict(plan(**changes))

"""The observer's sample: bounded, uniform, deterministic, and able to go on."""

import copy

import pytest
import torch

from diffusers_msfp.calibration import Observation, observe
from diffusers_msfp.calibration.observer import CAPACITY, DRAWN_PER_CALL
from diffusers_msfp.errors import NonFiniteError


def test_memory_is_bounded_and_the_range_exact():
    observation = Observation()
    calls = CAPACITY // DRAWN_PER_CALL + 5
    for i in range(calls):
        observe(observation, torch.full((DRAWN_PER_CALL * 2,), float(i)), "a")
    assert observation.sample.shape == (CAPACITY,)
    assert int(observation.count) == calls * DRAWN_PER_CALL
    assert observation.range.tolist() == [0.0, calls - 1]
    counts = torch.bincount(observation.sample.long(), minlength=calls).float()
    expected = CAPACITY / calls
    assert ((counts - expected).abs() < 6 * expected**0.5).all()  # uniform over calls


def test_a_default_device_is_not_where_samples_lie():
    x, found = torch.randn(2 * CAPACITY), []
    for device in ("cpu", "meta"):
        with torch.device(device):
            found.append(Observation())
            for _ in range(CAPACITY // DRAWN_PER_CALL + 2):
                observe(found[-1], x, "a")
    assert torch.equal(found[0].sample, found[1].sample)
    assert torch.equal(found[0].range, found[1].range)


def test_small_inputs_are_kept_whole_and_empty_ones_ignored():
    observation = Observation()
    observe(observation, torch.zeros(0), "a")
    assert len(observation.drawn()) == 0
    observe(observation, torch.tensor([1.0, 2.0]), "a")
    assert observation.drawn().tolist() == [1.0, 2.0]
    assert observation.bounds() == (1.0, 2.0)


def test_same_data_same_sample_and_copies_go_on_alike():
    data = [torch.randn(50000, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    one, two = Observation(), Observation()
    for x in data:
        observe(one, x, "a")
    for x in data[:9]:
        observe(two, x, "a")
    resumed = copy.deepcopy(two)
    for x in data[9:]:
        observe(resumed, x, "a")
    assert torch.equal(one.sample, resumed.sample)


def test_non_finite_inputs_name_the_layer():
    with pytest.raises(NonFiniteError, match="The input of layer `mid.conv` must be finite, but got infinity"):
        observe(Observation(), torch.tensor([float("inf")]), "mid.conv")

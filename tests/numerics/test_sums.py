"""A weight with what an adapter adds, in 8 bits."""

import pytest
import torch

from diffusers_msfp import FORMATS
from diffusers_msfp.formats import INT8_MAX, largest_integer
from diffusers_msfp.numerics.sums import rounded_sum, sum_integers, sum_unit

FITTING = [fmt for fmt in FORMATS.values() if fmt.signed and fmt.lattice_max <= INT8_MAX]


@pytest.mark.parametrize("fmt", FITTING, ids=str)
@pytest.mark.parametrize("grouped", [False, True])
def test_a_weight_to_which_nothing_is_added_is_exact(fmt, grouped):
    largest = largest_integer(fmt, grouped=grouped)
    unit = torch.rand(7) + 0.01
    values = torch.randint(-largest, largest + 1, (7, 50))
    values[:, 0] = largest
    weight = values * unit[:, None]
    own = sum_unit(weight, unit, largest)
    integers = sum_integers(weight, own)
    assert torch.equal(integers, values.float() * round((unit / own).max().item()))
    assert integers.abs().max() <= INT8_MAX
    torch.testing.assert_close(rounded_sum(weight, unit, largest), weight, rtol=1e-6, atol=0)


@pytest.mark.parametrize("largest", [7, 12, 127, 245760])
def test_no_sum_is_clipped_and_none_moves_further_than_half_a_step(largest):
    unit = torch.rand(9) + 0.01
    total = torch.randn(9, 3, 5, 5) * (unit * largest)[:, None, None, None]
    own = sum_unit(total, unit, largest)
    steps = total / own[:, None, None, None]
    assert steps.abs().max() <= INT8_MAX * (1 + 1e-6)
    integers = sum_integers(total, own)
    assert integers.shape == total.shape
    assert (integers - steps).abs().max() <= 0.5 + 1e-4


def test_gradients_pass_through_the_rounding_and_change_no_value():
    total = torch.randn(4, 6, requires_grad=True)
    unit = torch.ones(4)
    rounded = rounded_sum(total, unit, 12)
    assert torch.equal(rounded, rounded_sum(total.detach(), unit, 12))
    grad = torch.randn(4, 6)
    rounded.backward(grad)
    assert torch.equal(total.grad, grad)


def test_nothing_is_rounded_to_nothing():
    assert rounded_sum(torch.zeros(3, 0), torch.ones(3), 12).shape == (3, 0)
    assert torch.equal(rounded_sum(torch.zeros(3, 2), torch.ones(3), 12), torch.zeros(3, 2))

"""Learned rounding of one weight: where it starts, where it can go, and that it ends on the grid."""

import pytest
import torch
from reference import grid_of

from diffusers_msfp import FORMATS, QParams, decode, encode, fake_quantize
from diffusers_msfp.errors import FormatError, NonFiniteError, ShapeError
from diffusers_msfp.methods.rounding import SoftRounding, annealed_exponent

SIGNED = [name for name in FORMATS if FORMATS[name].signed]
ONE = QParams("fp4_e2m1", 1.0)


def make(name: str, rows: int = 7) -> tuple[torch.Tensor, QParams]:
    """Weights with clipped ones, zeros and exact grid values among them, and a scale per row."""
    fmt = FORMATS[name]
    scale = torch.rand(rows, 1) + 0.01
    weight = torch.randn(rows, 300) * scale * fmt.max * torch.logspace(-4, 0.2, 300)
    weight[:, :4] = 0.0
    chosen = torch.tensor(grid_of(name))[torch.randint(len(fmt.grid), (rows, 20))]
    weight[:, 4:24] = chosen * scale
    return weight, QParams(name, scale)


@pytest.mark.parametrize("scale_aware", [True, False])
@pytest.mark.parametrize("name", SIGNED)
def test_it_starts_at_the_weight_and_ends_on_its_neighbours(name, scale_aware):
    weight, qparams = make(name)
    soft = SoftRounding(weight, qparams, scale_aware=scale_aware)
    saturated = weight.clamp(-qparams.maxval, qparams.maxval)
    assert ((soft() - saturated).abs() <= 2e-6 * (saturated.abs() + qparams.unit)).all()
    assert (weight != saturated).any()

    nearest = fake_quantize(weight, qparams)
    fraction = soft.fraction().detach()
    tie = (fraction - 0.5).abs() < 1e-5
    assert torch.equal(soft.hard()[~tie], nearest[~tie])
    assert tie.float().mean() < 0.3

    grid = torch.tensor(sorted(set(grid_of(name))), dtype=torch.float64)
    for direction in (-1.0, 1.0):
        with torch.no_grad():
            soft.logit.fill_(100.0 * direction)
        ends = soft.hard()
        torch.testing.assert_close(soft(), ends, rtol=0, atol=0)
        codes = encode(ends, qparams)
        assert torch.equal(decode(codes, qparams), ends + 0.0)
        assert torch.equal(encode(decode(codes, qparams), qparams), codes)
        assert torch.equal(ends[weight.abs() >= qparams.maxval], nearest[weight.abs() >= qparams.maxval])
        # The neighbour towards zero, or the next one away from it, found by looking through all grid values.
        position = (saturated.abs().double() / qparams.scale.double())[..., None] * (1 + 1e-7)
        below = torch.where(grid[grid >= 0] <= position, grid[grid >= 0], -1).amax(-1)
        above = torch.where(grid[grid >= 0] > position, grid[grid >= 0], torch.inf).amin(-1)
        above = torch.where(weight.abs() >= qparams.maxval * (1 - 1e-6), below, above)
        expected = (below if direction < 0 else above) * qparams.scale.double()
        torch.testing.assert_close(ends.abs().double(), expected, rtol=1e-6, atol=1e-12)


def test_clipped_weights_get_no_gradient_and_no_penalty():
    soft = SoftRounding(torch.tensor([7.0, -6.0, 2.4]), ONE)
    soft().square().sum().backward()
    assert soft.logit.grad[:2].tolist() == [0, 0]
    assert soft.logit.grad[2] > 0
    alone = SoftRounding(torch.tensor([2.4]), ONE)
    torch.testing.assert_close(soft.penalty(3.0), alone.penalty(3.0))


def test_scale_aware_gradients_do_not_grow_with_the_step():
    weight = torch.tensor([0.2, 2.4, 4.8])  # each at 0.4 between its neighbours, 0.5, 1 and 2 apart
    for scale_aware, ratios in ((True, [1, 1, 1]), (False, [1, 2, 4])):
        soft = SoftRounding(weight, ONE, scale_aware=scale_aware)
        soft().sum().backward()
        torch.testing.assert_close(soft.logit.grad / soft.logit.grad[0], torch.tensor(ratios, dtype=torch.float32))


def test_it_learns_what_nearest_rounding_misses():
    """With correlated inputs the best grid point is not the nearest: compared with trying all of them."""
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(256, 1, generator=generator) + 0.3 * torch.randn(256, 8, generator=generator)
    weight = torch.randn(1, 8, generator=generator)
    qparams = QParams("fp4_e2m1", 0.4)

    def loss(candidate):
        return ((candidate - weight) @ x.T).square().mean()

    soft = SoftRounding(weight, qparams)
    start = loss(soft.hard())
    optimizer = torch.optim.Adam(soft.parameters(), lr=0.05)
    for update in range(300):
        exponent = annealed_exponent(update / 300)
        value = loss(soft()) + (0.003 * soft.penalty(exponent) if exponent else 0)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    choices = ((torch.arange(256)[:, None] >> torch.arange(8)) & 1).float()
    best = min(loss((soft.floor + soft.step * choice) * soft.unit) for choice in choices)
    assert best < 0.5 * start
    assert loss(soft.hard()) < best + 0.2 * (start - best)


def test_the_penalty_is_zero_where_everything_is_decided():
    soft = SoftRounding(torch.tensor([0.25, 2.5]), ONE)
    assert soft.penalty(2.0).item() == pytest.approx(2, abs=1e-5)
    with torch.no_grad():
        soft.logit.copy_(torch.tensor([9.0, -9.0]))
    assert soft.penalty(2.0) == 0


def test_the_exponent_falls_after_the_warm_up():
    assert annealed_exponent(0) is None
    assert annealed_exponent(0.19) is None
    assert annealed_exponent(0.2) == 20
    assert annealed_exponent(0.6) == pytest.approx(11)
    assert annealed_exponent(1) == 2


def test_bad_input_is_refused():
    with pytest.raises(FormatError, match="needs a signed format, but got `fp4_ue2m2`"):
        SoftRounding(torch.ones(2), QParams("fp4_ue2m2", 1.0))
    with pytest.raises(NonFiniteError, match="A weight to round must be finite, but got NaN"):
        SoftRounding(torch.tensor([float("nan")]), ONE)
    with pytest.raises(ShapeError, match="broadcast"):
        SoftRounding(torch.ones(3, 2), QParams("fp4_e2m1", torch.ones(4, 1)))

"""encode, decode, fake_quantize: every code of every format against the oracle, and the laws they obey."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import grid_of, nearest

from diffusers_msfp import FORMATS, QParams, decode, encode, fake_quantize
from diffusers_msfp.errors import FormatError, MSFPError, NonFiniteError, ShapeError
from diffusers_msfp.numerics.rounding import zero_point_steps


def qparams_of(fmt, scale=1.0):
    """With a zero point where the format has one."""
    k = 0 if fmt.signed else fmt.magnitudes[2]
    return QParams(fmt, scale, -k * fmt.step * scale)


def borders(fmt) -> torch.Tensor:
    """Midpoints, their float neighbours, the values themselves, and far outside; at scale 1 before the zero point."""
    grid = torch.tensor(fmt.grid, dtype=torch.float64)
    middle = ((grid[1:] + grid[:-1]) / 2).float()
    x = torch.cat([grid.float(), middle])
    x = torch.cat([x, torch.nextafter(x, x + 1), torch.nextafter(x, x - 1), 2 * x[[0, -1]], torch.tensor([-0.0])])
    return x


@pytest.mark.parametrize("name", FORMATS)
def test_all_codes_round_trip(name):
    fmt = FORMATS[name]
    qparams = qparams_of(fmt)
    codes = torch.arange(2**fmt.bits, dtype=torch.uint8)
    values = decode(codes, qparams)
    again = encode(values, qparams)
    minus_zero = 2 ** (fmt.bits - 1) if fmt.signed else None
    expected = torch.where(codes == minus_zero, 0, codes) if fmt.signed else codes
    assert torch.equal(again, expected)
    shift = zero_point_steps(qparams) * fmt.step
    assert torch.equal(values, (torch.tensor(grid_of(name), dtype=torch.float32) - shift))


@pytest.mark.parametrize("name", FORMATS)
def test_nearest_value_as_the_oracle_finds_it(name):
    fmt = FORMATS[name]
    x = borders(fmt)
    y = fake_quantize(x, QParams(fmt, 1.0)).double()
    exact = nearest(x, grid_of(name))
    # on a tie both neighbours are equally near; elsewhere the value must be the oracle's
    assert torch.equal((y - x.double()).abs(), (exact - x.double()).abs())
    assert torch.equal(decode(encode(x, QParams(fmt, 1.0)), QParams(fmt, 1.0)), y.float())


@pytest.mark.parametrize("name", FORMATS)
def test_ties_go_to_the_even_multiple_of_the_local_step(name):
    fmt = FORMATS[name]
    magnitudes = fmt.magnitudes
    for low, high in zip(magnitudes, magnitudes[1:], strict=False):
        if (high - low) % 2 and high - low > 1:
            continue
        tie = (low + high) / 2
        step = high - low
        even = low if (low // step) % 2 == 0 else high
        assert fake_quantize(torch.tensor(tie * fmt.step), QParams(fmt, 1.0)).item() == even * fmt.step


@pytest.mark.parametrize("name", FORMATS)
def test_laws(name):
    fmt = FORMATS[name]
    qparams = qparams_of(fmt, 0.37)
    x = torch.linspace(-1.2, 1.2, 4001) * float(qparams.maxval)
    y = fake_quantize(x, qparams)
    assert torch.equal(fake_quantize(y, qparams), y)  # idempotent
    assert (y.diff() >= 0).all()  # monotone
    if fmt.signed:
        assert torch.equal(fake_quantize(-x, qparams), -y)
    for power in (2.0**-20, 2.0**30):
        scaled = QParams(fmt, qparams.scale * power, qparams.zero_point * power)
        assert torch.equal(fake_quantize(x * power, scaled), y * power)
    zero = fake_quantize(torch.tensor([0.0, -0.0]), qparams)
    assert torch.equal(zero, torch.zeros(2))
    assert not torch.signbit(zero).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_shape_and_dtype_are_kept(dtype):
    x = torch.randn(2, 3, 4, 5).to(dtype)
    qparams = QParams("fp4_e2m1", torch.rand(3, 1, 1) + 0.1)
    y = fake_quantize(x, qparams)
    assert y.shape == x.shape
    assert y.dtype == dtype
    assert torch.equal(y, fake_quantize(x.float(), qparams).to(dtype))
    codes = encode(x, qparams)
    assert codes.shape == x.shape
    assert codes.dtype == torch.uint8
    assert torch.equal(decode(codes, qparams, dtype), y)


def test_float16_does_not_overflow():
    assert fake_quantize(torch.tensor(65504.0, dtype=torch.float16), QParams("fp4_e2m1", 20000.0)).isfinite()


def test_empty_tensors_and_tiny_scales():
    for shape in ((0,), (0, 3), (2, 0)):
        assert fake_quantize(torch.zeros(shape), QParams("fp4_e2m1", 1.0)).shape == shape
        assert encode(torch.zeros(shape), QParams("fp4_e2m1", 1.0)).shape == shape
    tiny = torch.finfo(torch.float32).tiny
    assert torch.isfinite(fake_quantize(torch.tensor([1.0, -1.0, tiny]), QParams("fp4_e2m1", tiny / 64))).all()


def test_straight_through_gradients():
    x = torch.tensor([0.3, -0.6, 9.0, -9.0, 2.2], requires_grad=True)
    scale = torch.tensor(0.5, requires_grad=True)
    fake_quantize(x, QParams("fp4_e2m1", scale)).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0, 1]
    y = fake_quantize(x.detach(), QParams("fp4_e2m1", 0.5))
    inside = (y - x.detach())[[0, 1, 4]] / 0.5
    assert scale.grad.item() == pytest.approx(inside.sum().item() + 6 - 6, abs=1e-6)

    x = torch.tensor([-0.2, 0.4, 99.0, -99.0], requires_grad=True)
    zero_point = torch.tensor(-0.25, requires_grad=True)
    fake_quantize(x, QParams("fp4_ue2m2", torch.tensor(1.0), zero_point)).sum().backward()
    assert x.grad.tolist() == [1, 1, 0, 0]
    assert zero_point.grad.item() == 2  # both saturated values move with it


def test_scale_gradient_equals_the_finite_difference_of_the_saturated_part():
    x = torch.tensor([50.0, -50.0, 70.0])
    scale = torch.tensor(1.5, requires_grad=True)
    fake_quantize(x, QParams("fp6_e2m3", scale)).sum().backward()
    step = 0.25
    difference = fake_quantize(x, QParams("fp6_e2m3", 1.5 + step)) - fake_quantize(x, QParams("fp6_e2m3", 1.5 - step))
    assert scale.grad.item() == pytest.approx(difference.sum().item() / (2 * step))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_non_finite_values_are_refused(value):
    with pytest.raises(NonFiniteError, match="Values to encode must be finite"):
        encode(torch.tensor([0.0, value]), QParams("fp4_e2m1", 1.0))
    with pytest.raises(NonFiniteError, match="A scale must be finite"):
        QParams("fp4_e2m1", value)


def test_qparams_refuse_nonsense():
    for scale in (0.0, -1.0, 1e-60):
        with pytest.raises(NonFiniteError, match="finite and > 0"):
            QParams("fp4_e2m1", scale)
    with pytest.raises(FormatError, match="no zero point"):
        QParams("fp4_e2m1", 1.0, -0.5)
    with pytest.raises(FormatError, match="≤ 0"):
        QParams("fp4_ue2m2", 1.0, 0.5)
    with pytest.raises(NonFiniteError, match="zero point must be finite"):
        QParams("fp4_ue2m2", 1.0, float("nan"))
    with pytest.raises(ShapeError, match="must broadcast"):
        QParams("fp4_ue2m2", torch.ones(3), -torch.ones(2))
    with pytest.raises(ShapeError, match="must broadcast to the tensor"):
        fake_quantize(torch.ones(4), QParams("fp4_e2m1", torch.ones(3)))
    with pytest.raises(ShapeError, match="must broadcast to the tensor"):
        encode(torch.ones(4), QParams("fp4_e2m1", torch.ones(3, 4)))


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(list(FORMATS)),
    st.lists(st.floats(-(2.0**100), 2.0**100, width=32), min_size=1, max_size=20),
    st.floats(2.0**-60, 2.0**60, width=32),
)
def test_any_values_any_scale(name, values, scale):
    fmt = FORMATS[name]
    x = torch.tensor(values, dtype=torch.float32)
    try:
        qparams = qparams_of(fmt, scale)
    except MSFPError:
        return
    codes = encode(x, qparams)
    y = decode(codes, qparams)
    assert int(codes.max()) < 2**fmt.bits
    assert torch.equal(y, fake_quantize(x, qparams))
    assert torch.equal(encode(y, qparams), codes)

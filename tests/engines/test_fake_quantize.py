"""The fused fake quantization against the definition: values bit for bit, gradients up to the order of sums."""

import pytest
import torch

from diffusers_msfp import FORMATS, QParams, numerics
from diffusers_msfp.engines import training


def gradients(function, x: torch.Tensor, fmt, scale: torch.Tensor, zero_point: torch.Tensor):
    inputs = [each.clone().requires_grad_() for each in (x, scale, zero_point)]
    values = function(inputs[0], QParams.unchecked(fmt, *inputs[1:]))
    wanted = torch.randn(values.shape, generator=torch.Generator().manual_seed(3))
    values.backward(wanted.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else wanted)
    return values.detach(), [each.grad for each in inputs]


@pytest.mark.parametrize("name", ["fp4_e2m1", "fp4_ue1m3", "fp4_e3m0", "fp8_e1m6", "fp8_ue1m7", "fp6_e2m3"])
@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 5, 7),
        torch.randn(4, 40001),
        torch.randn(2, 8, 5, 5).contiguous(memory_format=torch.channels_last),
    ],
    ids=["small", "large", "channels last"],
)
def test_one_scale_for_all(name, x):
    fmt = FORMATS[name]
    scale = torch.tensor(0.9 / fmt.max)
    zero_point = torch.tensor(0.0 if fmt.signed else -3.0 * fmt.step * 0.9 / fmt.max)
    expected, (dx, dscale, dzero) = gradients(numerics.fake_quantize, x, fmt, scale, zero_point)
    values, own = gradients(training.fake_quantize, x, fmt, scale, zero_point)
    assert torch.equal(values, expected)
    assert torch.equal(own[0], dx)
    assert torch.allclose(own[1], dscale, rtol=1e-4, atol=1e-3)
    assert own[2] is None and dzero is None if fmt.signed else torch.allclose(own[2], dzero, rtol=1e-4, atol=1e-3)


def test_a_scale_for_each_row():
    fmt, x = FORMATS["fp4_e2m1"], torch.randn(6, 20011)
    scale = torch.rand(6, 1) + 0.1
    expected, (dx, dscale, _) = gradients(numerics.fake_quantize, x, fmt, scale, torch.zeros(6, 1))
    values, own = gradients(training.fake_quantize, x, fmt, scale, torch.zeros(6, 1))
    assert torch.equal(values, expected)
    assert torch.equal(own[0], dx)
    assert torch.allclose(own[1], dscale, rtol=1e-4, atol=1e-3)


def test_what_it_cannot_fuse_is_the_definitions(monkeypatch):
    qparams = QParams("fp4_e2m1", torch.tensor(0.3))
    half, odd = torch.randn(8).bfloat16(), torch.randn(6, 6).T[::2]
    for x in (half, odd, torch.zeros(0)):
        assert torch.equal(training.fake_quantize(x, qparams), numerics.fake_quantize(x, qparams))
    monkeypatch.setattr(training, "numba_training", None)
    x = torch.randn(9)
    assert torch.equal(training.fake_quantize(x, qparams), numerics.fake_quantize(x, qparams))

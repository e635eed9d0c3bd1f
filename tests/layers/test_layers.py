"""Quantized layers against their definition, computed by the oracle, and as objects."""

import copy
import io
import pickle

import pytest
import torch
from reference import grid_of, nearest
from torch import nn

from diffusers_msfp.errors import NonFiniteError, UnsupportedError
from diffusers_msfp.layers import QUANT_LAYERS, QuantLayer, QuantLinear
from diffusers_msfp.layers.split import SPLIT_LAYERS
from diffusers_msfp.methods.rounding import SoftRounding
from diffusers_msfp.schemes import SCHEMES, LayerScheme

SHAPES = {
    "linear": (nn.Linear(7, 5), (3, 7)),
    "linear without bias": (nn.Linear(7, 5, bias=False), (2, 3, 7)),
    "pointwise": (nn.Conv2d(5, 3, 1), (2, 5, 4, 4)),
    "3x3": (nn.Conv2d(4, 6, 3, padding=1), (1, 4, 5, 5)),
    "strided, dilated": (nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2), (2, 3, 9, 7)),
    "grouped": (nn.Conv2d(6, 4, 3, groups=2, padding=1), (2, 6, 5, 5)),
    "depthwise": (nn.Conv2d(4, 4, 3, groups=4), (2, 4, 5, 5)),
    "reflect": (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), (1, 3, 6, 6)),
    "circular": (nn.Conv2d(3, 4, (1, 3), padding=(0, 1), padding_mode="circular"), (1, 3, 6, 6)),
    "same": (nn.Conv2d(3, 4, (2, 3), padding="same"), (1, 3, 6, 6)),
    "1d": (nn.Conv1d(3, 4, 3, padding=1), (2, 3, 9)),
    "empty batch": (nn.Conv2d(3, 4, 3), (0, 3, 6, 6)),
}
CASES = pytest.mark.parametrize(("module", "shape"), SHAPES.values(), ids=SHAPES)


def quantized(module: nn.Module, x: torch.Tensor, scheme: str = "w4a4") -> QuantLayer:
    layer = QUANT_LAYERS[type(module)].from_float(module, "place", SCHEMES[scheme].inner)
    layer(x if x.numel() else torch.randn(1, *x.shape[1:]))
    layer.freeze()
    return layer


def oracle(layer: QuantLayer, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64 from stored scales and the original's weight."""
    weight = module.weight.detach()
    scale = layer.weight_scale.double().view(-1, *[1] * (weight.ndim - 1))
    rounded = nearest(weight.double() / scale, grid_of(layer.weight_format.name)) * scale
    s, z = layer.input_scale.double(), layer.input_zero_point.double()
    inputs = nearest((x.double() - z) / s, grid_of(layer.input_format.name)) * s + z
    twin = copy.deepcopy(module).double()
    twin.weight.data = rounded
    with torch.no_grad():
        return twin(inputs)


@CASES
@pytest.mark.parametrize("activation", [nn.Identity(), nn.SiLU()], ids=["normal", "anomalous"])
def test_computes_what_the_oracle_computes(module, shape, activation):
    x = activation(torch.randn(shape) * 2)
    layer = quantized(module, x)
    expected = oracle(layer, module, x)
    actual = layer(x)
    assert actual.shape == expected.shape
    assert torch.allclose(actual.double(), expected, rtol=1e-5, atol=1e-5)


@CASES
def test_state_is_packed_and_survives_copies(module, shape):
    x = torch.randn(shape)
    layer = quantized(module, x)
    rows, length = layer.matrix_shape
    assert layer.packed_weight.dtype == torch.uint8
    assert layer.packed_weight.numel() == rows * ((length + 1) // 2)
    assert layer.packed_weight.ndim == max(3, module.weight.ndim)
    assert not layer.packed_weight.requires_grad
    assert layer.weight.shape == module.weight.shape
    assert layer.weight.dtype == module.weight.dtype
    y = layer(x)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), torch.load(buffer, weights_only=False)):
        assert type(twin) is type(layer)
        assert torch.equal(twin(x), y)


@CASES
def test_back_to_float(module, shape):
    layer = quantized(module, torch.randn(shape))
    back = layer.to_float(torch.float32)
    assert type(back) is type(module)
    assert torch.equal(back.weight, layer.dequantize_weight())
    assert vars(back).keys() == vars(module).keys()
    assert back(torch.randn(shape)).shape == module(torch.randn(shape)).shape


@pytest.mark.parametrize("cls", [*QUANT_LAYERS.values(), *SPLIT_LAYERS.values()])
def test_the_constructor_makes_no_other_layer(cls):
    refusal = f"A {cls.__name__} must be made of a float layer.* use `{cls.float_class.__name__}` for a float layer"
    for sizes, more in (((3, 4, 1), {"bias": False}), ((), {"in_features": 3, "out_features": 4})):
        with pytest.raises(UnsupportedError, match=refusal):
            cls(*sizes, **more)


def test_observing_leaves_the_input_float():
    module, x = nn.Linear(8, 4), torch.randn(5, 8)
    layer = QuantLinear.from_float(module, "place", SCHEMES["w4a4"].inner)
    assert layer.observing
    expected = nn.functional.linear(x, layer.dequantize_weight(), module.bias)
    assert torch.equal(layer(x), expected)
    assert int(layer.observation.count) == x.numel()
    assert layer.freeze()
    assert not layer.observing
    assert not torch.equal(layer(x), expected)


def test_a_layer_that_saw_nothing_keeps_a_float_input():
    layer = QuantLinear.from_float(nn.Linear(4, 2), "place", SCHEMES["w4a4"].inner)
    assert not layer.freeze()
    assert layer.input_format is None
    assert set(layer.state_dict()) == {"packed_weight", "bias", "weight_scale", "weight_error", "formats"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_keeps_scales_exact(dtype):
    layer = quantized(nn.Linear(8, 4), torch.randn(5, 8))
    before = {name: tensor.clone() for name, tensor in layer.exact_tensors()}
    layer.to(dtype)
    assert layer.bias.dtype == dtype
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.exact_tensors())
    assert layer(torch.randn(5, 8).to(dtype)).dtype == dtype


def test_gradients_reach_input_and_bias_only():
    layer = quantized(nn.Conv2d(3, 4, 3), torch.randn(1, 3, 5, 5))
    x = torch.randn(1, 3, 5, 5, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert layer.bias.grad is not None
    assert layer.packed_weight.grad is None


def test_non_finite_values_name_the_layer():
    module = nn.Linear(4, 2)
    layer = quantized(module, torch.randn(3, 4))
    with pytest.raises(NonFiniteError, match="The input of layer `module_name` must be finite, but got NaN"):
        layer(torch.full((1, 4), float("nan")))
    module.weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match="The weight of layer `deep.place` must be finite, but got infinity"):
        QuantLinear.from_float(module, "deep.place", LayerScheme(("fp4_e2m1",)))


def test_other_grid_values_are_stored_as_they_are():
    """What learned rounding does: another neighbour for some weights, with the error measured against the original."""
    module = nn.Conv2d(4, 6, 3)
    layer = QUANT_LAYERS[nn.Conv2d].from_float(module, "place", SCHEMES["w4a16"].inner)
    scale, original = layer.weight_scale.clone(), module.weight.detach()
    qparams = layer.weight_qparams()
    soft = SoftRounding(original.flatten(1), qparams)
    with torch.no_grad():
        soft.logit.neg_()
    chosen = soft.hard().view_as(original)
    assert not torch.equal(chosen, layer.dequantize_weight())
    layer.store_banks([chosen], original)
    assert torch.equal(layer.dequantize_weight(), chosen)
    assert torch.equal(layer.weight_scale, scale)
    expected = (chosen - original).square().sum() / original.square().sum()
    torch.testing.assert_close(layer.weight_error, expected)

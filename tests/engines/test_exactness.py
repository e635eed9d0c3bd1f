"""Engines against the reference, layer by layer, on equal inputs."""

from dataclasses import replace

import pytest
import torch
from cases import LAYERS, assert_close, quantized
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_msfp.engines import ENGINES, bf16
from diffusers_msfp.engines.engine import weight_unit
from diffusers_msfp.engines.int8 import Int8Engine, products_are_exact
from diffusers_msfp.engines.integers import products
from diffusers_msfp.errors import NonFiniteError
from diffusers_msfp.numerics.rounding import quantize_to_lattice
from diffusers_msfp.schemes import SCHEMES

GROUPED = ("w4g16a4", "w4g32a8", "w4g64a16")
ROUNDED_TWICE = 8e-3  # relative: two roundings to bfloat16, and a bias that may cancel


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "silu"])
@pytest.mark.parametrize("scheme", [*(name for name in SCHEMES if "g" not in name[:3]), *GROUPED])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_every_engine_equals_the_reference(name, scheme, signed):
    module, shape = LAYERS[name]
    layer, x = quantized(module, scheme, shape, signed)
    expected, rounded = layer(x), layer(x.bfloat16())
    for engine in (ENGINES[name](memory) for name in ENGINES for memory in ("fast", "low")):
        if engine.refusal(layer) is None:
            layer.use_engine(engine)
            assert_close(layer(x), expected, 1e-5)
            assert_close(layer(x), expected, 1e-5)  # with what the first call has made
            assert_close(layer(x.bfloat16()), rounded, ROUNDED_TWICE)


def test_a_default_device_is_not_asked_for_products():
    products.products_are_exact.cache_clear()
    products._zeros.cache_clear()
    with torch.device("meta"):
        assert products_are_exact(15, 7)
    assert products._zeros(16).device.type == "cpu"


@torch.no_grad()
def test_int8_serves_all_four_bit_layers():
    for module, shape in LAYERS.values():
        for signed in (True, False):
            layer, _ = quantized(module, "w4a4", shape, signed)
            assert Int8Engine().refusal(layer) is None


@pytest.mark.parametrize("scheme", ["w4a4", "w4g16a4", "w4g32a8"])
@pytest.mark.parametrize("name", ["conv", "dilated-groups", "linear"])
@torch.no_grad()
def test_sums_equal_an_integer_oracle(name, scheme):
    module, shape = LAYERS[name]
    layer, x = quantized(module, scheme, shape, signed=False)
    if Int8Engine().refusal(layer) is not None:
        assert scheme == "w4g32a8"  # on processors that add pairs of products in 16 bits
        return
    layer.bias = None
    q, k = quantize_to_lattice(x, layer.input_qparams())
    weight = layer.dequantize_weight()
    weight = weight / weight_unit(layer).view(-1, *[1] * (weight.ndim - 1))
    assert weight.round().abs().max() <= layer.largest_weight <= 127
    exact = layer.compute((q - k).double(), weight.round().double(), None)
    layer.use_engine(Int8Engine())
    layer(x)
    layer.weight_scale.fill_(1 / layer.weight_format.step)
    layer.prepare()
    unit_grid = replace(layer.prepared.grid(), unit=1.0)
    layer.prepared._grids[next(iter(layer.prepared._grids))] = unit_grid
    assert torch.equal(layer(x).double(), exact)


@given(
    channels=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    size=st.tuples(st.integers(3, 12), st.integers(3, 12)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.integers(1, 3),
    padding=st.integers(0, 2),
    batch=st.integers(1, 3),
    signed=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(max_examples=25, deadline=None)
@torch.no_grad()
def test_random_convolutions(channels, size, kernel, stride, padding, batch, signed, seed):
    torch.manual_seed(seed)
    module = nn.Conv2d(*channels, kernel, stride=stride, padding=padding)
    layer, x = quantized(module, "w4a4", (batch, channels[0], *size), signed)
    expected = layer(x)
    layer.use_engine(Int8Engine())
    assert_close(layer(x), expected, 1e-5)


@torch.no_grad()
def test_a_layer_takes_any_size_after_the_first():
    layer, _ = quantized(nn.Conv2d(8, 8, 3, padding=1), "w4a4", (1, 8, 6, 6), signed=False)
    inputs = [torch.randn(b, 8, h, w) for b, h, w in ((1, 6, 6), (3, 6, 6), (2, 17, 5), (1, 6, 6))]
    expected = [layer(x) for x in inputs]
    layer.use_engine(Int8Engine())
    for x, y in zip(inputs, expected, strict=True):
        assert_close(layer(x), y, 1e-5)


@pytest.mark.parametrize("name", ["int8", "bf16"])
@pytest.mark.parametrize("kind", ["conv", "linear"])
def test_gradients_flow_as_in_the_reference(name, kind):
    module, shape = LAYERS[kind]
    layer, x = quantized(module, "w4a4", shape, signed=True)
    gradients = []
    for engine in (None, ENGINES[name]()):
        layer.use_engine(engine)
        leaf = x.clone().requires_grad_(True)
        layer(leaf).square().sum().backward()
        gradients.append(leaf.grad)
    assert gradients[0].abs().sum() > 0
    assert_close(gradients[1], gradients[0], 1e-5)


@pytest.mark.parametrize("name", ["int8", "bf16"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@torch.no_grad()
def test_infinite_inputs_are_refused_by_name(name, bad):
    layer, x = quantized(nn.Linear(8, 4), "w4a4", (2, 8), signed=True)
    layer.use_engine(ENGINES[name]())
    x[1, 3] = bad
    with pytest.raises(NonFiniteError, match="input of layer `place` must be finite"):
        layer(x)


@torch.no_grad()
def test_what_changes_a_layer_makes_it_ready_anew():
    layer, x = quantized(nn.Linear(8, 4), "w4a4", (2, 8), signed=True)
    layer.use_engine(Int8Engine())
    layer(x)
    layer.store_input(layer.input_scale * 2, layer.input_zero_point)
    y = layer(x)
    layer.use_engine(None)
    assert_close(y, layer(x), 1e-5)


def test_products_too_large_for_a_processor_are_found_by_asking_it(monkeypatch):
    assert products_are_exact(192, 64)
    layer, _ = quantized(nn.Linear(8, 4), "w4a4", (2, 8), signed=True)
    monkeypatch.setattr("diffusers_msfp.engines.int8.products_are_exact", lambda *_: False)
    assert "16 bits" in Int8Engine().refusal(layer)


@pytest.mark.parametrize("scheme", ["w8a8", "w4a16"])
@pytest.mark.parametrize("able", [True, False], ids=["bf16", "no-bf16"])
@torch.no_grad()
def test_processors_without_bfloat16_are_given_none_to_multiply(scheme, able, monkeypatch):
    layer, x = quantized(*LAYERS["conv"][:1], scheme, LAYERS["conv"][1], signed=True)
    x, expected, multiplied = x.bfloat16(), layer(x.bfloat16()), []
    monkeypatch.setattr(bf16, "has_bf16_instructions", lambda: able)
    layer.use_engine(ENGINES["bf16"]())
    compute = layer.compute
    monkeypatch.setattr(
        layer, "compute", lambda *call: multiplied.append([t.dtype for t in call[:2]]) or compute(*call)
    )
    y = layer(x)
    assert multiplied == [[torch.bfloat16 if able else torch.float32] * 2]
    assert y.dtype == torch.bfloat16
    assert_close(y, expected, ROUNDED_TWICE)


@torch.no_grad()
def test_low_memory_keeps_nothing_expanded():
    layer, x = quantized(nn.Linear(8, 4), "w4a4", (2, 8), signed=True)
    for memory, kept in (("fast", 1), ("low", 0)):
        layer.use_engine(Int8Engine(memory))
        layer(x)
        assert len(layer.prepared._weights) == kept

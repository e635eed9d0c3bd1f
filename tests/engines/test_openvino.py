"""OpenVINO's graphs against the reference: each layer on equal inputs, and rounding value by value."""

import pytest
import torch
from cases import LAYERS, assert_close, quantized

from diffusers_msfp.engines.grid import pairs_fit_16_bits
from diffusers_msfp.engines.integers.products import products_are_exact as int8_products_are_exact
from diffusers_msfp.engines.openvino import layers as graph_layers
from diffusers_msfp.engines.openvino.choices import Choice
from diffusers_msfp.engines.openvino.installed import products_are_exact
from diffusers_msfp.engines.openvino.layers import Inputs, graph_layer, runs_in_bytes, why_not
from diffusers_msfp.engines.openvino.rounding import round_in_graph
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.formats import FORMATS
from diffusers_msfp.numerics.rounding import lattice_range, round_to_lattice

ONCE = 4e-3  # relative: rounded to bfloat16


@pytest.fixture(autouse=True)
def _drawn_alike():
    torch.manual_seed(0)


TRACED = pytest.mark.filterwarnings("ignore:.*trace.*", "ignore::DeprecationWarning", "ignore::UserWarning")
BYTE_SCHEMES = ("w4a4", "w4a8", "w8a8", "w4g16a8")


def edges(fmt) -> torch.Tensor:
    """Values of a format's range: random ones, ties, powers of two, and what lies right beside these."""
    low, high = lattice_range(fmt)
    lattice = torch.tensor(fmt.lattice, dtype=torch.float64)
    exact = torch.cat([lattice, (lattice[1:] + lattice[:-1]) / 2]).to(torch.float32)
    ulps = torch.arange(-300, 301) * 2.0**-23
    powers = (2.0 ** torch.arange(-2, 33)[:, None] * (1 + ulps)).flatten()
    y = torch.cat([torch.rand(200_000) * (high - low) + low, torch.randn(100_000) * 2, exact, powers, -powers])
    near = [torch.nextafter(exact, torch.full_like(exact, sign * 1e30)) for sign in (-1, 1)]
    return torch.cat([y, *near]).clamp(low, high)


@pytest.mark.parametrize("name", FORMATS)
def test_rounding_is_the_definition_for_every_value(name):
    fmt = FORMATS[name]
    y = edges(fmt)
    assert torch.equal(round_in_graph(y, fmt), round_to_lattice(y, fmt))


def run_as_graph(layer, x: torch.Tensor, precision: str) -> tuple[torch.Tensor, list[str]]:
    """A layer's output by OpenVINO, and the kernels that multiplied."""
    openvino = pytest.importorskip("openvino")
    from diffusers_msfp.compat.openvino import graph_of
    from diffusers_msfp.engines.openvino.installed import settings

    inputs = Inputs()
    made = graph_layer(layer, Choice(), inputs).eval()
    traced = torch.jit.trace(made, x, check_trace=False)
    graph = graph_of(traced, [x])
    compiled = openvino.Core().compile_model(graph, "CPU", settings(precision) | {"PERF_COUNT": True})
    request = compiled.create_infer_request()
    request.infer([x.numpy()])
    kernels = [each.exec_type for each in request.get_profiling_info() if each.node_type in MULTIPLYING]
    return torch.from_numpy(request.get_output_tensor(0).data.copy()), kernels


@TRACED
@pytest.mark.parametrize("precision", ["f32", "bf16"])
@pytest.mark.parametrize(
    "name", ["fp4_e1m2", "fp4_e2m1", "fp4_ue1m3", "fp4_ue2m2", "fp4_ue3m1", "fp6_ue2m4", "fp8_ue1m7"]
)
@torch.no_grad()
def test_codes_are_the_references_right_beside_ties(name, precision):
    """Where a product that is not rounded before the next operation gives another code."""
    fmt = FORMATS[name]
    layer, _ = quantized(torch.nn.Linear(64, 64, bias=False), "w8a8", (4, 64), signed=True)
    lattice = torch.tensor(fmt.lattice, dtype=torch.float64)
    layer.input_format, layer.weight_format = fmt, FORMATS["fp8_e1m6"]
    for scale in torch.rand(3).add(0.5).tolist():
        layer.input_scale.fill_(scale)
        layer.input_zero_point.fill_(0.0 if fmt.signed else -lattice[3].item() * scale * fmt.step)
        layer.weight_scale.fill_(1.0 / fmt.step)
        layer.store_banks([torch.eye(64) / fmt.step * FORMATS["fp8_e1m6"].step])
        middle = ((lattice[1:] + lattice[:-1]) / 2 - (0 if fmt.signed else lattice[3])) * scale * fmt.step
        x = (middle[:, None] * (1 + torch.arange(-8, 9) * 2.0**-24)).flatten().float()
        x = torch.cat([x, x.bfloat16().float(), torch.randn(64) * 9])
        x = x.repeat(2)[: len(x) // 64 * 64 + 64].view(-1, 64)
        y, _ = run_as_graph(layer, x, precision)
        wanted = layer(x)
        assert (y - wanted).abs().max() <= 0.01 * layer.input_qparams().unit * layer.weight_qparams().unit.max()


MULTIPLYING = ("Convolution", "FullyConnected", "FullyConnectedQuantizedLegacy", "MatMul")


@TRACED
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "silu"])
@pytest.mark.parametrize("scheme", BYTE_SCHEMES)
@pytest.mark.parametrize("name", [name for name, (_, shape) in LAYERS.items() if min(shape) and name != "row"])
@torch.no_grad()
def test_layers_multiply_bytes_and_equal_the_reference(name, scheme, signed):
    module, shape = LAYERS[name]
    layer, x = quantized(module, scheme, shape, signed)
    fits = pairs_fit_16_bits(layer.input_format, layer.largest_weight)
    assert fits == (scheme in ("w4a4", "w4a8"))
    assert runs_in_bytes(layer) == (fits or products_are_exact(255, 127))
    y, kernels = run_as_graph(layer, x, "f32")
    assert_close(y, layer(x), 1e-5)
    assert kernels or getattr(module, "groups", 1) > 1, "of few channels in a group OpenVINO makes a kernel of its own"
    assert all(kernel.lower().endswith("i8") for kernel in kernels) == runs_in_bytes(layer) or not kernels
    x = x.bfloat16().float()
    y, kernels = run_as_graph(layer, x, "bf16")
    assert_close(y, layer(x), ONCE)  # the codes are the same: only the output is rounded
    assert all(kernel.lower().endswith("i8") for kernel in kernels) == runs_in_bytes(layer) or not kernels


@TRACED
@pytest.mark.parametrize("name", ["conv", "dilated-groups", "linear"])
@torch.no_grad()
def test_what_a_processor_would_not_add_exactly_runs_as_floats(name, monkeypatch):
    monkeypatch.setattr(graph_layers, "products_are_exact", lambda *_: False)
    for scheme, in_bytes in (("w8a8", False), ("w4a8", True)):
        layer, x = quantized(*LAYERS[name][:1], scheme, LAYERS[name][1], signed=True)
        assert runs_in_bytes(layer) == in_bytes
        y, _ = run_as_graph(layer, x, "f32")
        assert_close(y, layer(x), 1e-5)


def test_openvino_is_asked_what_it_adds_exactly():
    pytest.importorskip("openvino")
    assert products_are_exact(255, 64), "pairs of these fit 16 bits"
    assert products_are_exact(255, 127) == int8_products_are_exact(255, 127), "the same instructions serve torch"


@TRACED
@pytest.mark.parametrize("signed", [True, False], ids=["signed", "silu"])
@pytest.mark.parametrize("name", ["conv", "linear", "circular"])
@torch.no_grad()
def test_wide_formats_run_as_floats(name, signed):
    module, shape = LAYERS[name]
    layer, x = quantized(module, "w8a8-wide", shape, signed)
    y, _ = run_as_graph(layer, x, "f32")
    assert_close(y, layer(x), 1e-5)
    if not runs_in_bytes(layer) and why_not(layer, torch.bfloat16) is None:
        y, _ = run_as_graph(layer, x.bfloat16().float(), "bf16")
        assert_close(y, layer(x.bfloat16().float()), 3 * ONCE)  # the weights are rounded too


@TRACED
@torch.no_grad()
def test_a_float_input_stays_float():
    module, shape = LAYERS["conv"]
    layer, x = quantized(module, "w8a8", shape, signed=True)
    layer.input_format = None
    y, kernels = run_as_graph(layer, x, "f32")
    assert_close(y, layer(x), 1e-5)
    assert not any(kernel.lower().endswith("i8") for kernel in kernels)


def test_a_single_vector_is_refused():
    layer, x = quantized(LAYERS["row"][0], "w4a4", LAYERS["row"][1], signed=True)
    with pytest.raises(UnsupportedError, match="a linear reads a single vector"):
        graph_layer(layer, Choice(), Inputs())(x)


def test_what_fits_neither_bytes_nor_bfloat16_is_named():
    layer, _ = quantized(torch.nn.Linear(64, 8), "w8a8", (4, 64), signed=False)
    layer.input_format = FORMATS["fp8_ue2m6"]
    layer.input_zero_point.fill_(-41 * layer.input_qparams().unit)
    assert why_not(layer, torch.float32) is None
    assert "neither a byte nor bfloat16" in why_not(layer, torch.bfloat16)


def test_layers_that_read_one_tensor_share_a_rounding():
    layer, x = quantized(torch.nn.Linear(64, 8), "w4a4", (4, 64), signed=True)
    inputs = Inputs()
    first, second = (graph_layer(layer, Choice(), inputs) for _ in range(2))
    first(x), second(x)
    assert len(inputs._rounded) == 1
    second(x.clone())
    assert len(inputs._rounded) == 2

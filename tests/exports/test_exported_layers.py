"""Quantized layers in exported graphs against the reference, on equal inputs."""

from importlib.util import find_spec

import pytest
import torch
from cases import LAYERS, assert_close, quantized

from diffusers_msfp.engines.openvino.layers import Inputs
from diffusers_msfp.exports.layers import in_integers, keeps_packed, packed_layer, stored_bytes
from diffusers_msfp.exports.onnx_layers import onnx_layer
from diffusers_msfp.exports.onnx_model import export_onnx

SCHEMES = ("w4a4", "w4a8", "w6a6", "w8a8", "w4g16a4", "w4g16a8", "w8a8-wide", "w4a16")
FULL = {name: case for name, case in LAYERS.items() if min(case[1])}
NEEDS_ONNX = pytest.mark.skipif(
    not all(map(find_spec, ("onnx", "onnxscript", "onnxruntime"))), reason="the extra `onnx` is not installed"
)


def in_torch(layer, x):
    program = torch.export.export(packed_layer(layer, Inputs()).eval(), (x,), strict=False)
    return program.module()(x)


class SideBySide(torch.nn.Module):
    """Layers, each with an input and an output of its own."""

    def __init__(self, layers) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, *inputs):
        return tuple(layer(x) for layer, x in zip(self.layers, inputs, strict=True))


def in_onnxruntime(cases, tmp_path):
    """What each of the layers makes of its input; all of them in one file."""
    import onnxruntime

    made = SideBySide(onnx_layer(layer, Inputs()) for layer, _ in cases).eval()
    inputs = {f"x{place}": x for place, (_, x) in enumerate(cases)}
    export_onnx(made, inputs, [f"y{place}" for place in range(len(cases))], tmp_path / "layer.onnx")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(tmp_path / "layer.onnx", options, providers=["CPUExecutionProvider"])
    return map(torch.from_numpy, session.run(None, {name: x.numpy() for name, x in inputs.items()}))


@pytest.mark.parametrize("signed", [True, False], ids=["signed", "silu"])
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_layers_of_torch_programs_equal_the_reference(scheme, signed):
    for module, shape in FULL.values():
        layer, x = quantized(module, scheme, shape, signed)
        made = packed_layer(layer, Inputs()).eval()
        assert_close(made(x), layer(x), 1e-5)
        assert made.stored.numel() * made.stored.element_size() == stored_bytes(layer)


@torch.no_grad()
def test_a_torch_program_computes_what_its_layer_does():
    for name in ("conv", "linear", "circular"):
        layer, x = quantized(*FULL[name][:1], "w4a8", FULL[name][1], signed=True)
        assert_close(in_torch(layer, x), layer(x), 1e-5)


@NEEDS_ONNX
@pytest.mark.parametrize("scheme", SCHEMES)
@torch.no_grad()
def test_layers_in_onnxruntime_equal_the_reference(scheme, tmp_path):
    names = FULL if scheme == "w4a8" else ("conv", "linear")
    cases = [quantized(FULL[name][0], scheme, FULL[name][1], index % 2 == 0) for index, name in enumerate(names)]
    for name, (layer, x), y in zip(names, cases, in_onnxruntime(cases, tmp_path), strict=True):
        assert_close(y, layer(x), 1e-5)
        assert in_integers(layer) == (scheme in ("w4a4", "w4a8", "w6a6", "w4g16a4")), name


@NEEDS_ONNX
@torch.no_grad()
def test_onnx_packs_codes_two_in_a_byte_and_multiplies_integers(tmp_path):
    import onnx

    layer, x = quantized(torch.nn.Conv2d(16, 24, 3, padding=1), "w4a8", (2, 16, 9, 7), signed=True)
    export_onnx(onnx_layer(layer, Inputs()).eval(), {"x": x}, ["y"], tmp_path / "layer.onnx")
    model = onnx.load(tmp_path / "layer.onnx")
    onnx.checker.check_model(model)
    (codes,) = [each for each in model.graph.initializer if each.data_type == onnx.TensorProto.UINT4]
    assert len(codes.raw_data) == layer.packed_weight.numel() == stored_bytes(layer)
    assert "ConvInteger" in [node.op_type for node in model.graph.node]


@NEEDS_ONNX
@pytest.mark.parametrize("scheme", SCHEMES)
def test_sums_of_two_products_fit_sixteen_bits(scheme):
    layer, _ = quantized(torch.nn.Linear(64, 8), scheme, (4, 64), signed=False)
    made = onnx_layer(layer, Inputs())
    if in_integers(layer):
        largest = layer.input_format.lattice_max + made.grid.offset
        assert 2 * largest * int(made.integers().abs().max()) < 2**15


def test_what_stays_packed():
    sizes = {}
    for scheme in ("w4a8", "w4g16a8", "w8a8"):
        layer, _ = quantized(torch.nn.Linear(33, 8), scheme, (4, 33), signed=True)
        sizes[scheme] = keeps_packed(layer), stored_bytes(layer)
    assert sizes == {"w4a8": (True, 8 * 17), "w4g16a8": (False, 8 * 33), "w8a8": (False, 8 * 33)}

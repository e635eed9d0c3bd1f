"""The CUDA engine against the reference, layer by layer: on a GPU where there is one, else under Triton's interpreter.

The interpreter must be on before the kernels are imported.
"""

import copy
import os
import pickle

import pytest
import torch
from conftest import ONE_BLOCK, make_unet
from diffusers import DDIMScheduler, DDPMPipeline
from torch import nn
from torch.nn import functional as F

os.environ.setdefault("TRITON_INTERPRET", str(int(not torch.cuda.is_available())))
pytest.importorskip("triton")

from interpreter import bfloat16_dots  # noqa: F401 – a fixture

from diffusers_msfp import quantize_pipeline
from diffusers_msfp.engines import ENGINES, cuda
from diffusers_msfp.engines.choose import engine_named, set_engine
from diffusers_msfp.engines.cuda import CudaEngine
from diffusers_msfp.errors import ConfigError, NonFiniteError
from diffusers_msfp.layers import QUANT_LAYERS, QuantLayer
from diffusers_msfp.numerics.rounding import quantize_to_lattice
from diffusers_msfp.schemes import SCHEMES, LayerScheme

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
ROUNDED_TWICE = 1.6e-2  # relative: the reference's rounding to bfloat16, and the interpreter's, which truncates

pytestmark = pytest.mark.usefixtures("bfloat16_dots")

LAYERS = {
    "conv": (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 5, 4)),
    "strided": (nn.Conv2d(15, 7, 3, stride=2, bias=False), (1, 15, 7, 6)),
    "dilated-groups": (nn.Conv2d(8, 6, 3, padding=2, dilation=2, groups=2), (1, 8, 5, 5)),
    "reflect": (nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"), (1, 8, 4, 4)),
    "uneven": (nn.Conv2d(8, 8, (2, 3), padding="same"), (1, 8, 3, 4)),
    "conv1d": (nn.Conv1d(8, 12, 3, padding=1, stride=2), (2, 8, 9)),
    "circular-1d": (nn.Conv1d(8, 4, 4, padding="same", padding_mode="circular"), (8, 7)),
    "unbatched": (nn.Conv2d(3, 5, 3), (3, 4, 4)),
    "linear": (nn.Linear(33, 17), (4, 5, 33)),
    "row": (nn.Linear(64, 16, bias=False), (64,)),
    "no-linear": (nn.Linear(8, 4), (0, 8)),
    "no-conv": (nn.Conv2d(4, 4, 3, stride=2), (0, 4, 8, 8)),
}


@pytest.fixture(scope="module")
def _packed() -> DDPMPipeline:
    pipe = DDPMPipeline(make_unet(**ONE_BLOCK | {"down_block_types": ("AttnDownBlock2D",)}), DDIMScheduler())
    return quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)


@pytest.fixture(autouse=True)
def _device(monkeypatch):
    """Without a GPU, the CPU is one of Hopper's; with one, the reference convolves in float32, not in TF32."""
    if DEVICE == "cpu":
        monkeypatch.setattr(CudaEngine, "capability", lambda _self, _device: (9, 0))
    else:
        monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def quantized(module: nn.Module, scheme: str | LayerScheme, shape: tuple[int, ...], signed: bool = True):
    """A frozen layer and an input for it, on the device."""

    def values():
        x = torch.randn(shape) * 2
        return x if signed else F.silu(x)

    scheme = SCHEMES[scheme].inner if isinstance(scheme, str) else scheme
    layer = QUANT_LAYERS[type(module)].from_float(module, "place", scheme)
    if layer.observing:
        with torch.no_grad():
            layer(values() if min(shape) else torch.randn(max(1, shape[0]), *shape[1:]))
        layer.freeze()
    return copy.deepcopy(layer).to(DEVICE), values().to(DEVICE)


def assert_close(y: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    assert y.shape == expected.shape
    assert y.dtype == expected.dtype
    assert (y.double() - expected.double()).norm() <= tolerance * expected.double().norm()


@pytest.mark.parametrize("scheme", [name for name in SCHEMES if not SCHEMES[name].inner.group_size])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_layers_equal_the_reference(name, scheme):
    module, shape = LAYERS[name]
    layer, x = quantized(module, scheme, shape, signed=name != "conv")
    expected, rounded = layer(x), layer(x.bfloat16())
    for memory in ("fast", "low"):
        engine = CudaEngine(memory)
        if scheme.endswith("a16") and (scheme != "w4a16" or not isinstance(module, nn.Linear)):
            assert "not quantized" in engine.refusal(layer)
            continue
        assert engine.refusal(layer) is None
        layer.use_engine(engine)
        assert_close(layer(x), expected)
        assert_close(layer(x.bfloat16()), rounded, ROUNDED_TWICE)  # with what the first call has made
        assert len(layer.prepared._weights) == (memory == "fast")
        engine.check_inputs()


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w8a8"])
@pytest.mark.parametrize("name", ["conv", "linear"])
@torch.no_grad()
def test_codes_are_bit_equal(name, scheme):
    module, shape = LAYERS[name]
    layer, x = quantized(module, scheme, shape, signed=False)
    layer.use_engine(CudaEngine())
    layer(x)
    prepared = layer.prepared
    codes = prepared.codes(x, 0).float()
    q, k = quantize_to_lattice(x, layer.input_qparams())
    assert torch.equal(codes - prepared.grid().zero, q - k)
    assert torch.equal(prepared.grid().unit, layer.input_qparams().unit)


@torch.no_grad()
def test_integer_sums_are_exact():
    """The layer's own units may be anything: with powers of two, the result is the oracle's bit for bit."""
    layer, x = quantized(nn.Conv2d(16, 24, 3, padding=1, bias=False), "int-w4a4", (2, 16, 5, 4), signed=False)
    layer.weight_scale.fill_(0.5 / layer.weight_format.step)
    layer.input_scale.fill_(0.25 / layer.input_format.step)
    q, k = quantize_to_lattice(x, layer.input_qparams())
    weight = layer.dequantize_weight().double()
    layer.use_engine(CudaEngine())
    assert torch.equal(layer(x).double(), layer.compute((q - k).double() * 0.25, weight, None))
    assert layer.prepared.dtype == torch.int8


@pytest.mark.parametrize("as_tensor", [False, True], ids=["number", "tensor"])
@torch.no_grad()
def test_banks_have_weights_and_grids_of_their_own(as_tensor):
    layer, x = quantized(nn.Conv2d(4, 6, 3, padding=1), "w4a4", (1, 4, 4, 4), signed=False)
    scale, zero_point = layer.input_scale, layer.input_zero_point
    layer.store_banks([torch.randn(layer.logical_shape, device=DEVICE) * 0.1 for _ in range(2)])
    layer.expect_input(layer.input_format, DEVICE)
    layer.store_input(torch.stack((scale, scale * 2)), torch.stack((zero_point, zero_point)))
    expected = [layer.run(x, bank, bank) for bank in range(2)]
    layer.use_engine(CudaEngine())
    for bank in range(2):
        index = torch.tensor(bank, device=DEVICE) if as_tensor else bank
        assert_close(layer.run(x, index, index), expected[bank])
    assert not torch.equal(*expected)


@torch.no_grad()
def test_long_sums_leave_int8(monkeypatch):
    monkeypatch.setattr(cuda, "MAX_TERMS", 7)
    layer, x = quantized(nn.Linear(8, 4), "int-w4a4", (2, 8))
    expected = layer(x)
    layer.use_engine(CudaEngine())
    assert_close(layer(x), expected)
    assert layer.prepared.dtype == torch.bfloat16


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_refusals_say_why(monkeypatch):
    layer, _ = quantized(nn.Linear(8, 4), "w4a4", (2, 8))
    engine = CudaEngine()
    with monkeypatch.context() as patch:
        patch.setattr(cuda, "find_spec", lambda _name: None)
        assert engine.refusal(layer) == "Triton is not installed"
        patch.undo()
        patch.setattr(cuda, "launch_failure", lambda _device: "Triton fails here")
        assert engine.refusal(layer) == "Triton fails here"
    for capability, reason in ((None, "not on an NVIDIA GPU"), ((7, 5), "8.0 is needed")):
        monkeypatch.setattr(CudaEngine, "capability", lambda _self, _device, actual=capability: actual)
        assert reason in engine.refusal(layer)


def test_a_launch_that_fails_is_a_reason(monkeypatch):
    from diffusers_msfp.engines.triton import input_codes

    def fail(*_):
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(input_codes, "quantize", fail)
    assert "C compiler" in cuda.launch_failure.__wrapped__(torch.device(DEVICE))


def test_wide_weights_with_a_float_input_are_refused():
    layer, _ = quantized(nn.Linear(8, 4), LayerScheme(("fp8_e4m3",)), (2, 8))
    assert "4-bit" in CudaEngine().refusal(layer)
    assert engine_named("auto").choose(layer)[0].name == ("bf16" if DEVICE == "cpu" else "reference")


@torch.no_grad()
def test_unused_tensor_cores_are_mentioned_once(monkeypatch, caplog):
    monkeypatch.setattr(CudaEngine, "capability", lambda _self, _device: (10, 0))
    cuda._say_what_is_left_out.cache_clear()
    for _ in range(2):
        layer, x = quantized(nn.Linear(8, 4), "w4a4", (2, 8))
        layer.use_engine(CudaEngine())
        layer(x)
    assert [record.message[:16] for record in caplog.records] == ["FP4 tensor cores"]


# ── values that are not finite ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
@torch.no_grad()
def test_infinite_inputs_are_refused_by_name(bad):
    layers = [quantized(nn.Linear(8, 4), "w4a4", (2, 8))[0] for _ in range(3)]
    engine = CudaEngine()
    for index, layer in enumerate(layers):
        layer.module_name = f"place{index}"
        layer.use_engine(engine)
        x = torch.ones(2, 8, device=DEVICE)
        x[1, 3] = bad if index else 0.0
        with torch.inference_mode():
            layer(x)
    with pytest.raises(NonFiniteError, match="input of layer `place1` must be finite"):
        engine.check_inputs()
    engine.check_inputs()  # told once


@torch.no_grad()
def test_a_model_checks_inputs_when_its_call_ends(packed_pipe, images):
    unet, images = packed_pipe.unet.to(DEVICE), images[:1].to(DEVICE)
    set_engine(unet, "cuda")
    unet = pickle.loads(pickle.dumps(copy.deepcopy(unet)))
    infinite = images.clone()
    infinite[0, 0, 0, 0] = torch.nan
    for _ in range(2):
        with pytest.raises(NonFiniteError, match="must be finite"):
            unet(infinite, 10)
    y = unet(images, 10).sample
    assert y.isfinite().all()
    set_engine(unet, "reference")
    assert not unet._forward_hooks
    assert (y - unet(images, 10).sample).norm() < 0.2 * y.norm()


# ── whole models ─────────────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def test_every_layer_of_a_model_equals_the_reference(packed_pipe, images):
    unet, images = packed_pipe.unet.to(DEVICE), images.to(DEVICE)
    layers = [module for module in unet.modules() if isinstance(module, QuantLayer)]
    set_engine(unet, "cuda")
    served = []

    def compare(layer, args, output):
        engine, layer.engine = layer.engine, None
        assert args[0].is_floating_point()  # norms hand out no codes
        assert_close(output, layer.forward(*args))
        layer.engine = engine
        served.append(layer.prepared is not None)

    for layer in layers:
        layer.register_forward_hook(compare)
    unet(images[:1], 10)
    assert len(served) == len(layers)
    assert served.count(False) == 1  # conv_in, whose input is float


def test_the_engine_must_be_able_to_run_something(packed_pipe, monkeypatch):
    monkeypatch.setattr(CudaEngine, "capability", lambda _self, _device: None)
    with pytest.raises(ConfigError, match="not on an NVIDIA GPU"):
        set_engine(packed_pipe.unet, "cuda")
    assert next(iter(ENGINES)) == "cuda"


@needs_gpu
@torch.no_grad()
def test_auto_takes_this_engine_on_a_gpu(packed_pipe, images):
    unet, images = packed_pipe.unet.to("cuda"), images.to("cuda")
    set_engine(unet)
    unet(images, 10)
    names = [engine_named("auto").choose(module)[0].name for module in unet.modules() if isinstance(module, QuantLayer)]
    assert set(names) == {"cuda", "reference"}
    assert names.count("reference") == 1


@needs_gpu
@pytest.mark.parametrize("memory", ["fast", "low"])
@pytest.mark.parametrize("name", ["conv", "reflect", "conv1d", "linear"])
@torch.no_grad()
def test_layers_do_not_wait_for_the_device(name, memory):
    module, shape = LAYERS[name]
    layer, x = quantized(module, "w4a4", shape)
    layer.use_engine(CudaEngine(memory))
    layer(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")

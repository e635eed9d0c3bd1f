"""Engines of whole models: exact leaf by leaf, and undone without a trace."""

import copy

import pytest
import torch
from accelerate.utils import set_module_tensor_to_device
from cases import LAYERS, quantized
from conftest import equal_state, make_condition_unet, make_dit, make_unet, make_vae, run
from diffusers import AutoencoderKL, DDPMPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import nn
from torch.nn import functional as F

from diffusers_msfp import MSFPConfig, MSFPPipelineMixin, freeze, quantize_pipeline, set_engine
from diffusers_msfp.engines import ENGINES, kernels
from diffusers_msfp.engines.choose import engine_named, engines_of
from diffusers_msfp.engines.engine import PreparedLayer
from diffusers_msfp.engines.fusion.attention import attention
from diffusers_msfp.engines.fusion.fuse import FusedResnetBlock2D
from diffusers_msfp.engines.fusion.norms import FusedGroupNorm, PassingSiLU
from diffusers_msfp.engines.fusion.processors import BF16AttnProcessor, read_together
from diffusers_msfp.errors import ConfigError, NonFiniteError, StateError
from diffusers_msfp.evaluation.compare import compare_pipelines
from diffusers_msfp.layers import QUANT_LAYERS
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.plugin.quantize import quantize_model
from diffusers_msfp.schemes import SCHEMES


def frozen(model, *arguments, scheme: str = "w4a4"):
    """Quantized, its ranges frozen, run by the reference."""
    quantize_model(model, MSFPConfig(scheme=scheme))
    set_engine(model, "reference")
    with torch.no_grad():
        model(*arguments)
    freeze(model)
    return model


def relative(y: torch.Tensor, expected: torch.Tensor) -> float:
    return ((y - expected).double().norm() / expected.double().norm()).item()


def kinds(model) -> list[type]:
    return [type(module) for module in model.modules()]


def test_quality_of_a_whole_model_is_the_reference_s(embedded):
    pipe = quantize_pipeline(copy.deepcopy(embedded), "w4a4", num_samples=8, num_inference_steps=10)
    errors = {}
    for engine in ("reference", "auto"):
        set_engine(pipe, engine)
        errors[engine] = compare_pipelines(embedded, pipe, num_samples=8, num_inference_steps=10).eps_rel_l2
    assert errors["auto"] == pytest.approx(errors["reference"], rel=0.02)


@pytest.mark.parametrize("memory", ["fast", "low"])
def test_undone_without_a_trace(packed_pipe, images, tmp_path, memory):
    unet = packed_pipe.unet
    set_engine(unet, "reference")
    before, expected, state = kinds(unet), run(unet, images), copy.deepcopy(unet.state_dict())
    report = MSFPPipelineMixin.attach(packed_pipe).quantization_report
    layers = report()["unet"]["layers"]
    assert report()["unet"]["engines"] == {"reference": layers}
    set_engine(packed_pipe, "auto", memory=memory)
    engines = report()["unet"]["engines"]
    assert "bf16" in engines
    assert sum(engines.values()) == layers
    assert {FusedGroupNorm, PassingSiLU, FusedResnetBlock2D} <= set(kinds(unet))
    assert relative(run(unet, images), expected) < 0.2
    assert list(unet.state_dict()) == list(state)
    unet.save_pretrained(tmp_path)
    assert equal_state(type(unet).from_pretrained(tmp_path), unet)
    again = copy.deepcopy(unet)
    assert torch.equal(run(again, images), run(unet, images))
    set_engine(packed_pipe, "reference")
    assert kinds(unet) == before
    assert torch.equal(run(unet, images), expected)


@pytest.mark.parametrize(
    ("build", "arguments"),
    [
        (make_condition_unet, lambda: (torch.randn(2, 4, 8, 8), 10, torch.randn(2, 5, 16))),
        (make_dit, lambda: (torch.randn(2, 4, 8, 8), torch.tensor([10, 10]), torch.tensor([1, 2]))),
        (lambda: make_unet(resnet_time_scale_shift="scale_shift"), lambda: (torch.randn(2, 3, 8, 8), 10)),
        (lambda: make_unet(downsample_type="resnet", upsample_type="resnet"), lambda: (torch.randn(2, 3, 8, 8), 10)),
        (make_vae, lambda: (torch.randn(1, 3, 16, 16),)),
    ],
    ids=["condition", "dit", "scale-shift", "resnet-resampling", "vae"],
)
@torch.no_grad()
def test_other_architectures(build, arguments):
    inputs = arguments()
    model = frozen(build().eval(), *inputs, scheme="w8a8")
    expected = model(*inputs).sample
    set_engine(model, "auto")
    assert relative(model(*inputs).sample, expected) < (0.2 if isinstance(model, AutoencoderKL) else 0.1)


def test_calibration_under_an_engine(unet, images):
    quantize_model(unet, MSFPConfig(scheme="w4a4"))
    other = copy.deepcopy(unet)
    set_engine(other, "reference")
    set_engine(unet, "auto")
    for each in (unet, other):
        run(each, images)  # observes
    assert engines_of(unet)["reference"] == sum(layer.observing for _, layer in quant_layers(unet)) > 0
    for each in (unet, other):
        freeze(each)
    for (_, layer), (name, like) in zip(quant_layers(unet), quant_layers(other), strict=True):
        assert layer.input_format == like.input_format, name
        if like.input_format is not None:
            torch.testing.assert_close(layer.input_scale, like.input_scale, rtol=1e-5, atol=0)
            torch.testing.assert_close(layer.input_zero_point, like.input_zero_point, rtol=1e-5, atol=0)
    assert relative(run(unet, images), run(other, images)) < 0.2
    assert any(getattr(layer, "prepared", None) is not None for _, layer in quant_layers(unet))


def test_training_goes_by_the_reference(packed_pipe, images):
    unet = packed_pipe.unet
    results = []
    for engine in ("reference", "auto"):
        set_engine(unet, engine)
        x = images.clone().requires_grad_(True)
        y = unet(x, 10).sample
        y.square().sum().backward()
        results.append((y, x.grad))
    (expected, gradient), (y, found) = results
    assert torch.allclose(y, expected, atol=1e-5)
    assert gradient.abs().sum() > 0
    assert relative(found, gradient) <= 1e-5


@pytest.mark.parametrize("trained", ["all", "first", "last"])
def test_norms_that_are_trained_alone_get_gradients(packed_pipe, images, trained):
    """Also where nothing before them needs one, on channels last, where torch 2.13 by itself crashes."""
    unet = packed_pipe.unet.requires_grad_(False)
    parts = [each for each in unet.modules() if isinstance(each, torch.nn.GroupNorm)]
    parts = {"all": parts, "first": [unet.down_blocks[0].resnets[0].norm1], "last": [unet.conv_norm_out]}[trained]
    for each in parts:
        each.requires_grad_(True)
    set_engine(unet, "auto")
    unet(images, 10).sample.square().sum().backward()
    assert all(each.weight.grad.abs().sum() > 0 for each in parts)


@torch.no_grad()
@pytest.mark.parametrize("change", ["padding_mode", "_conv_forward"])
def test_convolutions_that_are_changed_for_tiles_are_run_as_they_are_now(packed_pipe, images, change):
    unet = packed_pipe.unet
    before, x = unet(images, 10).sample, torch.randn(2, 32, 8, 8)
    layer = next(each for each in unet.modules() if type(each) is FusedResnetBlock2D).conv1
    plain = layer(x)
    if change == "padding_mode":
        layer.padding_mode = "circular"
    else:
        layer._conv_forward = lambda x, weight, bias: F.conv2d(
            F.pad(x, (1, 1, 0, 0), "circular"), weight, bias, 1, (1, 0)
        )
    tiled = layer(x)
    assert relative(tiled, plain) > 0.01
    after = unet(images, 10).sample
    assert relative(after, before) > 1e-4
    set_engine(unet, "reference")
    assert torch.allclose(tiled, layer(x), atol=1e-5)
    layer.padding_mode = "zeros"
    vars(layer).pop("_conv_forward", None)
    set_engine(unet, "auto")
    assert torch.equal(unet(images, 10).sample, before)


@torch.no_grad()
@pytest.mark.parametrize("once", [False, True])
def test_what_a_hook_has_kept_is_not_changed(packed_pipe, images, once):
    unet, kept = packed_pipe.unet, []
    block = next(each for each in unet.modules() if type(each) is FusedResnetBlock2D)
    expected = unet(images, 10).sample

    def keep(_module, _args, y):
        kept.extend((y, y.clone()))
        if once:
            handle.remove()

    handle = block.conv2.register_forward_hook(keep)
    assert torch.allclose(unet(images, 10).sample, expected)
    assert torch.equal(*kept)


def test_infinite_values_are_refused_behind_a_fused_norm(packed_pipe, images):
    set_engine(packed_pipe, "auto")
    images[0, 0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="must be finite"):
        run(packed_pipe.unet, images)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("parameter", ["weight", "bias"])
def test_what_is_not_finite_in_a_fused_norm_is_refused(packed_pipe, images, parameter, bad):
    unet = packed_pipe.unet
    set_engine(unet, "auto")
    with torch.no_grad():
        getattr(unet.mid_block.resnets[0].norm1, parameter)[0] = bad
    with pytest.raises(NonFiniteError, match="must be finite"):
        run(unet, images)


def test_a_bias_that_was_trained_counts_at_once(images):
    x = images.bfloat16()
    unet = frozen(make_unet().bfloat16(), x, 10, scheme="w4a8")
    set_engine(unet, "auto")
    before = run(unet, x)
    with torch.no_grad():
        unet.conv_out.bias += 3
    assert torch.allclose(run(unet, x), before + 3, atol=0.1)


def test_what_is_asked_for_must_exist(packed_pipe, unet):
    with pytest.raises(ConfigError, match="Unknown engine 'int4'. Known: .*int8"):
        set_engine(packed_pipe, "int4")
    with pytest.raises(ConfigError, match="`memory` must be one of fast, low, but got 'tiny'"):
        set_engine(packed_pipe, "auto", memory="tiny")
    with pytest.raises(StateError, match="has no quantized layer"):
        set_engine(unet, "auto")
    model = frozen(unet, torch.randn(1, 3, 8, 8), 1, scheme="w4a16")
    with pytest.raises(ConfigError, match="its input is not quantized.*Engines that can: bf16, reference"):
        set_engine(model, "int8")
    assert run(model, torch.randn(1, 3, 8, 8)).isfinite().all()


def test_the_environment_chooses(packed_dir, monkeypatch, caplog):
    monkeypatch.setenv("MSFP_ENGINE", "bf16")
    layers = quant_layers(DDPMPipeline.from_pretrained(packed_dir).unet)
    assert {layer.engine.engines[0].name for _, layer in layers} == {"bf16"}
    monkeypatch.setenv("MSFP_ENGINE", "cuda")  # to be moved there
    unet = DDPMPipeline.from_pretrained(packed_dir).unet
    assert engines_of(unet).keys() == {"reference"}
    assert "MSFP_ENGINE: Engine 'cuda' must be able to run a layer of this model here" in caplog.text
    monkeypatch.setenv("MSFP_ENGINE", "fastest")
    with pytest.raises(ConfigError, match="Unknown engine 'fastest'"):
        DDPMPipeline.from_pretrained(packed_dir)


@torch.no_grad()
def test_attention_in_bfloat16():
    for shape, tokens in (((2, 3, 200, 8), 200), ((1, 2, 300, 16), 77), ((1, 1, 5, 8), 3)):
        query = torch.randn(shape).bfloat16() * 3
        key, value = (torch.randn(*shape[:2], tokens, shape[3]).bfloat16() for _ in range(2))
        expected = F.scaled_dot_product_attention(query.double(), key.double() + 5, value.double())
        assert relative(attention(query, key + 5, value), expected) < 0.02


@torch.no_grad()
def test_attention_of_a_model(unet, images):
    model = frozen(unet.to(torch.bfloat16), images.bfloat16(), 10, scheme="w8a8")
    expected = model(images.bfloat16(), 10).sample.float()
    set_engine(model, "auto")
    processors = {type(module.processor) for module in model.modules() if hasattr(module, "processor")}
    assert processors == {BF16AttnProcessor}
    assert relative(model(images.bfloat16(), 10).sample.float(), expected) < 0.1
    set_engine(model, "reference")
    processors = {type(module.processor) for module in model.modules() if hasattr(module, "processor")}
    assert processors == {AttnProcessor2_0}


@torch.no_grad()
def test_layers_that_read_one_tensor_share_its_codes(unet, images, monkeypatch):
    model = frozen(unet.to(torch.bfloat16), images.bfloat16(), 10)
    set_engine(model, "auto")
    attention = next(module for module in model.modules() if isinstance(module, Attention))
    layers = attention.to_q, attention.to_k, attention.to_v
    x = torch.randn(2, 16, layers[0].in_features).bfloat16()
    alone, calls = [layer(x) for layer in layers], []
    quantize = kernels.quantize
    monkeypatch.setattr(kernels, "quantize", lambda *given: calls.append(1) or quantize(*given))
    together = read_together(x, *layers)
    assert len(calls) == 1
    assert all(map(torch.equal, together, alone))
    handle = layers[1].register_forward_hook(lambda *_: None)
    assert all(map(torch.equal, read_together(x, *layers), alone))
    assert len(calls) == 4, "who looks at a layer sees the floats that it reads"
    handle.remove()
    layers[2].store_input(layers[2].input_scale * 2, layers[2].input_zero_point)
    apart = [layer(x) for layer in layers]
    assert all(map(torch.equal, read_together(x, *layers), apart))
    x[0, 0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match="to_q` must be finite"):
        read_together(x, *layers)


def test_dequantizing_leaves_stock_classes(packed_pipe: DDPMPipeline):
    set_engine(packed_pipe, "auto")
    packed_pipe.unet.dequantize()
    assert not {FusedGroupNorm, PassingSiLU, FusedResnetBlock2D} & set(kinds(packed_pipe.unet))


class Pairs(PreparedLayer):
    """Made ready as the CUDA engine does it: a weight and its sums."""

    def expand(self, bank: int):
        return torch.zeros(2, 3), torch.zeros(2, dtype=torch.int32)

    def run(self, x, bank, adapter):
        pytest.fail("only its memory is counted")


@pytest.mark.parametrize("keep", [True, False])
def test_memory_of_weights_in_several_tensors_is_counted_whole(packed_pipe, keep):
    _, layer = next(quant_layers(packed_pipe.unet))
    prepared = Pairs(layer, keep)
    prepared.weight(0)
    assert prepared.kept_bytes == (2 * 3 * 4 + 2 * 4 if keep else 0)


@torch.no_grad()
def test_what_was_made_ready_stays_behind_when_tensors_are_exchanged():
    """As accelerate's offloading does, layer by layer."""
    module, shape = LAYERS["conv"]
    layer, x = quantized(module, "w4a4", shape, signed=True)
    layer.use_engine(engine_named("int8"))
    y, made, weight = layer(x), layer.prepared, layer.packed_weight
    assert layer.ready(x) is made
    set_module_tensor_to_device(layer, "packed_weight", "meta")
    assert layer.ready(x) is None
    set_module_tensor_to_device(layer, "packed_weight", "cpu", value=weight)
    assert torch.equal(layer(x), y)
    assert layer.prepared not in (None, made)


@pytest.mark.parametrize("scheme", ["w8a8", "w8a16", "w4a4"])
@torch.no_grad()
def test_whole_numbers_stay_whole_under_autocast(scheme):
    layer = QUANT_LAYERS[nn.Conv2d].from_float(nn.Conv2d(320, 8, 3, padding=1), "place", SCHEMES[scheme].inner)
    x = torch.randn(1, 320, 8, 8)
    layer(x)
    if layer.observing:
        layer.freeze()
    expected = layer(x)
    layer.use_engine(ENGINES["bf16"]())
    with torch.autocast("cpu", torch.float16):
        found = layer(x)
    assert found.dtype == torch.float16
    assert (found - expected).norm() < 2e-3 * expected.norm()


@pytest.mark.parametrize("changes", [{"padding": (2, 2), "dilation": (2, 2)}, {"padding": (0, 0)}, {"stride": (2, 1)}])
@pytest.mark.parametrize("padding", [1, "same", (0, 1)])
@torch.no_grad()
def test_a_geometry_that_changes_is_followed(changes, padding):
    if padding == "same" and "padding" not in changes:
        changes = {"dilation": (2, 2)}
    layer = QUANT_LAYERS[nn.Conv2d].from_float(nn.Conv2d(8, 8, 3, padding=padding), "place", SCHEMES["w4a4"].inner)
    x = torch.randn(2, 8, 12, 12)
    layer(x)
    layer.freeze()
    layer.use_engine(ENGINES["int8"]())
    layer(x)
    for name, value in changes.items():
        setattr(layer, name, value)
    found = layer(x)
    layer.use_engine(None)
    torch.testing.assert_close(found, layer(x), rtol=1e-4, atol=1e-4)

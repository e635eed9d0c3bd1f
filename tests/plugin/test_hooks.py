"""What others have put on layers: another `forward` is refused, hooks stay."""

import copy

import pytest
import torch
from accelerate import cpu_offload
from accelerate.hooks import remove_hook_from_submodules
from conftest import equal_state, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline
from torch import nn

from diffusers_msfp import (
    MSFPConfig,
    RoundingConfig,
    SplitConfig,
    calibrate,
    calibration_state,
    freeze,
    learn_rounding,
    quantize_pipeline,
    split_shortcuts,
)
from diffusers_msfp.errors import StateError
from diffusers_msfp.layers import QUANT_LAYERS, QuantLayer
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.plugin.quantize import quantize_model
from diffusers_msfp.schemes import SCHEMES

CPU = torch.device("cpu")
SHORT = SplitConfig(num_samples=2, num_inference_steps=3)


def leaf_group_offload(model: nn.Module) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="leaf_level")


def block_group_offload(model: nn.Module) -> None:
    model.enable_group_offload(CPU, CPU, offload_type="block_level", num_blocks_per_group=1)


def sequential_offload(model: nn.Module) -> None:
    cpu_offload(model, execution_device=CPU)


def wrap(model: nn.Module) -> None:
    layer = model.mid_block.resnets[0].conv1
    layer.forward = lambda x, forward=layer.forward: 2 * forward(x)


def cast(model: nn.Module) -> None:
    model.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def tile(model: nn.Module) -> None:
    """As pictures without seams are made."""
    model.conv_in._conv_forward = lambda x, weight, bias: nn.functional.conv2d(x, weight, bias, padding=1)


@pytest.mark.parametrize("exchange", [leaf_group_offload, block_group_offload, sequential_offload, wrap, cast, tile])
def test_a_model_whose_layers_run_something_else_is_not_quantized(unet, exchange):
    exchange(unet)
    before = [vars(module).copy() for module in unet.modules()]
    with pytest.raises(StateError, match=r"must run its own `\w+` to be quantized, .* Nothing was changed"):
        quantize_model(unet, MSFPConfig())
    assert [vars(module) for module in unet.modules()] == before


@pytest.mark.parametrize("exchange", [leaf_group_offload, block_group_offload, sequential_offload, wrap])
def test_a_model_whose_layers_run_something_else_is_not_made_float(packed_pipe, images, exchange):
    unet = packed_pipe.unet
    exchange(unet)
    expected = run(unet, images)
    with pytest.raises(StateError, match="must run its own `forward` to be made float"):
        unet.dequantize()
    assert torch.equal(run(unet, images), expected)
    assert all(isinstance(layer, QuantLayer) for _, layer in quant_layers(unet))


def test_a_model_whose_layers_run_something_else_is_not_split(packed_pipe):
    teacher = DDPMPipeline(make_unet(), DDIMScheduler())
    sequential_offload(packed_pipe.unet)
    with pytest.raises(StateError, match="must be in memory for it to be improved"):
        split_shortcuts(packed_pipe, teacher, SHORT)


def test_ranges_are_not_set_while_weights_are_elsewhere(images):
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    quantize_model(pipe.unet, MSFPConfig("w4a4"))
    sequential_offload(pipe.unet)
    with torch.no_grad():
        for timestep in (900, 500):
            pipe.unet(images, timestep)
    freeze(pipe.unet)  # buffers are in memory
    assert not any(layer.input_scale.is_meta for _, layer in quant_layers(pipe.unet) if layer.input_format is not None)
    assert pipe.unet.mid_block.resnets[0].conv1.input_format.bits == 4
    assert torch.isfinite(run(pipe.unet, images)).all()
    pipe = quantize_pipeline(DDPMPipeline(make_unet(), DDIMScheduler()), "w4a4", num_samples=2, num_inference_steps=2)
    expected = run(pipe.unet, images)
    cpu_offload(pipe.unet, execution_device=CPU, offload_buffers=True)
    with pytest.raises(StateError, match="is offloaded. Calibrate first"):
        calibrate(pipe, num_samples=1, num_inference_steps=2)
    assert calibration_state(pipe.unet) == "frozen"
    assert torch.equal(run(pipe.unet, images), expected)


DONE_TO = {
    "saved": lambda pipe, folder: pipe.save_pretrained(folder / "new"),
    "made float": lambda pipe, _: pipe.unet.dequantize(),
    "calibrated": lambda pipe, _: calibrate(pipe, num_samples=1, num_inference_steps=2),
    "improved": lambda pipe, _: learn_rounding(pipe, DDPMPipeline(make_unet(), DDIMScheduler()), QUICK),
}
QUICK = RoundingConfig(num_samples=1, num_inference_steps=2, iterations=1)


@pytest.mark.parametrize("done", DONE_TO)
def test_what_group_offload_has_on_disk_is_left_alone(packed_pipe, images, done, tmp_path):
    (tmp_path / "disk").mkdir()
    expected = run(packed_pipe.unet, images)
    packed_pipe.unet.enable_group_offload(
        CPU, CPU, offload_type="block_level", num_blocks_per_group=1, offload_to_disk_path=str(tmp_path / "disk")
    )
    with pytest.raises(StateError, match="offload"):
        DONE_TO[done](packed_pipe, tmp_path)
    assert not list(tmp_path.glob("new/unet/*"))
    assert torch.equal(run(packed_pipe.unet, images), expected)


def test_what_was_taken_off_is_no_obstacle(unet, images):
    plain = copy.deepcopy(unet)
    sequential_offload(unet)
    remove_hook_from_submodules(unet)
    assert "forward" in vars(unet.conv_in), "accelerate leaves it behind"
    for model in (plain, unet.to(CPU)):
        quantize_model(model, MSFPConfig("w4a16"))
    assert torch.equal(run(unet, images), run(plain, images))


def test_a_compiled_layer_is_not_run_in_place_of_the_quantized_one(unet, images):
    plain = copy.deepcopy(unet)
    unet.conv_in.compile(backend="eager")
    for model in (plain, unet):
        quantize_model(model, MSFPConfig("w4a16"))
    assert torch.equal(run(unet, images), run(plain, images))


@pytest.mark.parametrize("kind", ["forward_pre", "forward", "full_backward", "full_backward_pre"])
def test_hooks_stay_with_a_layer(kind):
    seen, layer, x = [], nn.Linear(4, 3), torch.randn(2, 4, requires_grad=True)
    handle = getattr(layer, f"register_{kind}_hook")(lambda module, *_: seen.append(module))
    packed = QUANT_LAYERS[nn.Linear].from_float(layer, "place", SCHEMES["w4a16"].inner)
    again = packed.to_float(torch.float32)
    for module in (packed, again):
        module(x).sum().backward()
        assert seen.pop() is module
    handle.remove()
    for module in (packed, again):
        module(x).sum().backward()
    assert not seen


def test_hooks_with_their_companions_stay():
    seen, layer = [], nn.Linear(4, 3)
    layer.register_forward_hook(lambda _m, _args, kwargs, _y: seen.append(kwargs), with_kwargs=True, always_call=True)
    packed = QUANT_LAYERS[nn.Linear].from_float(layer, "place", SCHEMES["w4a16"].inner)
    packed(torch.randn(2, 4))
    with pytest.raises(RuntimeError):
        packed(torch.randn(2, 5))
    assert seen == [{}, {}]


def test_hooks_stay_when_a_model_is_split_and_made_float(packed_pipe, images):
    unet, name, seen = packed_pipe.unet, "up_blocks.0.resnets.0.conv_shortcut", []
    expected = unet.get_submodule(name).in_channels
    handle = unet.get_submodule(name).register_forward_hook(lambda _m, args, _y: seen.append(args[0].shape[1]))
    split_shortcuts(packed_pipe, DDPMPipeline(make_unet(), DDIMScheduler()), SHORT)
    seen.clear()
    run(unet, images)
    assert seen == [expected]
    part = unet.get_submodule(f"{name}.0").register_forward_hook(lambda *_: None)
    before = copy.deepcopy(unet)
    with pytest.raises(StateError, match="must have no hooks on its parts"):
        unet.dequantize()
    assert equal_state(unet, before)
    part.remove()
    unet.dequantize()
    run(unet, images)
    assert seen == [expected] * 2
    handle.remove()
    assert not unet.get_submodule(name)._forward_hooks


def test_hooks_of_a_layer_are_kept_by_quantize_pipeline(tiny_pipe):
    seen = []
    tiny_pipe.unet.conv_in.register_forward_hook(lambda layer, *_: seen.append(type(layer)))
    quantize_pipeline(tiny_pipe, "w4a16", num_samples=1, num_inference_steps=1)
    seen.clear()
    tiny_pipe(1, num_inference_steps=1)
    assert seen == [type(tiny_pipe.unet.conv_in)]
    assert issubclass(seen[0], QuantLayer)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_a_weight_that_a_hook_computes_stays_float(unet, images, caplog):
    nn.utils.weight_norm(unet.conv_in)
    quantize_model(unet, MSFPConfig("w4a16"))
    assert type(unet.conv_in) is nn.Conv2d
    assert "conv_in: its weight is computed anew" in caplog.text
    run(unet, images)

"""What torch and diffusers do to any model, done to quantized ones: copies, casts, layouts, defaults, interruptions."""

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ONE_BLOCK, equal_state, make_unet
from diffusers import DDIMScheduler, DDPMPipeline
from pipelines import make_small_pipe, make_wan, small_wan
from torch import nn
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

from diffusers_msfp import FinetuneConfig, MSFPConfig, calibrate, finetune, freeze, quantize_pipeline
from diffusers_msfp.compat.hooks import has_dispatch_modes
from diffusers_msfp.errors import StateError, UnsupportedError
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.plugin.attach import detach
from diffusers_msfp.plugin.quantize import dequantize, quantize_model
from diffusers_msfp.sampling.observation import calibration_state, quantized_models

FAST = {"num_samples": 2, "num_inference_steps": 2}


def small_pipe() -> DDPMPipeline:
    pipe = DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def _small() -> DDPMPipeline:
    return quantize_pipeline(small_pipe(), "w4a4", **FAST)


@pytest.fixture
def unet(_small):
    return copy.deepcopy(_small).unet


@torch.no_grad()
def output(unet, images) -> torch.Tensor:
    return unet(images, 10).sample


def test_a_copy_of_compiled_layers_is_its_own(unet, images):
    for module in unet.modules():
        if isinstance(module, nn.Conv2d):
            module.compile(backend="eager")
    before = output(unet, images)
    for copied in (copy.deepcopy(unet), pickle.loads(pickle.dumps(unet))):
        assert torch.equal(output(copied, images), before)
        with torch.no_grad():
            for _, layer in quant_layers(copied):
                layer.weight_scale.mul_(2)
        assert not torch.allclose(output(copied, images), before, rtol=0.1)
        assert torch.equal(output(unet, images), before)


def test_layouts(images):
    teacher, pipe = small_pipe(), small_pipe()
    quantize_pipeline(pipe, "w4a8", **FAST)
    finetune(pipe, teacher, FinetuneConfig(train_steps=1, batch_size=2, num_inference_steps=2, placement="side"))
    before = output(pipe.unet, images)
    assert pipe.unet.to(memory_format=torch.channels_last) is pipe.unet
    torch.testing.assert_close(output(pipe.unet, images), before)


MOVES = {
    "to a device": lambda unet: unet.to("cpu"),
    "to its dtype": lambda unet: unet.to(unet.dtype),
    "to both": lambda unet: unet.to("cpu", unet.dtype),
    "cpu()": lambda unet: unet.cpu(),
}


@pytest.mark.parametrize("move", MOVES)
def test_what_was_ready_is_ready_again_once_moved(unet, images, move):
    output(unet, images)
    ready = [name for name, layer in quant_layers(unet) if layer.prepared is not None]
    assert MOVES[move](unet) is unet
    assert ready
    assert [name for name, layer in quant_layers(unet) if layer.prepared is not None] == ready


def test_types_are_refused(unet, images):
    before = output(unet, images)
    for dtype in (torch.float16, torch.float32):
        with pytest.raises(UnsupportedError, match="The packed weights have no dtype to cast. Load the model with"):
            unet.type(dtype)
    assert torch.equal(output(unet, images), before)


def test_weights_by_themselves_are_not_trained(unet):
    weight = unet.conv_in.weight
    with pytest.raises(UnsupportedError, match="The weight of `conv_in` is packed, so it cannot be trained. Train"):
        weight.requires_grad_(True)
    with pytest.raises(UnsupportedError, match="cannot be trained"):
        weight.requires_grad = True
    weight.requires_grad = False
    assert weight.requires_grad_(False) is weight
    assert not weight.requires_grad


def test_a_default_device_watches_nothing():
    with torch.device("cpu"):
        assert not has_dispatch_modes()
    with FlopCounterMode(display=False):
        assert has_dispatch_modes()


DEFAULTS = """
import torch, sys
sys.path[:0] = sys.argv[1:2]
from conftest import ONE_BLOCK, make_unet
from diffusers import DDIMScheduler, DDPMPipeline
from diffusers_msfp import FinetuneConfig, finetune, quantize_pipeline
made = []
for _ in range(2):
    made.append([DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler()) for _ in range(2)])
found = []
for default, (teacher, pipe) in zip((torch.bfloat16, torch.float32), made):  # first where nothing is remembered yet
    torch.set_default_dtype(default)
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
    packed = {key: value.clone() for key, value in pipe.unet.state_dict().items()}
    config = FinetuneConfig(train_steps=2, batch_size=2, num_inference_steps=2, num_adapters=2, placement="merged")
    finetune(pipe, teacher, config)
    found.append(packed)
assert found[0].keys() == found[1].keys()
different = [key for key in found[0] if not torch.equal(found[0][key], found[1][key])]
print(sorted({key.rsplit(".", 1)[-1] for key in different}))
weights = [key for key in different if key.endswith(("packed_weight", "weight_scale", "formats"))]
assert not weights, weights
"""


def test_default_dtype_where_nothing_ran_before():
    """What torch makes without being told a dtype, such as candidates of a search and a router, follows the default."""
    folder = str(Path(__file__).parents[1])
    subprocess.run([sys.executable, "-c", DEFAULTS, folder], check=True)


def stopped_pipe(scheme: str) -> DDPMPipeline:
    """Of which two layers are quantized."""

    def stop(done: int, _total: int, **_: object) -> None:
        if done == 2:
            raise KeyboardInterrupt

    pipe = small_pipe()
    with pytest.raises(KeyboardInterrupt):
        quantize_pipeline(pipe, scheme, on_progress=stop, **FAST)
    return pipe


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_what_was_stopped_goes_on(scheme):
    whole = quantize_pipeline(small_pipe(), scheme, **FAST).unet.state_dict()
    pipe = stopped_pipe(scheme)
    assert len(list(quant_layers(pipe.unet))) == 2
    stopped = copy.deepcopy(pipe)
    quantize_pipeline(pipe, scheme, **FAST)
    assert calibration_state(pipe.unet) == "frozen"
    found = pipe.unet.state_dict()
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[key], whole[key]) for key in whole)
    dequantize(stopped)  # the other way out
    assert not list(quant_layers(stopped.unet))


ONE_HAT = {"prompts": ["a hat"]}
SEVERAL = {
    "a text encoder": (make_small_pipe, "w4a8", ["unet", "text_encoder"], ONE_HAT, "weights of text_encoder"),
    "the calibration beside one": (make_small_pipe, "w4a8", ["unet", "text_encoder"], ONE_HAT, "calibration"),
    "a second denoiser": (make_wan, "w4a16", None, small_wan(), "weights of transformer_2"),
}


@pytest.mark.parametrize("stopped", SEVERAL)
def test_of_several_components_the_one_that_was_stopped_goes_on(stopped):
    make, scheme, components, arguments, last = SEVERAL[stopped]
    config = MSFPConfig(scheme, components_to_quantize=components)

    def stop(_done: int, _total: int, stage: str = "", **_: object) -> None:
        if stage == last:
            raise KeyboardInterrupt

    pipes = [make(), make()]
    for pipe in pipes:
        pipe.set_progress_bar_config(disable=True)
    with pytest.raises(KeyboardInterrupt):
        quantize_pipeline(pipes[0], config, on_progress=stop, **FAST, **arguments)
    models = [list(quantized_models(quantize_pipeline(pipe, config, **FAST, **arguments))) for pipe in pipes]
    assert len(models[0]) == 2
    assert all(equal_state(one, other) for one, other in zip(*models, strict=True))
    with pytest.raises(StateError, match="can be quantized once"):
        quantize_pipeline(pipes[0], config, **FAST, **arguments)


@pytest.mark.parametrize("scheme", ["w4a4", "w4a16"])
def test_what_was_stopped_is_not_taken_for_whole(scheme, tmp_path):
    pipe = stopped_pipe(scheme)
    pipe(1, num_inference_steps=2)
    before = copy.deepcopy(pipe.unet)
    tries = {
        "calibrated": lambda: calibrate(pipe, **FAST),
        "frozen": lambda: freeze(pipe),
        "saved": lambda: pipe.save_pretrained(tmp_path / "pipe"),
    }
    for done, attempt in tries.items():
        with pytest.raises(StateError, match=rf"for it to be {done}, but 2 of \d+ have: quantizing it was stopped"):
            attempt()
    assert equal_state(pipe.unet, before)
    assert not list(tmp_path.rglob("*.safetensors"))
    quantize_pipeline(pipe, scheme, **FAST)
    pipe.save_pretrained(tmp_path / "pipe")


def test_a_layer_with_a_pruned_bias_stays_float():
    pipe = small_pipe()
    prune.l1_unstructured(pipe.unet.mid_block.resnets[0].conv1, "bias", 2)
    plan = MSFPConfig("w4a8").plan(pipe.unet)
    assert plan.skipped["mid_block.resnets.0.conv1"] == "its bias is computed anew in each call (pruning)"
    quantize_pipeline(pipe, "w4a8", **FAST)
    assert not hasattr(pipe.unet.mid_block.resnets[0].conv1, "packed_weight")


def make_encoder() -> CLIPTextModel:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CLIPTextModel(CLIPTextConfig(vocab_size=40, max_position_embeddings=8, **sizes)).eval()


def test_text_encoders_become_float_again_after_they_were_saved_or_cast(tmp_path):
    tokens = torch.arange(6)[None]
    for dtype in (torch.float32, torch.bfloat16):
        encoder = make_encoder().to(dtype)
        quantize_model(encoder, MSFPConfig("w8a16"))
        with torch.no_grad():
            before = encoder(tokens)[0]
        encoder.save_pretrained(tmp_path / str(dtype))
        encoder.dequantize()
        assert {each.dtype for each in encoder.parameters()} == {dtype}
        with torch.no_grad():
            apart = encoder(tokens)[0] - before
        assert apart.norm() < 0.01 * before.norm()


def test_no_memory_to_become_float_changes_nothing(unet, images, tmp_path, monkeypatch):
    before = output(unet, images)

    def no_memory(*_: object) -> None:
        raise MemoryError

    last = [layer for _, layer in quant_layers(unet)][-1]
    monkeypatch.setattr(last, "to_float", no_memory)
    with pytest.raises(MemoryError):
        detach(unet, torch.float32)
    assert torch.equal(output(unet, images), before)
    unet.save_pretrained(tmp_path / "still packed")
    assert "quantization_config" in (tmp_path / "still packed" / "config.json").read_text()

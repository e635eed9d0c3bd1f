"""What cannot work is refused before a weight is replaced; what fails all the same can be gone on with."""

import copy

import pytest
import torch
from conftest import make_unet
from diffusers import (
    AnimateDiffPipeline,
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    MotionAdapter,
    MultiControlNetModel,
    PNDMScheduler,
    StableDiffusionControlNetPipeline,
)
from pipelines import make_controlnet, make_img2img, make_sdxl, make_small_pipe, picture
from torch import nn

from diffusers_msfp import MSFPConfig, calibrate, calibration_state, cli, quantize_pipeline
from diffusers_msfp.errors import ConfigError, NonFiniteError, StateError
from diffusers_msfp.layers import QUANT_LAYERS, QuantLayer
from diffusers_msfp.layers.split import split_layer
from diffusers_msfp.schemes import LayerScheme

FAST = {"num_samples": 2, "num_inference_steps": 2}
TINY = {"block_out_channels": (8, 16), "attention_head_dim": 8}
BOTH = MSFPConfig("w4a4", components_to_quantize=["unet", "vae"])
FEW = MSFPConfig("w4a4", modules_to_not_convert=["up_blocks", "mid_block"])


def make_tiny(scheduler=None) -> DDPMPipeline:
    return DDPMPipeline(make_unet(**TINY), scheduler or DDPMScheduler())


def is_untouched(pipe, before: dict) -> bool:
    """No quantized layer, equal weights, and a pipeline that is called as before."""
    modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
    return not any(isinstance(module, QuantLayer) for part in modules for module in part.modules()) and all(
        torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items()
    )


def weights_of(pipe) -> dict:
    return {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}


def make_two_controlnets() -> StableDiffusionControlNetPipeline:
    one = make_controlnet()
    nets = MultiControlNetModel([one.controlnet, copy.deepcopy(one.controlnet)])
    return StableDiffusionControlNetPipeline(**one.components | {"controlnet": nets}, requires_safety_checker=False)


@pytest.mark.situation("two ControlNets in one pipeline, by the default selection", "refused")
def test_two_controlnets():
    pipe = make_two_controlnets()
    before = weights_of(pipe)
    arguments = {"image": [picture(), picture()], **FAST}
    with pytest.raises(ConfigError, match=r"`controlnet` is a MultiControlNetModel.*components_to_quantize=\['unet'\]"):
        quantize_pipeline(pipe, "w4a4", **arguments)
    assert is_untouched(pipe, before)


@pytest.mark.situation("two ControlNets in one pipeline that stay float", "right")
def test_float_controlnets():
    pipe = make_two_controlnets()
    quantize_pipeline(pipe, MSFPConfig("w4a4", components_to_quantize=["unet"]), image=[picture()] * 2, **FAST)
    assert calibration_state(pipe.unet) == "frozen"


@pytest.mark.situation("two ControlNets in a folder, on the command line", "refused")
def test_two_controlnets_in_a_folder(tmp_path):
    make_two_controlnets().save_pretrained(tmp_path / "float")
    with pytest.raises(ConfigError, match="`controlnet` is a MultiControlNetModel, which holds several"):
        cli.quantize(str(tmp_path / "float"), tmp_path / "out", components=["controlnet"])
    assert not (tmp_path / "out").exists()


@pytest.mark.situation("AnimateDiff, whose motion modules name the argument of their linear layers", "right")
def test_motion_modules():
    small = make_small_pipe()
    torch.manual_seed(0)
    adapter = MotionAdapter(
        block_out_channels=(8, 16), motion_layers_per_block=1, motion_num_attention_heads=2, motion_norm_num_groups=4
    ).eval()
    parts = {key: small.components[key] for key in ("vae", "text_encoder", "tokenizer", "unet")}
    pipe = AnimateDiffPipeline(**parts, motion_adapter=adapter, scheduler=DDIMScheduler())
    quantize_pipeline(pipe, "w4a4", num_frames=2, height=8, width=8, **FAST)
    assert calibration_state(pipe.unet) == "frozen"


@pytest.mark.parametrize("layer", [nn.Linear(4, 6), nn.Conv2d(4, 6, 3), nn.Conv1d(4, 6, 3)], ids=lambda x: str(x)[:6])
@pytest.mark.situation("a model calls its layers by the argument's name, `input=`", "right")
def test_keyword_of_layers(layer):
    x = torch.randn(2, 4, *[8] * (len(layer.weight.shape) - 2))
    quantized = QUANT_LAYERS[type(layer)].from_float(layer, "layer", LayerScheme(("fp4_e2m1",), ()))
    for each in (quantized, split_layer(layer, [1, 3])):
        with torch.no_grad():
            assert torch.equal(each(input=x), each(x))


@pytest.mark.situation("a float16 VAE that the pipeline casts to float32 is named", "refused")
def test_upcast_vae():
    pipe = make_sdxl().to(torch.float16)
    before = weights_of(pipe)
    with pytest.raises(ConfigError, match="casts a float16 `vae` to float32.*bfloat16 or float32"):
        quantize_pipeline(pipe, BOTH, **FAST)
    assert is_untouched(pipe, before)


@pytest.mark.situation("the same VAE in bfloat16, or in a pipeline that does not cast it", "right")
def test_vae_without_upcast():
    for pipe in (make_sdxl().to(torch.bfloat16), make_small_pipe()):
        assert pipe.vae.config.force_upcast
        quantize_pipeline(pipe, BOTH, **FAST)
        assert calibration_state(pipe) == "frozen"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"num_samples": 0}, "`num_samples` must be at least 1"),
        ({"num_inference_steps": 0}, "`num_inference_steps` must be at least 1"),
        ({"prompts": []}, "non-empty list of strings"),
        ({"colour": "red"}, "among those of StableDiffusionImg2ImgPipeline, but got `colour`"),
        ({"prompt": "a fox"}, r"prompts are given as `prompts=\[…\]`"),
        ({"image": picture().repeat(3, 1, 1, 1), "num_samples": 4}, "a batch of 4 fails in its first step"),
        ({"image": picture().repeat(16, 1, 1, 1), "num_samples": 18}, "a batch of 2 fails in its first step"),
        ({"strength": 3.0}, "a batch of 2 fails in its first step, before anything is changed: ValueError"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.situation("arguments that a pipeline does not run with, as images that do not fit prompts", "refused")
def test_arguments(arguments, said):
    pipe = make_img2img()
    before, scheduler = weights_of(pipe), pipe.scheduler
    with pytest.raises(ConfigError, match=said):
        quantize_pipeline(pipe, "w4a4", **{"image": picture()} | FAST | arguments)
    assert is_untouched(pipe, before)
    assert pipe.scheduler is scheduler
    assert scheduler.num_inference_steps is None


@pytest.mark.situation("a scheduler that does not fit the pipeline", "refused")
def test_foreign_scheduler():
    pipe = make_tiny(PNDMScheduler(skip_prk_steps=True))
    before = weights_of(pipe)
    with pytest.raises(ConfigError, match="unexpected keyword argument 'generator'. Correct the arguments"):
        quantize_pipeline(pipe, "w4a4", **FAST)
    assert is_untouched(pipe, before)


@pytest.mark.situation("one of several components holds NaN", "refused")
def test_second_component_is_broken():
    pipe = make_controlnet()
    before = weights_of(pipe)
    with torch.no_grad():
        pipe.controlnet.conv_in.bias.fill_(0)
        pipe.controlnet.conv_in.weight[0] = torch.nan
    with pytest.raises(NonFiniteError, match="The weight of layer `conv_in`"):
        quantize_pipeline(pipe, "w4a4", image=picture(), **FAST)
    assert is_untouched(pipe, before)


@pytest.mark.situation("a float model that overflows to infinity in its first step", "refused")
def test_overflow():
    pipe = make_tiny(DDIMScheduler(clip_sample=False))
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(torch.inf)
    before = weights_of(pipe)
    with pytest.raises(NonFiniteError, match="the first step holds NaN or infinity"):
        quantize_pipeline(pipe, "w4a4", **FAST)
    assert is_untouched(pipe, before)


class Failing(DDIMPipeline):
    """Its run ends in an error, once, after its last step."""

    fails = True

    def numpy_to_pil(self, images):
        return images

    @torch.no_grad()
    def __call__(self, *args, **kwargs):
        result = super().__call__(*args, **kwargs)
        if self.fails:
            raise RuntimeError("out of luck")
        return result


@pytest.mark.parametrize("again", [lambda pipe: quantize_pipeline(pipe, FEW, **FAST), lambda p: calibrate(p, **FAST)])
@pytest.mark.situation("the calibration fails after the weights are quantized, and is called again", "right")
def test_goes_on(again):
    pipe = Failing(make_unet(**TINY), DDIMScheduler())
    said = "RuntimeError: out of luck. The weights are quantized already.*with corrected arguments"
    with pytest.raises(ConfigError, match=said):
        quantize_pipeline(pipe, FEW, **FAST)
    assert calibration_state(pipe) == "observing"
    with pytest.raises(StateError, match="A model can be quantized once"):
        quantize_pipeline(pipe, "w4a4", **FAST)
    pipe.fails = False
    again(pipe)
    direct = Failing(make_unet(**TINY), DDIMScheduler())
    direct.fails = False
    quantize_pipeline(direct, FEW, **FAST)
    expected = direct.unet.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in pipe.unet.state_dict().items())


@pytest.mark.situation("a calibrated pipeline is calibrated anew with arguments that it does not run with", "refused")
def test_calibrated_anew():
    pipe = make_img2img()
    quantize_pipeline(pipe, "w4a4", image=picture(), **FAST)
    before = weights_of(pipe)
    with pytest.raises(ConfigError, match="a batch of 4 fails in its first step"):
        calibrate(pipe, image=picture().repeat(3, 1, 1, 1), num_samples=4, num_inference_steps=2)
    assert calibration_state(pipe) == "frozen"
    assert all(torch.equal(tensor, before[name]) for name, tensor in pipe.unet.state_dict().items())


@pytest.mark.situation("a pipeline that needs more than the command line gives it, before the long search", "refused")
def test_command_line(tmp_path, monkeypatch):
    pipe = make_img2img()
    pipe.save_pretrained(tmp_path / "float")
    searched = []
    monkeypatch.setattr(QuantLayer, "from_float", classmethod(lambda *_, **__: searched.append(1)))
    with pytest.raises(ConfigError, match="cannot run without `image`|must run with the arguments"):
        cli.quantize(str(tmp_path / "float"), tmp_path / "out", num_samples=2, num_inference_steps=2)
    other = make_small_pipe()
    other.scheduler = DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", clip_sample=False)
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(NonFiniteError, match="rescale_betas_zero_snr=True"):
        cli.quantize(str(tmp_path / "other"), tmp_path / "out", num_samples=2, num_inference_steps=2)
    assert not searched
    assert not (tmp_path / "out").exists()

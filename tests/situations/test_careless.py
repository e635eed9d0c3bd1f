"""Careless arguments, and ways to save, trace or change a model that have no meaning for packed weights."""

import copy

import pytest
import torch
from conftest import ONE_BLOCK, equal_state, make_dit_pipe, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline
from pipelines import make_clip, make_small_pipe
from torch import nn
from torch.nn.utils import parametrize

from diffusers_msfp import MSFPConfig, calibrate, calibration_state, quantize_pipeline
from diffusers_msfp.errors import ConfigError, UnsupportedError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.plugin.quantize import quantize_model

RUN = {"num_samples": 2, "num_inference_steps": 2}


class Traced(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.model(x, timestep, return_dict=False)[0]


@pytest.mark.situation("a packed model is saved with `safe_serialization=False`, which nobody could load", "refused")
@pytest.mark.parametrize("kind", ["denoiser", "text encoder"])
def test_unsafe_files(kind, packed_pipe, tmp_path):
    model = packed_pipe.unet
    if kind == "text encoder":
        model = make_clip()
        quantize_model(model, MSFPConfig("w8a16"))
    with pytest.raises(UnsupportedError, match="stored as safetensors.*Leave `safe_serialization`"):
        model.save_pretrained(tmp_path / "model", safe_serialization=False)
    assert not (tmp_path / "model").exists()


@pytest.mark.situation("`torch.jit.trace` of a quantized model", "refused")
@pytest.mark.filterwarnings("ignore:`torch.jit.trace.*` is deprecated:DeprecationWarning")
def test_tracing(packed_pipe, images):
    with pytest.raises(UnsupportedError, match="cannot record `.*`, which is quantized. Use `torch.export.export`"):
        torch.jit.trace(Traced(packed_pipe.unet), (images, torch.tensor(10)))
    run(packed_pipe.unet, images)


@pytest.mark.situation("`torch.export` of a quantized model", "right")
def test_exporting(images):
    float_model = make_unet(**ONE_BLOCK | {"down_block_types": ("AttnDownBlock2D",)})
    pipe = DDPMPipeline(copy.deepcopy(float_model), DDIMScheduler())
    unet = quantize_pipeline(pipe, "w4a4", **RUN).unet
    program = torch.export.export(Traced(unet).eval(), (images, torch.tensor(10)))
    expected = run(float_model, images)
    errors = [(each - expected).norm() for each in (program.module()(images, torch.tensor(10)), run(unet, images))]
    assert errors[0] < 1.2 * errors[1]


@pytest.mark.situation("parametrizations and weight norm are put on a quantized layer", "refused")
@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
def test_parametrizations(packed_pipe, images):
    layer, expected = packed_pipe.unet.conv_out, run(packed_pipe.unet, images)
    with pytest.raises(ValueError, match="does not have a parameter.* 'weight'"):
        parametrize.register_parametrization(layer, "weight", nn.Identity())
    with pytest.raises(KeyError):
        torch.nn.utils.weight_norm(layer)
    assert torch.equal(run(packed_pipe.unet, images), expected)


@pytest.mark.situation("one prompt instead of a list of prompts", "right")
def test_one_prompt():
    pipe = make_small_pipe()
    asked = []
    encode = pipe.encode_prompt
    pipe.encode_prompt = lambda prompt, *args, **kwargs: (asked.append(prompt), encode(prompt, *args, **kwargs))[1]
    quantize_pipeline(pipe, "w4a8", **RUN, prompts="a hat")
    assert {text for prompts in asked for text in prompts} == {"a hat"}


@pytest.mark.situation("embeddings instead of prompts", "right")
def test_embeddings():
    pipe = make_small_pipe()
    given = {"prompt": None} | {name: torch.randn(2, 7, 16) for name in ("prompt_embeds", "negative_prompt_embeds")}
    quantize_pipeline(pipe, "w4a8", **RUN, **given)
    assert calibration_state(pipe) == "frozen"
    assert compare_pipelines(pipe, pipe, **RUN, **given).image_psnr_db == 100


@pytest.mark.situation("numbers of samples, steps or seeds that are no whole numbers", "refused")
@pytest.mark.parametrize(
    "given", [{"num_samples": "4"}, {"num_inference_steps": 2.5}, {"seed": 1.5}, {"num_samples": 0}]
)
def test_numbers(given):
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    (name,) = given
    with pytest.raises(ConfigError, match=f"`{name}` must be (a whole number|at least 1)"):
        quantize_pipeline(pipe, "w4a4", **RUN | given)
    assert not any(isinstance(module, QuantLayer) for module in pipe.unet.modules())


@pytest.mark.situation("a scheme in other letters", "refused")
def test_scheme_in_capitals():
    with pytest.raises(ConfigError, match="Unknown scheme 'W4A4'. Known: .* Did you mean `w4a4`?"):
        MSFPConfig("W4A4")


@pytest.mark.situation("pipelines of other sizes are compared", "refused")
def test_other_inputs(packed_pipe):
    grey = DDPMPipeline(make_unet(in_channels=1, out_channels=1), DDIMScheduler())
    with pytest.raises(ConfigError, match="must take the same inputs.*not a quantized version of the reference"):
        compare_pipelines(grey, packed_pipe, **RUN)


@pytest.mark.situation("a class label that the model does not have", "refused")
def test_label_outside():
    pipe = make_dit_pipe()
    with pytest.raises(ConfigError, match="fails in its first step, before anything is changed: IndexError"):
        quantize_pipeline(pipe, "w4a4", **RUN, class_labels=[3, 4000])
    assert not any(isinstance(module, QuantLayer) for module in pipe.transformer.modules())


@pytest.mark.situation("Ctrl-C in the middle of a calibration, and another one", "right")
def test_interrupted_calibration():
    pipe = make_small_pipe()

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize_pipeline(pipe, "w4a8", **RUN, callback_on_step_end=stop)
    assert calibration_state(pipe) == "observing"
    calibrate(pipe, **RUN)
    assert calibration_state(pipe) == "frozen"


@pytest.mark.situation("one denoiser in two pipelines, calibrated in one of them", "right")
def test_one_denoiser_in_two_pipelines(packed_pipe, images):
    before, alone = copy.deepcopy(packed_pipe), copy.deepcopy(packed_pipe)
    other = DDPMPipeline(packed_pipe.unet, DDIMScheduler())
    for pipe in (other, alone):
        calibrate(pipe, **RUN, seed=3)
    assert calibration_state(packed_pipe) == calibration_state(other) == "frozen"
    assert not equal_state(packed_pipe.unet, before.unet)
    assert equal_state(packed_pipe.unet, alone.unet)
    assert torch.equal(run(packed_pipe.unet, images), run(alone.unet, images))


@pytest.mark.situation("a checkpoint is loaded while torch's default dtype is another", "right")
def test_default_dtype(packed_pipe, packed_dir, images):
    torch.set_default_dtype(torch.bfloat16)
    try:
        loaded = DDPMPipeline.from_pretrained(packed_dir)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(run(loaded.unet, images), run(packed_pipe.unet, images))

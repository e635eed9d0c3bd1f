"""Pipelines that step in place, change what they give from step to step, or make no pictures; image prompts."""

import copy

import pytest
import torch
from conftest import make_dit_pipe, make_unet
from diffusers import (
    DanceDiffusionPipeline,
    DDIMScheduler,
    DDPMPipeline,
    HiDreamImageTransformer2DModel,
    IPNDMScheduler,
    Kandinsky5Transformer3DModel,
    LTX2VideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    Lumina2Transformer2DModel,
    LuminaNextDiT2DModel,
)
from diffusers.models.attention_processor import AttnProcessor, CustomDiffusionAttnProcessor
from loras import ip_adapter
from pipelines import make_cascade, make_kandinsky, make_small_pipe, make_unet_1d, photographs

from diffusers_msfp import MSFPConfig, quantize_pipeline
from diffusers_msfp.errors import ConfigError, StateError, UnsupportedError
from diffusers_msfp.evaluation import compare_pipelines, sample_images
from diffusers_msfp.formats import FORMATS
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.methods.correction.fit import require_channels
from diffusers_msfp.methods.losses import real_factors
from diffusers_msfp.plugin.quantize import dequantize, quantize_model
from diffusers_msfp.sampling.calls import call_arguments
from diffusers_msfp.sampling.denoisers import denoiser_of, model_output
from diffusers_msfp.sampling.denoising_factor import RunFactors
from diffusers_msfp.sampling.timestep import timestep_argument
from diffusers_msfp.sampling.trajectory import Trajectories, mix, rollout

FAST = {"num_samples": 2, "num_inference_steps": 2}


class SteppingInPlace(DDPMPipeline):
    """As Kandinsky 5 does: the tensor that the denoiser was given becomes the next sample."""

    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=2, output_type="np"):
        sample = torch.randn(batch_size, 3, 8, 8, generator=generator[0] if isinstance(generator, list) else generator)
        self.scheduler.set_timesteps(num_inference_steps)
        for timestep in self.scheduler.timesteps:
            output = self.unet(sample, timestep).sample
            sample[:] = self.scheduler.step(output, timestep, sample).prev_sample
            output += 1  # and what it was given is written over
        return self.image_processor.postprocess(sample, output_type) if hasattr(self, "image_processor") else (sample,)


@pytest.mark.situation("a pipeline that steps in place, while it teaches", "right")
def test_steps_in_place():
    teacher = SteppingInPlace(make_unet(), DDIMScheduler())
    steps = rollout(teacher, call_arguments(teacher, None, 3, {}), 0, 2, 0)
    with torch.no_grad():
        for step in steps:
            torch.testing.assert_close(model_output(step.run(teacher.unet)), step.output)
    assert not torch.equal(steps[0].args[0], steps[-1].args[0])


@pytest.mark.situation("a pipeline that gives its denoiser other things in some steps, as a teacher", "refused")
def test_steps_of_other_kinds():
    teacher = make_small_pipe()
    teacher.set_progress_bar_config(disable=True)
    steps = rollout(teacher, call_arguments(teacher, ["a hat"], 2, {"height": 16, "width": 16}), 0, 1, 0)
    argument = timestep_argument(teacher.unet)
    rows = len(steps[0].output)
    steps[1].kwargs["down_intrablock_additional_residuals"] = [torch.zeros(rows, 8, 8, 8)]
    with pytest.raises(ConfigError, match="other arguments in some steps than in others: with these arguments it"):
        mix(steps, [0] + [1] * (rows - 1), argument)
    for number, step in enumerate(steps):
        step.kwargs["down_intrablock_additional_residuals"] = [torch.zeros(rows, 8, 8, 8 + number)]
    with pytest.raises(ConfigError, match="tensors whose shape changes from step to step"):
        mix(steps, [0] + [1] * (rows - 1), argument)


@pytest.mark.situation("sound, compared or drawn as pictures", "refused")
def test_sound():
    pipe = DanceDiffusionPipeline(make_unet_1d(), IPNDMScheduler())
    for look in (lambda: compare_pipelines(pipe, pipe, **FAST), lambda: sample_images(pipe, **FAST)):
        with pytest.raises(UnsupportedError, match="AudioPipelineOutput holds something else, such as sound"):
            look()


@pytest.mark.situation("float32 positions beside a bfloat16 model that is compared with itself", "right")
def test_positions_keep_their_dtype():
    class WithPositions(DDPMPipeline):
        @torch.no_grad()
        def __call__(self, batch_size=1, generator=None, num_inference_steps=2, output_type="np"):
            sample = torch.randn(batch_size, 3, 8, 8, generator=generator).to(self.unet.dtype)
            self.scheduler.set_timesteps(num_inference_steps)
            for timestep in self.scheduler.timesteps:
                seen.append(torch.linspace(0, 1, 64).view(8, 8))
                output = self.unet(sample, timestep, class_labels=seen[-1]).sample
                sample = self.scheduler.step(output, timestep, sample).prev_sample
            return (sample.float(),)

    seen, read = [], []
    unet = make_unet().bfloat16()
    forward = type(unet).forward

    def with_positions(sample, timestep, class_labels=None, return_dict=True):
        read.append(class_labels.dtype)
        return forward(unet, sample, timestep, return_dict=return_dict)

    unet.forward = with_positions
    pipe = WithPositions(unet, DDIMScheduler())
    assert compare_pipelines(pipe, pipe, **FAST).eps_rel_l2 == 0
    assert set(read) == {torch.float32}
    reference = WithPositions(make_unet(), DDIMScheduler())
    wide = reference.unet.forward
    reference.unet.forward = lambda sample, timestep, class_labels=None: wide(sample, timestep)  # noqa: ARG005
    assert compare_pipelines(reference, pipe, **FAST).eps_rel_l2 < 0.1
    assert set(read) == {torch.float32}


@pytest.mark.situation("timesteps by token, whose modulation has as many positions as the sample", "right")
def test_modulation_by_token():
    sizes = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2}
    torch.manual_seed(0)
    model = LTXVideoTransformer3DModel(cross_attention_dim=16, caption_channels=8, **sizes).eval()
    found = []
    for timesteps in (torch.full((2,), 500.0), torch.full((2, 8), 500.0)):
        pipe = copy.deepcopy(model)
        quantize_model(pipe, MSFPConfig("w4a4"))
        with torch.no_grad():
            size = {"num_frames": 2, "height": 2, "width": 2}
            text, mask = torch.randn(2, 3, 8), torch.ones(2, 3)
            pipe(torch.randn(2, 8, 8), text, timesteps, mask, **size)
        found.append({name for name, layer in quant_layers(pipe) if layer.input_is_sum})
    assert found[0] == found[1]
    assert "transformer_blocks.1.attn2.to_q" in found[0]  # it reads the stream, which no norm has scaled
    assert "transformer_blocks.1.attn1.to_q" not in found[0]


@pytest.mark.situation("a correction for a video whose channels and frames are as many", "refused")
def test_channels_or_frames():
    model = make_unet()
    require_channels(model, torch.zeros(1, 3, 5, 8, 8))
    with pytest.raises(UnsupportedError, match="can be told from its frames.* Pass on another number of frames"):
        require_channels(model, torch.zeros(1, 3, 3, 8, 8))
    with pytest.raises(UnsupportedError, match="its config names no `out_channels`"):
        require_channels(torch.nn.Linear(1, 1), torch.zeros(1, 3, 5, 8, 8))
    conditioned = make_unet(in_channels=8, out_channels=4)  # as Stable Video Diffusion is, whose frames come first
    require_channels(conditioned, torch.zeros(1, 4, 8, 8, 8))
    with pytest.raises(UnsupportedError, match=r"has its channels \(4\) in axis 1"):
        require_channels(conditioned, torch.zeros(1, 8, 4, 8, 8))
    with_variance = make_unet(in_channels=4, out_channels=8)
    require_channels(with_variance, torch.zeros(1, 4, 9, 8, 8))
    with pytest.raises(UnsupportedError, match="can be told from its frames"):
        require_channels(with_variance, torch.zeros(1, 4, 8, 8, 8))


@pytest.mark.situation("several pictures of a caption beside pictures of one's own", "refused")
def test_captions_of_several_pictures():
    pipe = make_small_pipe()
    with pytest.raises(ConfigError, match="`num_images_per_prompt` must be 1 beside `images`, but got 2"):
        quantize_pipeline(pipe, "w4a4", images=photographs(2), prompts=["a", "b"], num_images_per_prompt=2, **FAST)
    assert not hasattr(pipe.unet, "hf_quantizer")


@pytest.mark.situation("a trajectory that begins after its first step, while the sampler clips", "right")
def test_trajectories_from_later_on():
    teacher = DDPMPipeline(make_unet(), DDIMScheduler(clip_sample=True))
    make = call_arguments(teacher, None, 4, {})
    trajectories = Trajectories(teacher, make, 2, seed=0)
    sampler = RunFactors(teacher.scheduler, 4)
    answers = [step.output + 0.01 for step in trajectories.steps()]
    assert real_factors(sampler, trajectories, answers)
    del trajectories.steps()[0]
    assert real_factors(sampler, trajectories, answers[1:]) is None


@pytest.mark.situation("an IP-Adapter that is loaded before the model is quantized", "refused")
def test_image_prompts_before():
    pipe = make_small_pipe()
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    with pytest.raises(StateError, match=r"before image prompts.*attn2\.processor.*`pipe.unload_ip_adapter\(\)`"):
        quantize_pipeline(pipe, "w4a8", prompts=["a hat"], **FAST)
    pipe.unload_ip_adapter()
    quantize_pipeline(pipe, "w8a8-wide", prompts=["a hat"], **FAST)
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    dequantize(pipe)
    assert pipe.unet.config.encoder_hid_dim_type == "ip_image_proj"


def test_layers_of_other_attention_processors():
    unet = make_small_pipe().unet
    sizes = {"hidden_size": 8, "cross_attention_dim": 16}
    own = {name: CustomDiffusionAttnProcessor(**sizes) for name in unet.attn_processors if "attn2" in name}
    unet.set_attn_processor(unet.attn_processors | own)
    with pytest.raises(StateError, match=r"attn2\.processor.*`model\.set_attn_processor\(AttnProcessor\(\)\)`"):
        quantize_model(unet, MSFPConfig("w4a16"))
    unet.set_attn_processor(AttnProcessor())
    quantize_model(unet, MSFPConfig("w4a16"))


def tiny(cls: type, **sizes):
    """Without weights, of two heads of eight channels."""
    with torch.device("meta"):
        return cls(**sizes)


LUMINA = {"hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "num_kv_heads": 2, "multiple_of": 16}
KANDINSKY = {"model_dim": 16, "ff_dim": 16, "time_dim": 8, "axes_dims": (4, 2, 2)}
KANDINSKY |= dict.fromkeys(("in_text_dim", "in_text_dim2"), 8) | dict.fromkeys(
    ("num_text_blocks", "num_visual_blocks"), 1
)
HIDREAM = {"patch_size": 2, "in_channels": 4, "attention_head_dim": 8, "num_attention_heads": 2, "text_emb_dim": 8}
HIDREAM |= {"num_layers": 1, "num_single_layers": 1, "caption_channels": [8, 8], "llama_layers": [0, 0]}
LTX2 = {"in_channels": 8, "out_channels": 8, "num_attention_heads": 2, "attention_head_dim": 8}
LTX2 |= {"cross_attention_dim": 16, "caption_channels": 8}
LTX2 |= {f"audio_{key}": value for key, value in LTX2.items() if key != "caption_channels"} | {"num_layers": 1}
FACES = {  # bits of the inputs of a first and a last layer
    "Lumina-Next": (
        lambda: tiny(LuminaNextDiT2DModel, **LUMINA, cross_attention_dim=16),
        {"patch_embedder.proj": None, "norm_out.linear_2": 8},
    ),
    "Lumina 2": (
        lambda: tiny(Lumina2Transformer2DModel, **LUMINA, axes_dim_rope=(4, 2, 2), cap_feat_dim=16),
        {"x_embedder": None, "norm_out.linear_2": 8},
    ),
    "Kandinsky 5": (
        lambda: tiny(Kandinsky5Transformer3DModel, **KANDINSKY),
        {"visual_embeddings.in_layer": None, "out_layer.out_layer": 8},
    ),
    "HiDream": (
        lambda: tiny(HiDreamImageTransformer2DModel, **HIDREAM),
        {"x_embedder.proj": None, "final_layer.linear": 8},
    ),
    "LTX-2": (
        lambda: tiny(LTX2VideoTransformer3DModel, **LTX2),
        {"proj_in": None, "audio_proj_in": None, "proj_out": 8, "audio_proj_out": 8},
    ),
    "a prior": (lambda: make_kandinsky().prior_prior, {"proj_in": None, "proj_to_clip_embeddings": 8}),
    "Stable Cascade": (lambda: make_cascade().decoder, {"embedding.1": None, "clf.1": 8}),
    "DiT": (lambda: denoiser_of(make_dit_pipe()), {"pos_embed.proj": None, "proj_out_2": 8}),
}


@pytest.mark.situation("first and last layers of models that name them in a way of their own", "right")
@pytest.mark.parametrize("model", FACES)
def test_layers_that_read_the_sample(model):
    make, expected = FACES[model]
    layers = MSFPConfig("w4a4").plan(make()).layers
    bits = {name: next((FORMATS[each].bits for each in layers[name].activation), None) for name in expected}
    assert bits == expected

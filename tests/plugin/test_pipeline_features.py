"""What diffusers can do around a denoiser, on a quantized Stable Diffusion. README's table reads the marks."""

import copy
import functools
import pickle
from contextlib import nullcontext

import numpy as np
import pipelines
import pytest
import torch
from conftest import make_vae
from diffusers import (
    LCMScheduler,
    ModelMixin,
    ModularPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
)
from diffusers.hooks._helpers import AttentionProcessorRegistry
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor
from loras import ip_adapter
from matrix import sample
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from diffusers_msfp import MSFPConfig, quantize_pipeline, set_engine
from diffusers_msfp.engines.fusion import attention
from diffusers_msfp.engines.fusion.processors import BF16AttnProcessor
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.plugin.quantize import quantize_model


@pytest.fixture(scope="module")
def quantized() -> StableDiffusionPipeline:
    """Denoiser and text encoder in bfloat16, where the engine that is taken by default changes most."""
    pipe = pipelines.make_small_pipe().to(torch.bfloat16)
    config = MSFPConfig("w4a8", components_to_quantize=["unet", "text_encoder"])
    return quantize_pipeline(pipe, config, num_samples=2, num_inference_steps=2)


@pytest.fixture
def pipe(quantized) -> StableDiffusionPipeline:
    return copy.deepcopy(quantized)


@pytest.fixture
def before(pipe) -> np.ndarray:
    return sample(pipe)


TWO_LEVELS = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}


def differs(a: np.ndarray, b: np.ndarray) -> bool:
    return bool(np.isfinite(a).all() and np.abs(a - b).max() > 1e-3)


def processors(pipe) -> set[type]:
    return {type(processor) for processor in pipe.unet.attn_processors.values()}


@pytest.mark.feature("IP-Adapter")
def test_ip_adapter(pipe, before):
    state = ip_adapter(pipe.unet)
    pipe.load_ip_adapter(state, subfolder="", weight_name="", image_encoder_folder=None)
    embedding = [torch.randn(2, 1, 8, generator=torch.Generator().manual_seed(5)).bfloat16()]
    pictured = sample(pipe, ip_adapter_image_embeds=embedding)
    assert differs(pictured, before)
    pipe.set_ip_adapter_scale(0.0)
    assert np.allclose(sample(pipe, ip_adapter_image_embeds=embedding), before, atol=0.05)
    set_engine(pipe, "auto")  # again: processors that are not diffusers' own stay
    pipe.set_ip_adapter_scale(1.0)
    assert np.allclose(sample(pipe, ip_adapter_image_embeds=embedding), pictured, atol=0.05)
    pipe.unload_ip_adapter()
    set_engine(pipe, "auto")
    assert processors(pipe) == {BF16AttnProcessor}
    assert (sample(pipe) == before).all()


@pytest.mark.feature("LCM-LoRA and other LoRA files, also for text encoders")
def test_lcm_lora(pipe, before, tmp_path):
    teacher = pipelines.make_small_pipe()
    layers = {}
    for part, targets in (("unet", ["to_q", "conv1", "proj_in"]), ("text_encoder", ["q_proj", "fc1"])):
        model = getattr(teacher, part)
        model.add_adapter(LoraConfig(r=2, lora_alpha=2, target_modules=targets), adapter_name="lcm")
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        layers[f"{part}_lora_layers"] = get_peft_model_state_dict(model, adapter_name="lcm")
    StableDiffusionPipeline.save_lora_weights(tmp_path, **layers)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    plain = sample(pipe)
    pipe.load_lora_weights(str(tmp_path), adapter_name="lcm", weight_name="pytorch_lora_weights.safetensors")
    assert any("lora_A" in name for name, _ in pipe.text_encoder.named_modules())
    adapted = sample(pipe)
    assert differs(adapted, plain)
    with pytest.raises(UnsupportedError, match="`fuse_lora` is not possible"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert (sample(pipe) == plain).all()


@pytest.mark.feature("Textual inversion")
def test_textual_inversion(pipe, before):
    embedding = {"<fox>": torch.randn(16, generator=torch.Generator().manual_seed(6))}
    pipe.load_textual_inversion(embedding, token="<fox>")
    assert len(pipe.tokenizer) == pipe.text_encoder.get_input_embeddings().num_embeddings
    assert differs(sample(pipe, {"prompt": "a <fox>"}), before)
    assert (sample(pipe) == before).all()


@pytest.mark.feature("FreeU")
def test_freeu(pipe, before):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    assert differs(sample(pipe), before)
    pipe.disable_freeu()
    assert (sample(pipe) == before).all()


class MergingBlock(BasicTransformerBlock):
    """As tomesd's: the block's class is exchanged, its attention to itself sees pairs of tokens as one."""

    def forward(self, hidden_states, *args, **kwargs):
        whole, attend = hidden_states, self.attn1.forward
        self.attn1.forward = lambda x, *a, **k: attend((x[:, ::2] + x[:, 1::2]) / 2, *a, **k).repeat_interleave(2, 1)
        try:
            return super().forward(whole, *args, **kwargs)
        finally:
            del self.attn1.forward


@pytest.mark.feature("Token merging (the way of tomesd)")
def test_token_merging(pipe, before):
    blocks = [module for module in pipe.unet.modules() if type(module) is BasicTransformerBlock]
    for block in blocks:
        block.__class__ = MergingBlock
    assert blocks
    assert differs(sample(pipe), before)
    for block in blocks:
        block.__class__ = BasicTransformerBlock
    assert (sample(pipe) == before).all()


def near(a: np.ndarray, b: np.ndarray, room: float = 0.05) -> bool:
    """Equal but for values on a border, which what rounds elsewhere moves a step."""
    return bool(np.linalg.norm(a - b) <= room * np.linalg.norm(b))


@pytest.mark.feature("Attention slicing and processors of one's own")
def test_attention_processors(pipe, before):
    assert processors(pipe) == {BF16AttnProcessor}
    pipe.enable_attention_slicing(1)
    assert processors(pipe) == {SlicedAttnProcessor}
    assert near(sample(pipe), before)
    pipe.disable_attention_slicing()
    assert near(sample(pipe), before)
    pipe.unet.set_attn_processor(AttnProcessor())
    set_engine(pipe, "auto")
    assert processors(pipe) == {AttnProcessor}
    assert near(sample(pipe), before)
    pipe.unet.set_attn_processor(AttnProcessor2_0())
    set_engine(pipe, "auto")
    assert (sample(pipe) == before).all()
    assert {type(processor) for processor in pipe.vae.attn_processors.values()} == {AttnProcessor2_0}
    pipe.unet.set_default_attn_processor()
    assert processors(pipe) == {AttnProcessor}
    assert near(sample(pipe), before)


class Watching(TorchFunctionMode):
    """As diffusers' `AttentionScoreSkipFunctionMode`: looks for attention among torch's functions."""

    def __init__(self, note) -> None:
        super().__init__()
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):  # noqa: ARG002
        if func is F.scaled_dot_product_attention:
            self.note()
        return func(*args, **(kwargs or {}))


@pytest.mark.feature("Attention of somebody's own in the place of diffusers' or torch's, also by hooks and guiders")
@pytest.mark.parametrize("way", ["class", "wraps", "function", "mode"])
def test_attention_in_the_place_of_the_original(way, pipe, monkeypatch):
    monkeypatch.setattr(attention, "_FEW", 0)  # else torch's own call is what runs on few tokens
    calls = []

    def around(original):
        def call(*args, **kwargs):
            calls.append(way)
            return original(*args, **kwargs)

        return functools.wraps(original)(call) if way == "wraps" else call

    if way == "function":
        monkeypatch.setattr(F, "scaled_dot_product_attention", around(F.scaled_dot_product_attention))
    elif way != "mode":
        monkeypatch.setattr(AttnProcessor2_0, "__call__", around(AttnProcessor2_0.__call__))
    found = []
    for engine in ("auto", "reference"):
        set_engine(pipe, engine)
        calls.clear()
        with Watching(lambda: calls.append(way)) if way == "mode" else nullcontext(), torch.no_grad():
            context = torch.ones(2, 5, pipe.unet.config.cross_attention_dim).bfloat16()
            assert pipe.unet(torch.ones(2, 4, 8, 8).bfloat16(), 500, context).sample.isfinite().all()
        found.append(len(calls))
    assert found[0] == found[1] > 0


def test_processors_count_as_what_they_stand_for(pipe):
    (one,) = {type(each): each for each in pipe.unet.attn_processors.values()}.values()
    assert type(one) is BF16AttnProcessor
    assert one.__class__ is AttnProcessor2_0
    assert AttentionProcessorRegistry.get(one.__class__).skip_processor_output_fn is not None
    assert type(pickle.loads(pickle.dumps(one))) is type(copy.deepcopy(one)) is BF16AttnProcessor
    pipe.unet.set_default_attn_processor()
    assert processors(pipe) == {AttnProcessor}


@pytest.mark.feature("VAE slicing and tiling, of a quantized VAE too")
def test_vae_slicing_and_tiling():
    pipe = pipelines.make_small_pipe()
    pipe.vae = make_vae(block_out_channels=(8, 8), norm_num_groups=4, sample_size=16, **TWO_LEVELS)
    pipe.register_modules(vae=pipe.vae)
    quantize_pipeline(pipe, MSFPConfig("w8a8", components_to_quantize=["vae"]), num_samples=1, num_inference_steps=2)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        whole = pipe.vae.decode(latents).sample
        pipe.vae.enable_slicing()
        assert torch.allclose(pipe.vae.decode(latents).sample, whole, atol=0.1)
        pipe.vae.disable_slicing()
        pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 8
        pipe.vae.enable_tiling()
        tiled = pipe.vae.decode(latents).sample
        pipe.vae.disable_tiling()
        assert torch.equal(pipe.vae.decode(latents).sample, whole)
    assert tiled.shape == whole.shape
    assert not torch.equal(tiled, whole)


def agrees_under(attach, pipe: StableDiffusionPipeline) -> None:
    """A norm gives floats in bfloat16 instead of codes where hooks replace a forward; else it is equal bit for bit."""
    for engine, room in (("auto", 0.05), ("reference", 0.0)):
        set_engine(pipe.unet, engine)
        hooked = copy.deepcopy(pipe)
        attach(hooked)
        before = sample(pipe)
        assert near(sample(hooked), before, room), engine


@pytest.mark.feature("`enable_model_cpu_offload` (its hooks, on a CPU)")
def test_model_offload(pipe):
    agrees_under(lambda pipe: pipe.enable_model_cpu_offload(device="cpu"), pipe)


@pytest.mark.feature("an IP-Adapter, casts and moves after `enable_model_cpu_offload`")
def test_what_accelerate_has_taken_away(pipe):
    """Its hooks put `to` and its like on the models, and take away what stands there after each run."""
    assert not {"to", "cuda", "cpu"} & vars(pipe.unet).keys()
    pipe.enable_model_cpu_offload(device="cpu")
    sample(pipe)
    assert pipe.unet.to("cpu", pipe.unet.dtype) is pipe.unet
    with pytest.raises(UnsupportedError, match="cannot be cast"):
        pipe.unet.to(torch.float16)
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder="", weight_name="", image_encoder_folder=None)
    assert any("IPAdapter" in each.__name__ for each in processors(pipe))


def test_methods_of_mixins_behind_a_base_are_called():
    class Counting(torch.nn.Module):
        calls = 0

        def cpu(self):
            Counting.calls += 1
            return super().cpu()

    class Net(ModelMixin, Counting):
        pass

    net = Net()
    assert net.cpu() is net
    assert Counting.calls == 1


@pytest.mark.feature("`enable_group_offload` (its hooks, on a CPU)")
def test_group_offload(pipe):
    cpu = torch.device("cpu")
    agrees_under(lambda pipe: pipe.enable_group_offload(cpu, cpu, offload_type="leaf_level"), pipe)


@pytest.mark.feature("`set_engine` while a model is offloaded (hooks, on a CPU)")
def test_another_engine_under_group_offload(pipe):
    hooked = copy.deepcopy(pipe)
    cpu = torch.device("cpu")
    hooked.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    for engine in ("reference", "auto"):
        for each in (pipe, hooked):
            set_engine(each.unet, engine)
        assert near(sample(hooked), sample(pipe), 0.05), engine


@pytest.mark.feature("`callback_on_step_end`, `guidance_rescale`, changed batch within a run")
def test_callbacks_and_guidance(pipe, before):
    seen = []

    def without_guidance(pipe, step, timestep, tensors):
        seen.append((step, int(timestep)))
        pipe._guidance_scale = 0.0
        return {**tensors, "prompt_embeds": tensors["prompt_embeds"].chunk(2)[-1]}

    inputs = ["latents", "prompt_embeds"]
    ended = sample(pipe, callback_on_step_end=without_guidance, callback_on_step_end_tensor_inputs=inputs)
    assert [step for step, _ in seen] == [*range(len(seen))]
    assert len(seen) >= 2
    assert differs(ended, before)
    assert differs(sample(pipe, guidance_rescale=0.7), before)
    assert (sample(pipe) == before).all()


@pytest.mark.feature("`from_pipe`")
def test_from_pipe(pipe, before):
    other = StableDiffusionImg2ImgPipeline.from_pipe(pipe, dtype=torch.bfloat16)
    assert other.unet is pipe.unet
    image = pipelines.picture().bfloat16()
    assert np.isfinite(sample(other, {"prompt": "a hat", "image": image})).all()
    assert (sample(pipe) == before).all()


def test_nothing_is_cast_where_one_part_refuses():
    pipe = pipelines.make_small_pipe().to(torch.bfloat16)  # its text encoder comes before the UNet
    quantize_model(pipe.unet, MSFPConfig("w4a16"))
    dtypes = {name: part.dtype for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    modular = ModularPipeline.__new__(ModularPipeline)
    modular._component_specs = dict.fromkeys(pipe.components, None)
    vars(modular).update(pipe.components)
    others = (lambda: StableDiffusionImg2ImgPipeline.from_pipe(pipe), lambda: modular.to(torch.float16))
    for cast in (lambda: pipe.to(torch.float16), *others):
        with pytest.raises(UnsupportedError, match="cannot be cast"):
            cast()
        assert dtypes == {name: getattr(pipe, name).dtype for name in dtypes}


@pytest.mark.feature("`torch.compile` of denoiser and text encoder")
def test_compile(pipe, before):
    pipe.unet.compile(backend="eager")
    pipe.text_encoder.compile(backend="aot_eager")
    assert np.abs(sample(pipe) - before).mean() < 0.05


@pytest.mark.feature("ControlNet's residuals under fused norms")
@torch.no_grad()
def test_engines_agree_with_residuals():
    pipe = pipelines.make_controlnet()
    arguments = {"prompt": "a hat", "image": pipelines.picture()}
    config = MSFPConfig("w8a8", components_to_quantize=["unet", "controlnet"])
    quantize_pipeline(pipe, config, num_samples=1, num_inference_steps=2, image=arguments["image"])
    assert any(isinstance(module, QuantLayer) for module in pipe.controlnet.modules())
    fast = sample(pipe, arguments)
    set_engine(pipe, "reference")
    assert np.allclose(sample(pipe, arguments), fast, atol=0.05)
    with_bias = sample(pipe, arguments, controlnet_conditioning_scale=0.0)
    assert differs(with_bias, sample(pipe, arguments))


@pytest.mark.feature("`fuse_lora`, `fuse_qkv_projections`, casting after loading", "refused, with the way out")
def test_refused(pipe, before):
    for call in (pipe.unet.fuse_lora, pipe.fuse_qkv_projections, lambda: pipe.to(torch.float16), pipe.unet.half):
        with pytest.raises(UnsupportedError, match="dequantize|`dtype=|diffusers_msfp.fuse_lora"):
            call()
    assert (sample(pipe) == before).all()

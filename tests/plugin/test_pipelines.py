"""A latent diffusion pipeline with prompts and classifier-free guidance, made from code."""

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from pipelines import make_pipe

from diffusers_msfp import FinetuneConfig, calibration_state, finetune, quantize_pipeline
from diffusers_msfp.errors import ConfigError, UnsupportedError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.layers import QuantLayer

PROMPTS = ["a red fox", "a boat", "a hat"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> tuple[str, str]:
    """Float and quantized."""
    path = tmp_path_factory.mktemp("sd")
    pipe = make_pipe()
    pipe.save_pretrained(path / "float")
    quantize_pipeline(pipe, "w4a8", num_samples=2, num_inference_steps=3, prompts=PROMPTS)
    pipe.save_pretrained(path / "packed")
    return str(path / "float"), str(path / "packed")


def sample(pipe) -> np.ndarray:
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe("a red fox", num_inference_steps=3, generator=generator, output_type="np").images


def test_stays_a_stock_pipeline_and_reloads_bit_identical(folders):
    pipe, again = (DiffusionPipeline.from_pretrained(folders[1]) for _ in range(2))
    assert type(pipe) is StableDiffusionPipeline
    assert calibration_state(pipe) == "frozen"
    assert not any(isinstance(m, QuantLayer) for m in pipe.vae.modules())
    assert (sample(pipe) == sample(again)).all()


def test_compare_with_guidance(folders):
    reference, candidate = (DiffusionPipeline.from_pretrained(folder) for folder in folders)
    result = compare_pipelines(reference, candidate, num_samples=2, num_inference_steps=3, prompts=PROMPTS)
    assert 0 < result.eps_rel_l2 < 0.3
    assert len(result.eps_rel_l2_by_timestep) == 3
    same = compare_pipelines(reference, reference, num_samples=1, num_inference_steps=2)
    assert same.eps_mse == 0
    assert same.image_psnr_db == 100


def test_style_lora_through_the_pipeline(folders, tmp_path):
    teacher = DiffusionPipeline.from_pretrained(folders[0])
    teacher.unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "conv1"]), adapter_name="style")
    for name, parameter in teacher.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    layers = get_peft_model_state_dict(teacher.unet, adapter_name="style")
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers)

    pipe = DiffusionPipeline.from_pretrained(folders[1])
    before = sample(pipe)
    weights = {"weight_name": "pytorch_lora_weights.safetensors"}
    pipe.load_lora_weights(str(tmp_path), adapter_name="style", **weights)
    styled = sample(pipe)
    assert not np.allclose(styled, before, atol=1e-3)
    pipe.set_adapters("style", 0.5)
    assert not np.allclose(sample(pipe), styled, atol=1e-3)
    with pytest.raises(UnsupportedError, match="`fuse_lora` is not possible"):
        pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert (sample(pipe) == before).all()


def test_adapters_with_prompts_guidance_style_lora_and_img2img(folders, tmp_path):
    teacher, pipe = (DiffusionPipeline.from_pretrained(folder) for folder in folders)
    for each in (teacher, pipe):
        each.set_progress_bar_config(disable=True)
    settings = {"train_steps": 3, "num_inference_steps": 4, "batch_size": 2, "rank": 4, "placement": "side"}
    rows = []
    handle = teacher.unet.register_forward_hook(lambda _model, _args, output: rows.append(len(output[0])))
    result = finetune(pipe, teacher, FinetuneConfig(**settings, preview_every=3), prompts=PROMPTS, guidance_scale=5.0)
    handle.remove()
    assert set(rows) == {4}  # two samples, with and without prompt
    assert result.updates == 3
    pipe.unet.timestep_router.table[:, :500] = 0
    pipe.unet.timestep_router.table[:, 500:] = 1
    pipe.save_pretrained(tmp_path / "tuned")
    again = DiffusionPipeline.from_pretrained(tmp_path / "tuned")
    assert type(again) is StableDiffusionPipeline
    before = sample(again)
    assert (sample(pipe) == before).all()

    seen = []
    again.unet.register_forward_hook(lambda *_: seen.append(again.unet.timestep_router.route(0).uniform))
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(2))
    image_to_image = StableDiffusionImg2ImgPipeline(**again.components, requires_safety_checker=False)
    image_to_image.set_progress_bar_config(disable=True)
    image_to_image("a hat", image=picture, strength=0.4, num_inference_steps=10)
    assert set(seen) == {0}, "only the end of the trajectory"

    again.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "conv1"]), adapter_name="style")
    for name, parameter in again.unet.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    assert not np.allclose(sample(again), before, atol=1e-3)
    again.unload_lora_weights()
    assert (sample(again) == before).all()


def test_prompts_must_be_strings(folders):
    pipe = DiffusionPipeline.from_pretrained(folders[1])
    with pytest.raises(ConfigError, match="non-empty list of strings"):
        compare_pipelines(pipe, pipe, prompts=[])

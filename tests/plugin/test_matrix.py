"""Which pipelines and samplers work: quantized, saved and reloaded, they sample the same. README's tables read this."""

from collections.abc import Callable
from typing import NamedTuple

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from conftest import make_dit_pipe
from diffusers import DiffusionPipeline

from diffusers_msfp import MSFPConfig, calibration_state, quantize_pipeline
from diffusers_msfp.layers import QuantLayer

PROMPT = {"prompt": "a red fox"}
IMAGE = {"image": pipelines.picture()}
MASK = {"mask_image": pipelines.picture(channels=1)}
SMALL = {"height": 8, "width": 8, "max_sequence_length": 8}


class Case(NamedTuple):
    """How a pipeline is made, what of it is quantized, and what its calls need."""

    make: Callable[[], DiffusionPipeline]
    components: tuple[str, ...]
    arguments: dict


PIPELINES = {
    "Stable Diffusion": Case(pipelines.make_small_pipe, ("unet", "text_encoder", "vae"), PROMPT),
    "Stable Diffusion, image to image": Case(pipelines.make_img2img, ("unet", "text_encoder"), PROMPT | IMAGE),
    "Stable Diffusion, inpainting": Case(pipelines.make_inpainting, ("unet",), PROMPT | IMAGE | MASK),
    "Stable Diffusion with ControlNet": Case(pipelines.make_controlnet, ("unet", "controlnet"), PROMPT | IMAGE),
    "Stable Diffusion XL": Case(pipelines.make_sdxl, ("unet", "text_encoder", "text_encoder_2"), PROMPT),
    "Stable Diffusion 3": Case(
        pipelines.make_sd3,
        ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3"),
        PROMPT | SMALL,
    ),
    "Flux": Case(pipelines.make_flux, ("transformer", "text_encoder", "text_encoder_2"), PROMPT | SMALL),
    "Latent diffusion with VQ": Case(pipelines.make_latent_diffusion, ("unet",), {}),
    "DiT": Case(make_dit_pipe, ("transformer",), {"class_labels": [1]}),
}
SCHEDULERS = {
    "DDIM": "DDIMScheduler",
    "PNDM": "PNDMScheduler",
    "Euler": "EulerDiscreteScheduler",
    "Euler ancestral": "EulerAncestralDiscreteScheduler",
    "DPM++": "DPMSolverMultistepScheduler",
    "UniPC": "UniPCMultistepScheduler",
    "LCM": "LCMScheduler",
}


def sample(pipe, arguments: dict = PROMPT, **more) -> np.ndarray:
    """Two steps with equal noise."""
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipe(**arguments, num_inference_steps=2, generator=generator, output_type="np", **more).images


def check_round_trip(case: Case, pipe: DiffusionPipeline, folder) -> None:
    reference = sample(pipe, case.arguments)
    own = {key: value for key, value in case.arguments.items() if key not in ("prompt", "class_labels")}
    config = MSFPConfig("w4a8", components_to_quantize=case.components)
    quantize_pipeline(pipe, config, num_samples=1, num_inference_steps=2, **own)
    pipe.save_pretrained(folder)
    expected = sample(pipe, case.arguments)
    again = DiffusionPipeline.from_pretrained(folder)
    assert type(again) is type(pipe)
    assert type(again.scheduler) is type(pipe.scheduler)
    assert calibration_state(again) == "frozen"
    for name, part in again.components.items():
        if isinstance(part, torch.nn.Module):
            assert any(isinstance(m, QuantLayer) for m in part.modules()) == (name in case.components), name
    assert np.isfinite(expected).all()
    assert 0 < np.abs(expected - reference).mean() < 0.2
    assert (sample(again, case.arguments) == expected).all()


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name, tmp_path):
    case = PIPELINES[name]
    check_round_trip(case, case.make(), tmp_path)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name, tmp_path):
    pipe = pipelines.make_small_pipe()
    pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config | {"clip_sample": False})
    check_round_trip(Case(pipelines.make_small_pipe, ("unet",), PROMPT), pipe, tmp_path)

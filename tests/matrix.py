"""The pipelines and samplers that are shown to work, and how they are called. README's tables read this."""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pipelines
import torch
from conftest import make_dit_pipe
from diffusers import DiffusionPipeline

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

"""`sample`: pictures from a pipeline."""

from pathlib import Path

import numpy as np
import torch
from diffusers import DDPMScheduler

from ..errors import ConfigError
from ..evaluation import image_grid, with_ddim
from ..workflow.sampling import batched_calls, call_arguments, counting_steps, denoiser_of, quiet, require_positive
from .load import load_pipeline
from .terminal import progress


def sample_images(
    pipe, *, num: int, steps: int, seed: int = 0, prompts: list[str] | None = None, on_step=None
) -> np.ndarray:
    """Pictures `(num, H, W, channels)` in [0, 1]; ancestral DDPM, which needs all its steps, is replaced by DDIM."""
    require_positive(num=num, steps=steps)
    if isinstance(pipe.scheduler, DDPMScheduler):
        pipe = with_ddim(pipe)
    denoiser = denoiser_of(pipe)
    calls = batched_calls(call_arguments(pipe, prompts, steps, {"output_type": "np"}), [denoiser], num, seed)
    with quiet(pipe), torch.no_grad(), counting_steps(denoiser, len(calls) * steps, on_step):
        return np.concatenate([pipe(**call).images for call in calls])


def sample(
    source: str, out: str | Path, *, num: int = 16, steps: int = 50, seed: int = 0, prompts: list[str] | None = None
) -> dict:
    """Draw pictures and write them as one grid.

    Args:
        source (`str`): folder, Hub id or single file of a pipeline, quantized or not.
        out (`str` or `Path`): PNG to write.
        num, steps, seed (`int`): pictures, denoising steps, seed of the noise.
        prompts (`list[str]`, *optional*): for pipelines that take prompts.

    Returns:
        `dict`: `out`, `num`, `steps`, `seed`.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"`out` must end in .png, but {out} came.")
    pipe = load_pipeline(source)
    with progress("sampling") as report:
        images = sample_images(pipe, num=num, steps=steps, seed=seed, prompts=prompts, on_step=report)
    grid = image_grid(images, columns=min(num, 8), scale=max(1, 96 // images.shape[1]))
    out.parent.mkdir(parents=True, exist_ok=True)
    grid.save(out)
    return {"out": str(out), "num": num, "steps": steps, "seed": seed}

"""Pictures from a pipeline, as people look at them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw

from ...results import OnProgress
from ...sampling.calls import batched_calls, call_arguments, counting_steps, quiet, require_positive
from ...sampling.denoisers import denoisers_of
from ...sampling.solvers import without_ancestral
from .samples import pictures_tensor

MARGIN = 4
LABEL_HEIGHT = 20


def image_grid(images: np.ndarray, *, columns: int, scale: int = 1, labels: Sequence[str] | None = None) -> Image.Image:
    """Images side by side, with a title above each row if there are labels.

    Args:
        images (`np.ndarray`, `(N, H, W, 1 or 3)`, float in [0, 1]).
        columns (`int`): images per row.
        scale (`int`): enlargement by whole pixels.
        labels (`Sequence[str]`, *optional*): one per row.
    """
    pixels = (np.clip(images, 0, 1) * 255).round().astype(np.uint8)
    if pixels.shape[-1] == 1:
        pixels = pixels.repeat(3, axis=-1)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    number, height, width, _ = pixels.shape
    rows = -(-number // columns)
    title = LABEL_HEIGHT if labels else 0
    row_height = title + height + MARGIN
    sheet = Image.new("RGB", (MARGIN + columns * (width + MARGIN), MARGIN + rows * row_height), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels or ()):
        draw.text((MARGIN, MARGIN + row * row_height + 2), label, fill="black", font_size=13)
    for index, picture in enumerate(pixels):
        row, column = divmod(index, columns)
        corner = (MARGIN + column * (width + MARGIN), MARGIN + row * row_height + title)
        sheet.paste(Image.fromarray(picture), corner)
    return sheet


def sample_images(
    pipe: DiffusionPipeline,
    *,
    num_samples: int,
    num_inference_steps: int,
    seed: int = 0,
    prompts: list[str] | None = None,
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> np.ndarray:
    """Pictures `(N, H, W, channels)` in [0, 1]; ancestral DDPM, which needs all its steps, is replaced by DDIM.

    Args:
        pipe (`DiffusionPipeline`): not changed.
        num_samples, num_inference_steps, seed (`int`): pictures, denoising steps, seed of the noise.
        prompts (`list[str]`, *optional*): taken in turn where the pipeline takes prompts.
        on_progress (`OnProgress`, *optional*): called with (done, total) after each step.
        **arguments: passed on to the pipeline.
    """
    require_positive(num_samples=num_samples, num_inference_steps=num_inference_steps)
    pipe = without_ancestral(pipe, arguments)
    denoisers = list(denoisers_of(pipe).values())
    calls = batched_calls(
        call_arguments(pipe, prompts, num_inference_steps, {"output_type": "np"} | arguments),
        denoisers,
        num_samples,
        seed,
    )
    with quiet(pipe), torch.no_grad(), counting_steps(denoisers, len(calls) * num_inference_steps, on_progress):
        return np.concatenate([_pictures(call.run(pipe)) for call in calls])


def _pictures(output: object) -> np.ndarray:
    """Those of a call, of videos the first frames."""
    pictures = pictures_tensor(output)
    pictures = pictures[:, 0] if pictures.ndim == 5 else pictures
    return pictures.movedim(-3, -1).numpy()

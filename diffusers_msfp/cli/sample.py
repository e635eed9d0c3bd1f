"""`sample`: pictures from a pipeline."""

from dataclasses import dataclass
from pathlib import Path

from ..errors import ConfigError
from ..evaluation import image_grid, sample_images
from ..outputs import png_of, require_writable_file, write_file
from ..results import Result
from .shared.calls import call_settings
from .shared.load import load_pipeline, require_variant
from .shared.terminal import progress


@dataclass(frozen=True, kw_only=True)
class Sampled(Result):
    """What `sample` wrote.

    Args:
        out (`str`): the PNG.
        num_samples, num_inference_steps, seed (`int`): of its pictures.
    """

    out: str
    num_samples: int
    num_inference_steps: int
    seed: int


def sample(
    source: str,
    out: str | Path,
    *,
    num_samples: int = 16,
    num_inference_steps: int = 50,
    seed: int = 0,
    prompts: list[str] | None = None,
    guidance_scale: float | None = None,
    variant: str | None = None,
) -> Sampled:
    """Draw pictures and write them as one grid.

    Args:
        source (`str`): folder, Hub id or single file of a pipeline, quantized or not.
        out (`str` or `Path`): PNG to write.
        num_samples, num_inference_steps, seed (`int`): pictures, denoising steps, seed of the noise.
        prompts (`list[str]`, *optional*): for pipelines that take prompts.
        guidance_scale (`float`, *optional*): for pipelines with guidance; the pipeline's own by default.
        variant (`str`, *optional*): of the weights, like `"fp16"`.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"`out` must end in .png, but got {out}.")
    require_writable_file(out)
    require_variant(variant, source)
    pipe = load_pipeline(source, variant=variant)
    arguments = call_settings(pipe, prompts, guidance_scale)
    with progress("sampling") as report:
        images = sample_images(
            pipe,
            num_samples=num_samples,
            num_inference_steps=num_inference_steps,
            seed=seed,
            prompts=prompts,
            on_progress=report,
            **arguments,
        )
    grid = image_grid(images, columns=min(num_samples, 8), scale=max(1, 96 // images.shape[1]))
    write_file(out, png_of(grid))
    return Sampled(out=str(out), num_samples=num_samples, num_inference_steps=num_inference_steps, seed=seed)

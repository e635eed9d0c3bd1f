"""`sample`: pictures from a pipeline."""

from pathlib import Path

from ..errors import ConfigError
from ..evaluation import image_grid, sample_images
from ..outputs import require_writable_file, writing
from .load import load_pipeline, require_variant
from .terminal import progress


def sample(
    source: str,
    out: str | Path,
    *,
    num: int = 16,
    steps: int = 50,
    seed: int = 0,
    prompts: list[str] | None = None,
    variant: str | None = None,
) -> dict:
    """Draw pictures and write them as one grid.

    Args:
        source (`str`): folder, Hub id or single file of a pipeline, quantized or not.
        out (`str` or `Path`): PNG to write.
        num, steps, seed (`int`): pictures, denoising steps, seed of the noise.
        prompts (`list[str]`, *optional*): for pipelines that take prompts.
        variant (`str`, *optional*): of the weights, like `"fp16"`.

    Returns:
        `dict`: `out`, `num`, `steps`, `seed`.
    """
    out = Path(out)
    if out.suffix.lower() != ".png":
        raise ConfigError(f"`out` must end in .png, but got {out}.")
    require_writable_file(out)
    require_variant(variant, source)
    pipe = load_pipeline(source, variant=variant)
    with progress("sampling") as report:
        images = sample_images(pipe, num=num, steps=steps, seed=seed, prompts=prompts, on_step=report)
    grid = image_grid(images, columns=min(num, 8), scale=max(1, 96 // images.shape[1]))
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        grid.save(out)
    return {"out": str(out), "num": num, "steps": steps, "seed": seed}

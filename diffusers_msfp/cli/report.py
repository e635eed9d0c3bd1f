"""`report`: one HTML page on the quality of a quantized checkpoint."""

from dataclasses import dataclass
from pathlib import Path
from typing import cast

from diffusers import DiffusionPipeline

from ..errors import ConfigError
from ..outputs import require_writable_file, write_file
from ..report import Report, collect_report, render_report
from ..sampling.denoisers import denoiser_name, denoiser_of
from .shared.calls import call_settings
from .shared.load import fetch, load_any, load_pipeline, loading_in, model_bytes, require_variant
from .shared.terminal import progress


@dataclass(frozen=True, kw_only=True)
class CheckpointReport(Report):
    """A `Report` of checkpoints.

    Args:
        name (`str`), reference (`str`, *optional*): what they are called.
        bytes_quantized (`int`), bytes_reference (`int`, *optional*): weight files of the denoiser.
        out (`str`): the page.
    """

    name: str
    reference: str | None
    bytes_quantized: int
    bytes_reference: int | None
    out: str


def report(
    candidate: str,
    out: str | Path,
    *,
    reference: str | None = None,
    num_samples: int = 8,
    num_inference_steps: int = 20,
    seed: int = 0,
    prompts: list[str] | None = None,
    guidance_scale: float | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    speed: bool = True,
    overwrite: bool = False,
) -> CheckpointReport:
    """Measure a checkpoint and write a page about it, which is there only when it is complete.

    Args:
        candidate (`str`): folder or Hub id of a pipeline, or folder of a denoiser; quantized by this or another
            package.
        out (`str` or `Path`): HTML file to write.
        reference (`str`, *optional*): the full-precision pipeline.
        num_samples, num_inference_steps, seed, prompts: see `collect_report`.
        guidance_scale (`float`, *optional*): for pipelines with guidance; the pipeline's own by default.
        variant (`str`, *optional*): of the weights, where a model has it.
        dtype (`str`): that the checkpoint runs in.
        speed (`bool`): time a step.
        overwrite (`bool`): replace an existing page.

    Raises:
        MSFPError: see `collect_report`; or something cannot be loaded, or the page exists.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"`out` must end in .html, but got {out}.")
    if out.exists() and not out.is_dir() and not overwrite:
        raise ConfigError(f"{out} must not exist yet, but it does. Choose another file, or pass `--overwrite`.")
    in_dtype = loading_in(dtype)
    require_writable_file(out)
    require_variant(variant, candidate, reference)
    original = load_pipeline(reference, variant=variant) if reference is not None else None
    folder = fetch(candidate, variant)
    loaded = load_any(str(folder), variant=variant, **in_dtype)
    drawn = loaded if isinstance(loaded, DiffusionPipeline) else original
    arguments = call_settings(drawn, prompts, guidance_scale)
    size = None
    if original is not None:
        size = model_bytes(cast(str, reference), denoiser_of(original), denoiser_name(original), variant)
    with progress("measuring") as told:
        found = collect_report(
            loaded,
            original,
            folder=folder,
            num_samples=num_samples,
            num_inference_steps=num_inference_steps,
            seed=seed,
            prompts=prompts,
            with_speed=speed,
            on_progress=told,
            **arguments,
        )
    model = denoiser_of(loaded) if isinstance(loaded, DiffusionPipeline) else loaded
    result = CheckpointReport(
        **vars(found),
        name=_short(candidate),
        reference=reference and _short(reference),
        bytes_quantized=model_bytes(str(folder), model, found.component, variant),
        bytes_reference=size,
        out=str(out),
    )
    write_file(out, render_report(result))
    return result


def _short(source: str) -> str:
    """A Hub id as it is, a folder's own name: where it lies is nobody's business."""
    return Path(source).resolve().name if Path(source).exists() else source

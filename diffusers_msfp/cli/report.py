"""`report`: one HTML page on the quality of a quantized checkpoint."""

from pathlib import Path
from typing import cast

import torch
from diffusers import DiffusionPipeline

from ..errors import ConfigError
from ..outputs import require_writable_file
from ..report import collect_report, render_report
from ..sampling.denoisers import denoiser_name, denoiser_of
from .shared.calls import call_settings
from .shared.load import fetch, load_any, load_pipeline, model_bytes, require_variant
from .shared.store import write_text
from .shared.terminal import progress

DTYPES = ("float32", "bfloat16", "float16")


def report(
    source: str,
    out: str | Path,
    *,
    reference: str | None = None,
    num: int = 8,
    steps: int = 20,
    seed: int = 0,
    prompts: list[str] | None = None,
    guidance_scale: float | None = None,
    variant: str | None = None,
    dtype: str = "float32",
    speed: bool = True,
    overwrite: bool = False,
) -> dict:
    """Measure a checkpoint and write a page about it, which is there only when it is complete.

    Args:
        source (`str`): folder or Hub id of a pipeline, or folder of a denoiser; quantized by this or another package.
        out (`str` or `Path`): HTML file to write.
        reference (`str`, *optional*): the full-precision pipeline.
        num, steps, seed, prompts: see `collect_report`.
        guidance_scale (`float`, *optional*): for pipelines with guidance; the pipeline's own by default.
        variant (`str`, *optional*): of the weights, where a model has it.
        dtype (`str`): that the checkpoint runs in.
        speed (`bool`): time a step.
        overwrite (`bool`): replace an existing page.

    Returns:
        `dict`: see `collect_report`, with `name`, `reference`, `bytes` and `bytes_reference` (weight files of the
        denoiser), `out`.

    Raises:
        MSFPError: see `collect_report`; or something cannot be loaded, or the page exists.
    """
    out = Path(out)
    if out.suffix.lower() not in (".html", ".htm"):
        raise ConfigError(f"`out` must end in .html, but got {out}.")
    if out.exists() and not out.is_dir() and not overwrite:
        raise ConfigError(f"{out} must not exist yet, but it does. Choose another file, or pass `--overwrite`.")
    if dtype not in DTYPES:
        raise ConfigError(f"`dtype` must be one of {', '.join(DTYPES)}, but got {dtype!r}.")
    require_writable_file(out)
    require_variant(variant, source, reference)
    original = load_pipeline(reference, variant=variant) if reference is not None else None
    folder = fetch(source, variant)
    candidate = load_any(
        str(folder), variant=variant, **({} if dtype == "float32" else {"dtype": getattr(torch, dtype)})
    )
    drawn = candidate if isinstance(candidate, DiffusionPipeline) else original
    arguments = call_settings(drawn, prompts, guidance_scale)
    with progress("measuring") as told:
        data = collect_report(
            candidate,
            original,
            folder=folder,
            num_samples=num,
            num_inference_steps=steps,
            seed=seed,
            prompts=prompts,
            with_speed=speed,
            on_step=told,
            **arguments,
        )
    model = denoiser_of(candidate) if isinstance(candidate, DiffusionPipeline) else candidate
    data |= {"name": _short(source), "reference": reference and _short(reference), "out": str(out)}
    data["bytes"] = model_bytes(str(folder), model, data["component"], variant)
    data["bytes_reference"] = original and model_bytes(
        cast(str, reference), denoiser_of(original), denoiser_name(original), variant
    )
    write_text(render_report(data), out)
    return data


def _short(source: str) -> str:
    """A Hub id as it is, a folder's own name: where it lies is nobody's business."""
    return Path(source).resolve().name if Path(source).exists() else source

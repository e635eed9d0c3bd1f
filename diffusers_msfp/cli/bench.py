"""`bench`: how fast a model's step is in several ways."""

from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..evaluation.timing.shapes import SHAPES
from ..evaluation.timing.speed import benchmark
from ..sampling.denoisers import denoiser_of
from .shared.load import load_any, require_variant
from .shared.terminal import progress, stderr

DEFAULT_PROVIDERS = ("fp32", "bf16", "w4a4", "w4a8")


def bench(
    model: str = "ddpm-cifar10",
    providers: list[str] | None = None,
    *,
    batch: int = 1,
    size: int | None = None,
    steps: int = 1,
    repeats: int = 7,
    variant: str | None = None,
    skip_missing: bool = False,
) -> dict:
    """Time one denoising step.

    Args:
        model (`str`): a name in `SHAPES`, or a folder or Hub id of a pipeline or model, float or quantized.
        providers (`list[str]`, *optional*): see `evaluation.timing.providers`.
        batch, size: of the samples.
        steps (`int`): denoising steps that are timed as one.
        repeats (`int`): timed rounds.
        variant (`str`, *optional*): of the weights of a folder or Hub id.
        skip_missing (`bool`): leave out peers that are not installed or cannot run the model, instead of refusing.

    Returns:
        `dict`: `model`, `threads`, `rows` (see `evaluation.timing.speed.benchmark`).

    Raises:
        MSFPError: an unknown model or provider.
    """
    with stderr.status(f"preparing {model}"):
        loaded = _load(model, variant)
    quantized = getattr(loaded, "is_quantized", False)
    names = providers or (("msfp",) if quantized else DEFAULT_PROVIDERS)
    with progress("timing steps") as report:
        rows = benchmark(
            loaded,
            names,
            batch=batch,
            size=size,
            steps=steps,
            repeats=repeats,
            skip_missing=skip_missing,
            on_call=report,
        )
    return {"model": model, "threads": torch.get_num_threads(), "rows": rows}


def _load(model: str, variant: str | None) -> Any:
    if model in SHAPES:
        torch.manual_seed(0)
        return SHAPES[model]().eval()
    require_variant(variant, model)
    loaded = load_any(model, variant=variant)
    return denoiser_of(loaded).eval() if isinstance(loaded, DiffusionPipeline) else loaded

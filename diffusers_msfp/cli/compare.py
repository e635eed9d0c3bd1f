"""`compare`: what a quantized pipeline lost."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..checkpoint.digest import fingerprint
from ..evaluation import Comparison, compare_pipelines
from ..sampling.observation import quantized_models
from .shared.calls import call_settings
from .shared.load import denoisers_bytes, load_any, load_pipeline, require_variant
from .shared.terminal import progress


@dataclass(frozen=True, kw_only=True)
class CheckpointComparison(Comparison):
    """A `Comparison` of two checkpoints.

    Args:
        settings (`Mapping[str, Any]`): of the run.
        checkpoint (`str`, *optional*): the candidate's `fingerprint`; None where nothing in it is quantized by us.
        bytes_reference, bytes_quantized (`int`): weight files of the denoisers.
    """

    settings: Mapping[str, Any]
    checkpoint: str | None
    bytes_reference: int
    bytes_quantized: int


def compare(
    reference: str,
    candidate: str,
    *,
    num_samples: int = 16,
    num_inference_steps: int = 20,
    seed: int = 0,
    eta: float = 0.0,
    sampler: str | None = None,
    prompts: list[str] | None = None,
    guidance_scale: float | None = None,
    variant: str | None = None,
) -> CheckpointComparison:
    """Error of a candidate pipeline against a reference for equal noise.

    Args:
        reference (`str`): folder, Hub id or single file of the full-precision pipeline.
        candidate (`str`): of the quantized one, of the same architecture, or the folder of its denoiser alone.
        num_samples, num_inference_steps, seed, eta, sampler, prompts: see `compare_pipelines`.
        guidance_scale (`float`, *optional*): for pipelines with guidance; the pipeline's own by default.
        variant (`str`, *optional*): of the weights, where a pipeline has it.
    """
    require_variant(variant, reference, candidate)
    original, quantized = load_pipeline(reference, variant=variant), load_any(candidate, variant=variant)
    arguments, measured = call_settings(original, prompts, guidance_scale), fingerprint(quantized_models(quantized))
    sizes: dict[str, Any] = {
        "bytes_reference": denoisers_bytes(reference, original, variant),
        "bytes_quantized": denoisers_bytes(candidate, quantized, variant),
    }
    run = {
        "num_samples": num_samples,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
        "eta": eta,
        "sampler": sampler,
        "prompts": prompts,
    }
    with progress("comparing") as report:
        found = compare_pipelines(original, quantized, on_progress=report, **run, **arguments)
    return CheckpointComparison(
        **vars(found),
        settings=run | arguments,
        checkpoint=measured,
        **sizes,
    )

"""`compare`: what a quantized pipeline lost."""

from ..evaluation import compare_pipelines
from .shared.calls import call_settings
from .shared.load import denoisers_bytes, load_pipeline, require_variant
from .shared.terminal import progress


def compare(
    ref: str,
    cand: str,
    *,
    num: int = 16,
    steps: int = 20,
    seed: int = 0,
    eta: float = 0.0,
    prompts: list[str] | None = None,
    guidance_scale: float | None = None,
    variant: str | None = None,
) -> dict:
    """Error of a candidate pipeline against a reference for equal noise.

    Args:
        ref, cand (`str`): folders, Hub ids or single files of pipelines of the same architecture.
        num, steps, seed, eta, prompts: see `compare_pipelines`.
        guidance_scale (`float`, *optional*): for pipelines with guidance; the pipeline's own by default.
        variant (`str`, *optional*): of the weights, where a pipeline has it.

    Returns:
        `dict`: as `compare_pipelines`, with `settings`, `bytes_ref` and `bytes_cand` (weight files of the denoisers).
    """
    require_variant(variant, ref, cand)
    reference, candidate = (load_pipeline(source, variant=variant) for source in (ref, cand))
    arguments = call_settings(reference, prompts, guidance_scale)
    with progress("comparing") as report:
        result = compare_pipelines(
            reference,
            candidate,
            num_samples=num,
            num_inference_steps=steps,
            seed=seed,
            eta=eta,
            prompts=prompts,
            on_step=report,
            **arguments,
        )
    settings = {"num_samples": num, "num_inference_steps": steps, "seed": seed, "eta": eta, "prompts": prompts}
    result["settings"] = settings | arguments
    for key, source, pipe in (("bytes_ref", ref, reference), ("bytes_cand", cand, candidate)):
        result[key] = denoisers_bytes(source, pipe, variant)
    return result

"""`evaluate`: how good a quantized pipeline is, in figures with intervals."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..checkpoint.digest import fingerprint
from ..compat.accelerate import leave_process_group
from ..evaluation import Evaluation, evaluate_pipelines
from ..outputs import named, require_writable_folder
from ..sampling.observation import quantized_models
from .shared.calls import call_settings
from .shared.interrupts import keeping
from .shared.load import denoisers_bytes, load_any, load_pipeline, require_variant
from .shared.store import PATIENCE, peak_rss_bytes, write_json
from .shared.terminal import progress, stderr


@dataclass(frozen=True, kw_only=True)
class CheckpointEvaluation(Evaluation):
    """An `Evaluation` of two checkpoints.

    Args:
        candidate, reference (`str`): where they are.
        checkpoint (`str`, *optional*): the candidate's `fingerprint`; None where nothing in it is quantized by us.
        bytes_reference, bytes_quantized (`int`): weight files of the denoisers.
        seconds (`float`), peak_rss_bytes (`int`): time of the run and largest memory.
        out (`str`): the folder of `results.json`.
    """

    candidate: str
    reference: str
    checkpoint: str | None
    bytes_reference: int
    bytes_quantized: int
    seconds: float
    peak_rss_bytes: int
    out: str


def evaluate(
    candidate: str,
    *,
    reference: str,
    data: str | Path | None = None,
    num_samples: int = 2000,
    num_inference_steps: int = 20,
    features: str | None = None,
    seed: int = 0,
    sampler: str | None = None,
    prompts: list[str] | None = None,
    guidance_scale: float | None = None,
    variant: str | None = None,
    out: str | Path | None = None,
) -> CheckpointEvaluation | None:
    """Evaluate a pipeline and write `results.json`.

    Pictures are kept in `<out>/pictures`: a run that was killed goes on when it is started again, and the reference's
    serve every candidate that is evaluated with the same `out`. Other arguments or a changed checkpoint begin anew
    beside them. Under `accelerate launch` each process draws a share, and the first one does the rest.

    Args:
        candidate (`str`): folder or Hub id of the pipeline, or folder of its denoiser, quantized by whatever diffusers
            can load.
        reference (`str`): its full-precision original.
        data, num_samples, num_inference_steps, features, seed, sampler, prompts: see `evaluate_pipelines`.
        guidance_scale (`float`, *optional*): for pipelines with guidance; the pipeline's own by default.
        variant (`str`, *optional*): of the weights, where a pipeline has it.
        out (`str` or `Path`, *optional*): folder to write; `<candidate>-evaluation` by default, for a Hub id in the
            working folder.

    Returns:
        `CheckpointEvaluation`; None in all processes but the first.

    Raises:
        MSFPError: see `evaluate_pipelines`; or something cannot be loaded.
    """
    started = time.perf_counter()
    process = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    main = process.is_main_process
    if out is None:
        place = named(Path(candidate))
        out = place.with_name(f"{place.name}-evaluation") if place.exists() else f"{place.name}-evaluation"
    out = Path(out)
    for folder in (out, out / "pictures"):
        require_writable_folder(folder)
    require_variant(variant, candidate, reference)
    original, quantized = load_pipeline(reference, variant=variant), load_any(candidate, variant=variant)
    arguments, measured = call_settings(original, prompts, guidance_scale), fingerprint(quantized_models(quantized))
    sizes: dict[str, Any] = {
        "bytes_reference": denoisers_bytes(reference, original, variant),
        "bytes_quantized": denoisers_bytes(candidate, quantized, variant),
    }
    for each in (original, quantized):
        each.to(process.device)
    kept = f"{out / 'pictures'} keeps the pictures that are drawn, and the same command goes on with them"
    with keeping(kept), progress("evaluating") as report:
        last = None

        def tell(done: int, total: int, /, stage: str = "", **info: object) -> None:
            nonlocal last
            report(done, total, stage=stage, **info)
            if stage != last and not stderr.is_terminal:
                stderr.print(stage)
            last = stage

        result = evaluate_pipelines(
            original,
            quantized,
            data=data,
            num_samples=num_samples,
            num_inference_steps=num_inference_steps,
            features=features,
            seed=seed,
            sampler=sampler,
            prompts=prompts,
            folder=out / "pictures",
            process=process,
            on_progress=tell if main else None,
            **arguments,
        )
    leave_process_group()
    if result is None:
        return None
    evaluation = CheckpointEvaluation(
        **vars(result) | {"settings": {**result.settings, **arguments}},
        candidate=candidate,
        reference=reference,
        checkpoint=measured,
        **sizes,
        seconds=time.perf_counter() - started,
        peak_rss_bytes=peak_rss_bytes(),
        out=str(out),
    )
    write_json(evaluation.to_dict(), out / "results.json")
    return evaluation

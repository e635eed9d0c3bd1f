"""`evaluate`: how good a quantized pipeline is, in figures with intervals."""

import time
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import PartialState

from ..compat.accelerate import leave_process_group
from ..evaluation import evaluate_pipelines
from ..outputs import require_writable_folder
from .load import denoisers_bytes, load_pipeline, require_variant
from .store import peak_rss_bytes, write_json
from .terminal import progress, stderr

PATIENCE = timedelta(days=30)  # of a process whose share is done


def evaluate(
    source: str,
    reference: str,
    *,
    data: str | Path | None = None,
    num: int = 2000,
    steps: int = 20,
    features: str | None = None,
    seed: int = 0,
    prompts: list[str] | None = None,
    variant: str | None = None,
    out: str | Path | None = None,
) -> dict | None:
    """Evaluate a pipeline and write `results.json`.

    Pictures are kept in `<out>/pictures`: a run that was killed goes on when it is started again, and the reference's
    serve every candidate that is evaluated with the same `out`. Other arguments or a changed checkpoint begin anew
    beside them. Under `accelerate launch` each process draws a share, and the first one does the rest.

    Args:
        source (`str`): folder or Hub id of the pipeline, quantized by whatever diffusers can load.
        reference (`str`): its full-precision original.
        data, num, steps, features, seed, prompts: see `evaluate_pipelines`.
        variant (`str`, *optional*): of the weights, where a pipeline has it.
        out (`str` or `Path`, *optional*): folder to write; `<source>-evaluation` by default, for a Hub id in the
            working folder.

    Returns:
        `dict`: as `evaluate_pipelines`, with `source`, `reference`, `bytes_reference`, `bytes_candidate` (weight files
        of the denoiser), `seconds`, `peak_rss_bytes`, `out`; None in all processes but the first.

    Raises:
        MSFPError: see `evaluate_pipelines`; or something cannot be loaded.
    """
    started = time.perf_counter()
    process = PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    main = process.is_main_process
    if out is None:
        name = source.rstrip("/\\")
        out = f"{name if Path(source).exists() else name.rpartition('/')[2]}-evaluation"
    out = Path(out)
    for folder in (out, out / "pictures"):
        require_writable_folder(folder)
    require_variant(variant, source, reference)
    original, candidate = (load_pipeline(each, variant=variant) for each in (reference, source))
    for pipe in (original, candidate):
        pipe.to(process.device)
    with progress("evaluating") as report:
        last = None

        def tell(done: int, total: int, what: str) -> None:
            nonlocal last
            report(done, total, what)
            if what != last and not stderr.is_terminal:
                stderr.print(what)
            last = what

        result = evaluate_pipelines(
            original,
            candidate,
            data=data,
            num=num,
            steps=steps,
            features=features,
            seed=seed,
            prompts=prompts,
            folder=out / "pictures",
            process=process,
            on_step=tell if main else None,
        )
    leave_process_group()
    if result is None:
        return None
    for key, location, pipe in (("bytes_reference", reference, original), ("bytes_candidate", source, candidate)):
        result[key] = denoisers_bytes(location, pipe, variant)
    result |= {
        "source": source,
        "reference": reference,
        "seconds": time.perf_counter() - started,
        "peak_rss_bytes": peak_rss_bytes(),
        "out": str(out),
    }
    write_json(result, out / "results.json")
    return result

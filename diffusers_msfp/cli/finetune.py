"""`finetune`: timestep-aware adapters for a quantized pipeline."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import PartialState

from ..compat.accelerate import leave_process_group
from ..errors import StateError
from ..evaluation import compare_pipelines, image_grid
from ..methods.correction.fit import CorrectionConfig
from ..methods.correction.table import correction_of
from ..methods.previews import PREVIEWS
from ..methods.routes import routing_of
from ..methods.talora.config import FinetuneConfig
from ..methods.talora.finetuner import Finetuner
from ..methods.talora.folder import checkpoints_in
from ..outputs import png_of, require_writable_folder, write_whole
from ..results import Result
from ..sampling.denoisers import denoiser_name, denoiser_of
from ..sampling.observation import quantized_models
from ..sampling.solvers import without_ancestral
from .shared.calls import call_settings, correct
from .shared.interrupts import NOTHING, keeping
from .shared.load import SourceError, load_pipeline, model_bytes, require_variant
from .shared.store import PATIENCE, check_target, only_run, peak_rss_bytes, write_checkpoint
from .shared.terminal import progress, stderr

COMPARED = 16
"""Samples before and after, as many as `compare` takes by default."""


@dataclass(frozen=True, kw_only=True)
class FinetunedCheckpoint(Result):
    """What `finetune` did.

    Args:
        updates (`int`): of the optimizer.
        seconds, seconds_total (`float`): of training; of everything.
        loss_first, loss_last (`float`): means of a tenth of the updates.
        usage (`Sequence[Sequence[float]]`), collapsed (`bool`): see `Finetuned`.
        intervals (`Sequence`): which adapter serves which timesteps, for each group of layers; empty where inputs have
            parameters for each timestep, and so one adapter for all.
        corrected (`bool`): the output correction of the checkpoint was fitted again.
        bytes_before, bytes_after (`int`): of the quantized denoiser's weights.
        peak_rss_bytes (`int`): largest memory.
        training_dir (`str`): logs and previews.
        before, after (`Mapping[str, float]`, *optional*): `traj_rel_l2`, `eps_rel_l2`, `eps_mse`,
            `image_psnr_db`; None where nothing was compared.
        comparison (`Mapping[str, int]`): its `num_samples` and `num_inference_steps`.
        out (`str`): the checkpoint.
    """

    updates: int
    seconds: float
    seconds_total: float
    loss_first: float
    loss_last: float
    usage: Sequence[Sequence[float]]
    collapsed: bool
    intervals: Sequence[Any]
    corrected: bool
    bytes_before: int
    bytes_after: int
    peak_rss_bytes: int
    training_dir: str
    before: Mapping[str, float] | None
    after: Mapping[str, float] | None
    comparison: Mapping[str, int]
    out: str


def finetune(
    source: str,
    teacher: str,
    out: str | Path,
    config: FinetuneConfig | None = None,
    *,
    prompts: list[str] | None = None,
    guidance_scale: float | None = None,
    variant: str | None = None,
    compare: bool = True,
    overwrite: bool = False,
) -> FinetunedCheckpoint | None:
    """Fine-tune a quantized checkpoint and write the result, its output corrected anew if it was corrected.

    The run keeps its checkpoints, logs and preview pictures in `<out>-training` and goes on from there when it is
    started again with the same settings; Ctrl-C saves one more. At its end the checkpoints are removed. Under
    `accelerate launch` each process runs this function, and the first one writes.

    Args:
        source (`str`): folder or Hub id of a quantized pipeline.
        teacher (`str`): the full-precision pipeline that it was made from.
        out (`str` or `Path`): folder to write; appears only when everything has succeeded.
        config (`FinetuneConfig`, *optional*): settings.
        prompts (`list[str]`, *optional*): for pipelines that take prompts.
        guidance_scale (`float`, *optional*): for pipelines with guidance; the pipeline's own by default.
        variant (`str`, *optional*): of the weights, where a pipeline has it.
        compare (`bool`): measure before and after what `compare` measures, with the run's steps and seed.
        overwrite (`bool`): replace `out` if it exists.

    Returns:
        `FinetunedCheckpoint`; None in all processes but the first.

    Raises:
        MSFPError: `out` exists, or the two pipelines do not fit together.
    """
    started, process = time.perf_counter(), PartialState(cpu=not torch.accelerator.is_available(), timeout=PATIENCE)
    main = process.is_main_process
    out, config = check_target(out, overwrite, read=[source, teacher]), config or FinetuneConfig()
    training = out.parent / f"{out.name}-training"
    require_writable_folder(training)
    require_variant(variant, source, teacher)
    pipe, original = (load_pipeline(each, variant=variant) for each in (source, teacher))
    if not list(quantized_models(pipe)):
        raise SourceError(f"{source} must be quantized, but it is not: run `diffusers-msfp quantize` first.")
    if list(quantized_models(original)):
        raise StateError(f"The teacher must be the full-precision pipeline, but {teacher} is quantized.")
    arguments = call_settings(original, prompts, guidance_scale)
    for part in (pipe, original):
        part.to(process.device)
    original = without_ancestral(original, arguments)

    shared = {"num_samples": COMPARED, "num_inference_steps": config.num_inference_steps}

    def measured(when: str) -> dict | None:
        if not (compare and main):
            return None
        with progress(f"comparing {when} fine-tuning") as report:
            more = {"seed": config.seed, "prompts": prompts, "on_progress": report}
            found = compare_pipelines(original, pipe, **shared, **more, **arguments)
        return {key: getattr(found, key) for key in ("traj_rel_l2", "eps_rel_l2", "eps_mse", "image_psnr_db")}

    def kept() -> str:
        found = checkpoints_in(training)
        return f"{found[-1]} is kept, and the same command goes on from there" if found else NOTHING

    if main:
        training.mkdir(parents=True, exist_ok=True)
    with only_run(training, f"write {out}") if main else nullcontext():
        with keeping(kept):
            before = measured("before")
        rows: list[np.ndarray] = []

        def keep_preview(update: int, pictures: np.ndarray) -> None:
            if not rows:
                rows.append(cast(Finetuner, run).preview(teacher=True))
            grid = image_grid(
                np.concatenate([rows[0], pictures]),
                columns=PREVIEWS,
                scale=max(1, 64 // pictures.shape[1]),
                labels=["full precision", f"after {update} updates"],
            )
            write_whole(training / f"preview-{update:06}.png", png_of(grid))

        run, corrected = None, any(correction_of(model) is not None for model in quantized_models(pipe))
        with keeping(kept):
            with progress("fine-tuning") as report:

                def tell(done: int, total: int, /, *, loss: float, **info: object) -> None:
                    report(done, total, loss=loss, **info)
                    if main and not stderr.is_terminal and done % config.checkpoint_every == 0:
                        stderr.print(f"update {done} of {total or '?'}, loss {loss:.5f}")

                run = Finetuner(
                    pipe,
                    original,
                    config,
                    work_dir=training,
                    prompts=prompts,
                    on_progress=tell if main else None,
                    on_preview=keep_preview,
                    **arguments,
                )
                if run.progress.update and main:
                    stderr.print(f"going on after update {run.progress.update}, found in {training}")
                result = run.run()
            if main and corrected:
                with progress("correcting the output") as report:
                    settings = CorrectionConfig(num_inference_steps=config.num_inference_steps)
                    correct(pipe, original, settings, prompts=prompts, on_progress=report, **arguments)
            if main:
                write_checkpoint(pipe, out)
                run.folder.clear()
                (training / "lock").unlink(missing_ok=True)
        with keeping(f"{out} is complete, and `compare` makes what is missing, its comparison"):
            after = measured("after")
        losses = result.losses
        tenth = max(1, len(losses) // 10)
        leave_process_group(run.accelerator)
        if not main:
            return None
        denoiser, name = denoiser_of(run.pipe), denoiser_name(run.pipe)
        routing = routing_of(denoiser)
        return FinetunedCheckpoint(
            updates=result.updates,
            seconds=result.seconds,
            usage=result.usage,
            collapsed=result.collapsed,
            seconds_total=time.perf_counter() - started,
            loss_first=float(np.mean(losses[:tenth])),
            loss_last=float(np.mean(losses[-tenth:])),
            intervals=[] if routing is None else routing.intervals(),
            corrected=corrected,
            bytes_before=model_bytes(source, denoiser, name, variant),
            bytes_after=model_bytes(str(out), denoiser, name),
            peak_rss_bytes=peak_rss_bytes(),
            training_dir=str(training),
            before=before,
            after=after,
            comparison=shared,
            out=str(out),
        )

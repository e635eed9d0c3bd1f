"""`inspect`, `convert-checkpoint`, `fuse` and `export`: what a quantized checkpoint holds; an older one as the present
format version; one with a LoRA in its weights; its denoiser for other programs."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline

from ..budget.record import BudgetPlan, stored_plan
from ..checkpoint.describe import CheckpointDescription, component_dirs, describe_checkpoint
from ..errors import ConfigError
from ..evaluation import Comparison, compare_pipelines
from ..evaluation.compare import in_place_of
from ..exports import ExportedGraph, check_export
from ..exports import export as export_graph
from ..methods.correction.fit import CorrectionConfig
from ..outputs import writing
from ..plugin.adapters.fusing import FusedLoRA, fuse_lora
from ..plugin.config import FORMAT_VERSION
from ..plugin.files.migrate import migrate, outdated_components
from ..results import OPTIONAL, Result
from ..sampling.calls import require_positive
from .shared.calls import call_settings, correct, read_prompts, text_file
from .shared.interrupts import NOTHING, keeping
from .shared.load import load_any, load_pipeline, require_variant, variant_of
from .shared.store import check_target, publish, scratch_folder, write_checkpoint
from .shared.terminal import progress, stderr


@dataclass(frozen=True, kw_only=True)
class ConvertedCheckpoint(Result):
    """What `convert_checkpoint` did.

    Args:
        format_version (`int`): of all components now.
        converted, already (`Sequence[str]`): components that were raised, and that had it; `.` is the folder itself.
        out (`str`): the folder.
    """

    format_version: int
    converted: Sequence[str]
    already: Sequence[str]
    out: str


def convert_checkpoint(source: str | Path) -> ConvertedCheckpoint:
    """Raise a pipeline's or model's folder to the present format version, in place, completely or not at all.

    Every tensor keeps its bits. The new folder grows beside the old one, is loaded, and takes its place.

    Args:
        source (`str` or `Path`): the folder.

    Raises:
        MSFPError: no quantized checkpoint, a damaged or newer one, or links instead of files; nothing is changed.
    """
    folder = Path(source).absolute()
    if not folder.is_dir():
        raise ConfigError(f"A checkpoint to convert must be a folder, but {source} is none. Download it first.")
    old, already = outdated_components(folder)
    if old:
        with scratch_folder(folder) as scratch:
            made = Path(scratch) / "made"
            with stderr.status(f"converting {source}"):
                migrate(folder, old, made)
            publish(made, folder)
    return ConvertedCheckpoint(format_version=FORMAT_VERSION, converted=old, already=already, out=str(folder))


@dataclass(frozen=True, kw_only=True)
class InspectedCheckpoint(CheckpointDescription):
    """What `inspect` found.

    Args:
        plan (`BudgetPlan`, *optional*): by which bits and formats were chosen, where it lies in the folder.
    """

    plan: BudgetPlan | None

    def to_dict(self) -> dict[str, Any]:
        """Component → its description; of the planned one also `why`, layer → reason."""
        found = super().to_dict()
        if self.plan is not None and self.plan.component in found:
            found[self.plan.component]["why"] = self.plan.reasons
        return found


def inspect(source: str | Path, *, variant: str | None = None) -> InspectedCheckpoint:
    """Layers of a quantized checkpoint, with the weights of a variant where it has that; see `describe_checkpoint`."""
    require_variant(variant, source)
    found = describe_checkpoint(source, variant_of(source, variant))
    return InspectedCheckpoint(**vars(found), plan=stored_plan(source))


@dataclass(frozen=True, kw_only=True)
class FusedCheckpoint(FusedLoRA):
    """What `fuse` did.

    Args:
        corrected (`bool`): the output correction was fitted again, to the reference with the LoRA.
        error (`Comparison`, *optional*): against the reference with the LoRA, where one was named.
        seconds (`float`): in all.
        out (`str`): the checkpoint.
    """

    corrected: bool
    error: Comparison | None = field(default=None, metadata=OPTIONAL)
    seconds: float
    out: str


def fuse(
    source: str | Path,
    lora: str | Path,
    out: str | Path,
    *,
    weight: float = 1.0,
    reference: str | None = None,
    recalibrate: bool = False,
    num_samples: int = 16,
    num_inference_steps: int = 20,
    seed: int = 0,
    prompts: str | Path | list[str] | None = None,
    guidance_scale: float | None = None,
    variant: str | None = None,
    overwrite: bool = False,
) -> FusedCheckpoint:
    """Fuse a LoRA into a quantized checkpoint's weights and write another checkpoint; see `fuse_lora`.

    Args:
        source (`str` or `Path`): folder of a quantized pipeline or of its denoiser.
        lora (`str` or `Path`): safetensors file, or a folder with one.
        out (`str` or `Path`): folder to write; appears only when everything has succeeded.
        weight (`float`): that the LoRA is multiplied by.
        reference (`str`, *optional*): folder or Hub id of the float pipeline, which gets the same LoRA; the result's
            error is measured against it, and an output correction that was there is fitted to it again.
        recalibrate (`bool`): set activation ranges anew, from the pipeline's own samples; they are kept by default.
        num_samples, num_inference_steps, seed, prompts, guidance_scale: of calibration and comparison.
        variant (`str`, *optional*): of the reference's weights.
        overwrite (`bool`): replace `out` if it exists.

    Raises:
        MSFPError: see `fuse_lora`; `out` exists, or no quantized checkpoint.
    """
    started = time.perf_counter()
    out = check_target(out, overwrite, read=[source, lora, reference, text_file(prompts)])
    require_positive(num_samples=num_samples, num_inference_steps=num_inference_steps)
    prompts = read_prompts(prompts)
    require_variant(variant, reference)
    with keeping(NOTHING), stderr.status(f"opening {source}"):
        component_dirs(Path(source))
        loaded = load_any(str(source))
        original = None if reference is None else load_pipeline(reference, variant=variant)
    pipe = loaded if isinstance(loaded, DiffusionPipeline) else None
    if recalibrate and pipe is None:
        raise ConfigError(f"`--recalibrate` samples with the pipeline, but {source} is a model alone. Leave it out.")
    sampled = recalibrate or original is not None
    arguments = call_settings(original or pipe, prompts, guidance_scale, samples=sampled)
    run = {"num_samples": num_samples, "num_inference_steps": num_inference_steps, "seed": seed, "prompts": prompts}
    corrected, error = False, None
    with keeping(NOTHING):
        with progress("fusing") as report:
            calibration = run | arguments if recalibrate else None
            fused = fuse_lora(loaded, lora, weight, calibration=calibration, on_progress=report)
        if original is not None:
            fuse_lora(original, lora, weight)
            if "output_correction" in fused.taken_off:
                whole = in_place_of(original, loaded)
                with progress("correcting the output") as report:
                    settings = CorrectionConfig(
                        num_samples=num_samples, num_inference_steps=num_inference_steps, seed=seed
                    )
                    corrected = correct(whole, original, settings, prompts=prompts, on_progress=report, **arguments)
            with progress("comparing") as report:
                error = compare_pipelines(original, loaded, on_progress=report, **run, **arguments)
        with writing(out):
            write_checkpoint(loaded, out)
    seconds = time.perf_counter() - started
    return FusedCheckpoint(**vars(fused), corrected=corrected, error=error, seconds=seconds, out=str(out))


def export(
    source: str,
    out: str | Path,
    to: str,
    *,
    batch: int = 1,
    size: int | None = None,
    variant: str | None = None,
    overwrite: bool = False,
) -> ExportedGraph:
    """Write the quantized denoiser of a checkpoint for other programs; see `exports.export`.

    Args:
        source (`str`): folder or Hub id of a quantized pipeline, or folder of its denoiser.
        out (`str` or `Path`): file to write; appears only when it is complete.
        to (`str`): kind of file, in `exports.TARGETS`.
        batch, size: of the samples; the graph is for these alone.
        variant (`str`, *optional*): of the weights.
        overwrite (`bool`): replace files that exist.

    Raises:
        MSFPError: see `export`; or no quantized checkpoint.
    """
    check_export(to, out, overwrite)
    require_variant(variant, source)
    with keeping(NOTHING), stderr.status(f"exporting {source}"):
        loaded = load_any(source, variant=variant)
        return export_graph(loaded, out, to, batch=batch, size=size, overwrite=overwrite)

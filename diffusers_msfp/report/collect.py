"""The numbers and pictures of a report, as plain data: what `--json` prints and the page shows.

With a reference everything is measured on *its* trajectory. Without one the candidate's own gives pictures and inputs,
by the reference engine, in which every layer sees floats. What cannot be had is left out, and `missing` says why.
"""

import datetime
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ..budget.record import stored_plan
from ..calibration import Observation
from ..checkpoint.describe import describe_checkpoint
from ..compat.processor import processor
from ..compat.wrappers import sees_through
from ..engines.choose import engine_set, set_engine
from ..errors import StateError, UnsupportedError
from ..evaluation import Comparison, compare_pipelines, layer_snr
from ..evaluation.compare import in_place_of
from ..evaluation.evaluate import origin
from ..evaluation.images.samples import arguments_of, draw_pictures
from ..evaluation.timing.providers import BASELINE, provide
from ..evaluation.timing.speed import example_inputs, step_of, take_turns
from ..results import OnProgress, Result, in_stage, plain
from ..sampling.denoisers import asked_for, denoiser_name, denoiser_of, denoisers_of
from ..sampling.observation import calibration_state, quantized_models
from ..sampling.solvers import with_sampler
from .layers import layer_rows, watching_inputs
from .pictures import QUANTIZED, REFERENCE, picture_rows

SPEED_REPEATS = 9
OTHER_DENOISERS = "Layers and speed on this page are those of `{component}`; the pipeline also has {others}."
NEEDS_REFERENCE = "It needs the full-precision original: name it with `--reference`."
NEEDS_PIPELINE = "A denoiser alone draws no pictures: name the pipeline that it was made from with `--reference`."
NEEDS_FOLDER = "Formats are read from the checkpoint's files: save it first."
OTHER_PACKAGE = "Only checkpoints that diffusers-msfp made tell them."


@dataclass(frozen=True, kw_only=True)
class Report(Result):
    """What `collect_report` found, which the page shows.

    Args:
        model, component (`str`): class and name of the denoiser; `.` where it is alone.
        method (`str`, *optional*), config (`Mapping[str, Any]`): of the quantization.
        calibration_state (`str`, *optional*), dtype (`str`): of the model.
        origin (`Mapping[str, str]`), date (`str`): machine and versions; when it was measured.
        settings (`Mapping[str, Any]`): of the runs.
        comparison (`Comparison`, *optional*): where there is a reference.
        pictures (`Sequence`): see `picture_rows`.
        asked (`Sequence[str]`): their prompts, or the names of their classes; empty where nothing was asked.
        layers (`Sequence[Mapping[str, Any]]`): see `layer_rows`.
        adapters (`Mapping[str, Any]`, *optional*): see `ComponentDescription`.
        budget (`Mapping[str, Any]`, *optional*): the plan that chose bits and formats, with its `aim` and `reasons`.
        speed (`Mapping[str, Mapping[str, float]]`, *optional*): provider → `seconds`, `seconds_low`, `seconds_high`,
            `speedup`.
        missing (`Mapping[str, str]`): section → why it is not there.
    """

    model: str
    component: str
    method: str | None
    config: Mapping[str, Any]
    calibration_state: str | None
    dtype: str
    origin: Mapping[str, str]
    date: str
    settings: Mapping[str, Any]
    comparison: Comparison | None
    pictures: Sequence[Any]
    asked: Sequence[str]
    layers: Sequence[Mapping[str, Any]]
    adapters: Mapping[str, Any] | None
    budget: Mapping[str, Any] | None
    speed: Mapping[str, Mapping[str, float]] | None
    missing: Mapping[str, str]


@sees_through(changes=False)
def collect_report(
    candidate: DiffusionPipeline | ModelMixin,
    reference: DiffusionPipeline | None = None,
    *,
    folder: Path | None = None,
    num_samples: int = 8,
    num_inference_steps: int = 20,
    seed: int = 0,
    prompts: list[str] | None = None,
    with_speed: bool = True,
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> Report:
    """Everything that a report shows.

    Args:
        candidate (`DiffusionPipeline` or `ModelMixin`): quantized by this package or another, or merely cast; a
            denoiser alone takes the place of the reference's.
        reference (`DiffusionPipeline`, *optional*): its full-precision original.
        folder (`Path`, *optional*): where the candidate lies; formats are read from its files.
        num_samples, num_inference_steps, seed, prompts: see `compare_pipelines`; layers take half of the samples.
        with_speed (`bool`): time a step against bfloat16, channels last.
        on_progress (`OnProgress`, *optional*): called with (done, total, stage=what is being done).
        **arguments: passed on to the pipelines, as text and numbers; kept among `settings`.

    Raises:
        ConfigError: the candidate is not of the reference's architecture or not calibrated, or numbers below 1.
    """
    alone = reference is None and not isinstance(candidate, DiffusionPipeline)
    pipe: Any = None if alone else candidate if reference is None else in_place_of(reference, candidate)
    model: Any = candidate if pipe is None else denoiser_of(pipe)
    whole = isinstance(candidate, DiffusionPipeline)
    component = denoiser_name(pipe) if whole else "."
    run = {"num_inference_steps": num_inference_steps, "seed": seed, "prompts": prompts, **arguments}
    if pipe is not None:
        _require_calibrated(pipe)
    missing: dict[str, str] = {}
    others = [name for name in denoisers_of(pipe) if name != component] if whole else []
    if others:
        missing["denoisers"] = OTHER_DENOISERS.format(component=component, others=" and ".join(others))
    comparison: Comparison | None = None
    pictures: list = []
    asked: list[str] = []
    errors, inputs = {}, {}
    if reference is not None:
        comparison, pictures, asked = _compare(reference, pipe, num_samples, run, on_progress)
        with watching_inputs(denoiser_of(reference)) as inputs:
            told = in_stage(on_progress, "layers")
            measured = layer_snr(reference, pipe, num_samples=max(1, num_samples // 2), on_progress=told, **run)
        errors = {name.removeprefix(f"{denoiser_name(pipe)}:"): plain(value) for name, value in measured.items()}
    elif pipe is not None:
        missing |= dict.fromkeys(("comparison", "snr"), NEEDS_REFERENCE)
        pictures, asked, inputs = _draw(pipe, num_samples, run, on_progress)
    else:
        missing |= dict.fromkeys(("comparison", "snr", "pictures", "inputs"), NEEDS_PIPELINE)
    config = _quantization_config(model)
    described = {}
    if config.get("quant_method") != "msfp":
        missing["formats"] = OTHER_PACKAGE
    elif folder is None:
        missing["formats"] = NEEDS_FOLDER
    else:
        described = describe_checkpoint(folder).components[component].to_dict()
    return Report(
        model=type(model).__name__,
        component=component,
        method=config.pop("quant_method", None),
        config=config,
        calibration_state=described.get("calibration_state"),
        dtype=str(model.dtype).removeprefix("torch."),
        origin=origin() | {"processor": processor()},
        date=datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        settings={
            "num_samples": num_samples,
            **run,
            "scheduler": None if pipe is None else _sampler(pipe, **arguments),
        },
        comparison=comparison,
        pictures=pictures,
        asked=asked[: len(pictures)],
        layers=layer_rows(model, errors, inputs, described.get("layers", [])),
        adapters=described.get("adapters"),
        budget=_budget(folder) if described else None,
        speed=_speed(model, reference, missing) if with_speed else None,
        missing=missing if with_speed else missing | {"speed": "Not measured, as asked for."},
    )


def _sampler(pipe: DiffusionPipeline, sampler: str | None = None, **arguments: Any) -> str:
    return type(with_sampler(pipe, sampler, arguments=arguments).scheduler).__name__


def _budget(folder: Path | None) -> dict[str, Any] | None:
    plan = stored_plan(folder)
    return None if plan is None else plan.to_dict() | {"aim": plan.aim, "reasons": plan.reasons}


def _require_calibrated(pipe: DiffusionPipeline) -> None:
    for model in quantized_models(pipe):
        if calibration_state(model) == "observing":
            raise StateError(
                "A report needs a calibrated model, but this one still observes its ranges. Call `calibrate(pipe)` "
                "and save it first."
            )


def _quantization_config(model: nn.Module) -> dict:
    """What the checkpoint says of its quantization, in types that JSON knows, without empty entries."""
    config = dict(getattr(model, "config", {})).get("quantization_config") or {}
    config = config if isinstance(config, dict) else config.to_dict()
    kinds = (str, bool, int, float, list, dict)
    plain = {key: getattr(value, "value", value) for key, value in config.items()}
    return {key: value for key, value in plain.items() if isinstance(value, kinds) and value not in ([], {})}


def _compare(
    reference: DiffusionPipeline, pipe: DiffusionPipeline, num_samples: int, run: dict, on_progress: OnProgress | None
) -> tuple[Comparison, list, list[str]]:
    kept: list[tuple[Tensor, Tensor]] = []
    asked: list[str] = []

    def keep(expected: Tensor, actual: Tensor, arguments: Mapping[str, Any]) -> None:
        kept.append((expected, actual))
        asked.extend(asked_for(reference, arguments, len(expected)))

    comparison = compare_pipelines(
        reference,
        pipe,
        num_samples=num_samples,
        on_progress=in_stage(on_progress, "comparing"),
        on_pictures=keep,
        **run,
    )
    expected, actual = (torch.cat(images) for images in zip(*kept, strict=True))
    return comparison, picture_rows({REFERENCE: expected, QUANTIZED: actual}), asked


def _draw(
    pipe: DiffusionPipeline, num_samples: int, run: dict, on_progress: OnProgress | None
) -> tuple[list, list[str], dict[str, Observation]]:
    run = dict(run)
    num_inference_steps = run.pop("num_inference_steps")
    given = {name: value for name, value in run.items() if name not in ("seed", "prompts", "sampler")}
    arguments = arguments_of(pipe, num_samples, run["seed"], run["prompts"], given)
    models = {model: engine_set(model) for model in quantized_models(pipe)}
    for model in models:
        set_engine(model, "reference")
    try:
        with watching_inputs(denoiser_of(pipe)) as inputs:
            told = in_stage(on_progress, "sampling")
            images = draw_pictures(
                pipe, num_samples=num_samples, num_inference_steps=num_inference_steps, on_progress=told, **run
            )
    finally:
        for model, (engine, memory) in models.items():
            set_engine(model, engine, memory=memory)
    return picture_rows({QUANTIZED: images}), asked_for(pipe, arguments, num_samples), inputs


def _speed(model: ModelMixin, reference: DiffusionPipeline | None, missing: dict[str, str]) -> dict | None:
    """Seconds of a step for one sample, in turns with the original in bfloat16, channels last."""
    try:
        inputs = example_inputs(model, 1)
    except UnsupportedError as error:
        missing["speed"] = str(error)
        return None
    calls = {QUANTIZED: step_of(model, inputs)}
    if reference is not None or any(True for _ in quantized_models(model)):
        original = model if reference is None else denoiser_of(reference)
        calls[BASELINE] = step_of(provide(BASELINE, original, lambda _: None), inputs)
    times = take_turns(calls, SPEED_REPEATS)
    rows = {}
    for name, seconds in times.items():
        low, _, high = quantiles(seconds, n=4)
        ratios = [base / own for base, own in zip(times.get(BASELINE, ()), seconds, strict=False)]
        row = {"seconds": median(seconds), "seconds_low": low, "seconds_high": high}
        rows[name] = row | {"speedup": median(ratios) if ratios else None}
    return rows

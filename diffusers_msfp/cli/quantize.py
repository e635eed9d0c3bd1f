"""`quantize`: from a float checkpoint to a packed one."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline
from diffusers.quantizers import PipelineQuantizationConfig

from ..budget import PLAN_FILE
from ..calibration.pictures import picture_files
from ..checkpoint.describe import file_bytes
from ..checkpoint.tensor_files import MAX_SHARD_SIZE
from ..errors import ConfigError
from ..layers.convert import quant_layers
from ..outputs import writing
from ..plugin.calibrate import calibrate, check_calibration, refuse_images
from ..plugin.config import MSFPConfig
from ..plugin.quantize import quantize_model
from ..plugin.recipe import RecipeRun, plan_stages
from ..recipes import CORRECTION, DEFAULT_RECIPE
from ..results import Result
from ..sampling.calls import require_positive
from ..sampling.observation import calibration_state
from ..sampling.solvers import exchange_parts
from ..schemes import DEFAULT_SCHEME, input_bits
from .shared.budget import BudgetRequest
from .shared.calls import call_settings, read_prompts, text_file
from .shared.load import fetch, load_pipeline, model_bytes, refuse_quantized, require_variant, variant_of
from .shared.parts import parts_of, teacher_beside
from .shared.store import (
    check_target,
    peak_rss_bytes,
    publish,
    state_of_file,
    state_of_files,
    work_folder,
    write_checkpoint,
)
from .shared.terminal import progress, stderr


@dataclass(frozen=True, kw_only=True)
class QuantizedCheckpoint(Result):
    """What `quantize` did.

    Args:
        scheme (`str`), components (`Sequence[str]`), layers (`int`): what was quantized.
        weight_bits_per_param (`float`): packed codes and scales of the quantized weights.
        bytes_reference, bytes_quantized (`int`): weight files of the components before and after.
        seconds, seconds_calibration, seconds_search (`float`): in all; of calibration; of reading, search, packing and
            writing of the weights.
        peak_rss_bytes (`int`): largest memory.
        calibration_state (`str`), recipe (`str`): of the result.
        stages (`Sequence[Mapping[str, Any]]`): each with `stage`, `settings`, `seconds` and its own `figures`.
        out (`str`): the checkpoint.
    """

    scheme: str
    components: Sequence[str]
    layers: int
    weight_bits_per_param: float
    bytes_reference: int
    bytes_quantized: int
    seconds: float
    seconds_calibration: float
    seconds_search: float
    peak_rss_bytes: int
    calibration_state: str
    recipe: str
    stages: Sequence[Mapping[str, Any]]
    out: str


def quantize(
    source: str,
    out: str | Path,
    *,
    scheme: str = DEFAULT_SCHEME,
    recipe: str = DEFAULT_RECIPE,
    correction: bool | None = None,
    settings: Mapping[str, Mapping] | None = None,
    num_samples: int = 64,
    num_inference_steps: int = 20,
    seed: int = 0,
    prompts: str | Path | list[str] | None = None,
    images: str | Path | None = None,
    guidance_scale: float | None = None,
    modules_to_not_convert: list[str] | None = None,
    scheme_overrides: dict[str, str] | None = None,
    components: list[str] | None = None,
    budget: BudgetRequest | None = None,
    config: str | None = None,
    variant: str | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    overwrite: bool = False,
) -> QuantizedCheckpoint:
    """Quantize a checkpoint and write the packed one.

    Weights go from file to file layer by layer, so a float model need not fit into memory; then the pipeline's own
    sampler sets the activation ranges. Before all that a call of the pipeline is tried, as far as its denoiser. Of text
    encoders weights alone are quantized. A component on its own cannot be sampled: it observes its first run. All is
    computed in float32; parts that stay float and came in half precision are stored so.

    Until all is done, packed weights lie in the hidden folder `.<out>.part` beside `out`. After an interruption the
    same call goes on with the layer it had come to; other arguments or changed source files begin anew.

    Args:
        source (`str`): folder of a float pipeline or of one model, a Hub id, or a single-file checkpoint.
        out (`str` or `Path`): folder to write; appears only when everything has succeeded.
        scheme (`str`): name in `SCHEMES`.
        recipe (`str`): name in `RECIPES`: what follows search and calibration. After each stage a checkpoint lies in
            `.<out>.part`, where the run goes on if it was interrupted.
        correction (`bool`, *optional*): end with `correct_output`, for which the float model is loaded beside the
            quantized one; by default where the scheme has 4-bit activations, but for a component on its own. With more
            bits what is gained at its own number of steps is lost at others.
        settings (`Mapping[str, Mapping]`, *optional*): stage → settings that replace the recipe's.
        num_samples, num_inference_steps, seed: for `calibrate` and, but the first, for the stages.
        prompts (`str`, `Path` or `list[str]`, *optional*): for pipelines that take prompts: texts, or a file with one
            on each line.
        images (`str` or `Path`, *optional*): folder of pictures that set the activation ranges, see `calibrate`.
        modules_to_not_convert, scheme_overrides, components: as in `MSFPConfig`.
        budget (`BudgetRequest`, *optional*): in the place of the last four, a target that each layer's bits and formats
            are chosen for, or a plan that was stored; the plan lies in `out` as `budget.json`.
        config (`str`, *optional*): folder or Hub id with the configs of a single file.
        guidance_scale (`float`, *optional*): for pipelines with guidance; the pipeline's own by default.
        variant (`str`, *optional*): of the float weights, like `"fp16"`; see `load.variant_of`.
        max_shard_size (`int` or `str`): of weight files, as in `save_pretrained`.
        overwrite (`bool`): replace `out` if it exists.

    Raises:
        MSFPError: `out` exists, or `source` cannot be quantized.
    """
    started = time.perf_counter()
    require_positive(num_samples=num_samples, num_inference_steps=num_inference_steps)
    pictures = None if images is None else picture_files(images)[:num_samples]
    plan_file = budget.file if budget and not budget.targets else None  # else it is written
    out = check_target(out, overwrite, read=[source, config, text_file(prompts), plan_file, *(pictures or ())])
    prompts = read_prompts(prompts)
    shared = {"num_inference_steps": num_inference_steps, "seed": seed}
    plan_stages(recipe, settings or {}, correction=num_samples * (correction is not False), **shared)  # refuses early
    require_variant(variant, source)
    with stderr.status(f"opening {source}"):
        path = fetch(source, variant)
        refuse_quantized(path)
    if budget is not None:
        budget.refuse_beside(scheme, scheme_overrides, components, modules_to_not_convert, recipe, correction)
        made = budget.plan(
            source,
            out,
            config=config,
            variant=variant,
            guidance_scale=guidance_scale,
            prompts=prompts,
            num_inference_steps=num_inference_steps,
            seed=seed,
        )
        scheme, scheme_overrides, components = made.scheme, made.scheme_overrides, budget.components(source, made)
    corrected = num_samples if (input_bits(scheme) == 4 if correction is None else correction) else 0
    plan = plan_stages(recipe, settings or {}, correction=corrected, **shared)
    request = MSFPConfig(
        scheme=scheme,
        modules_to_not_convert=modules_to_not_convert,
        scheme_overrides=scheme_overrides,
        components_to_quantize=components,
    )
    with stderr.status(f"opening {source}"):
        variant = variant_of(path, variant)
        loaded = None
        streams, encoders = parts_of(path, request, max_shard_size, variant, config)
    if "." in streams and correction is None:
        plan = [stage for stage in plan if stage[0] != CORRECTION.name]
    if "." in streams and plan:
        raise ConfigError(
            f"Recipe `{recipe}` samples with the whole pipeline, but {source} is a single model. Quantize the "
            f"pipeline, or use `ptq`."
        )
    if path.is_dir():
        bytes_reference = sum(file_bytes(path / name, variant) for name in (*streams, *encoders))
    else:
        bytes_reference = sum(stream.source_bytes for stream in streams.values())

    if "." in streams:
        arguments = call_settings(None, prompts, guidance_scale)
        if images is not None:
            raise ConfigError("`--images` need a pipeline to be shown to, but this is a model alone. Leave them out.")
    else:
        with stderr.status("trying a first step"):
            empty = {name: stream.model for name, stream in streams.items()}
            if path.is_file():
                loaded = load_pipeline(source, config=config, **empty)
                bytes_reference += sum(model_bytes(source, getattr(loaded, name), name) for name in encoders)
            else:
                mapping: dict[str, Any] = dict.fromkeys(encoders, request)
                wanted = PipelineQuantizationConfig(quant_mapping=mapping) if mapping else None
                loaded = load_pipeline(source, **empty, variant=variant, quantization_config=wanted)
            calibrates = any(calibration_state(stream.model) == "observing" for stream in streams.values())
            arguments = call_settings(loaded, prompts, guidance_scale, samples=calibrates or bool(plan))
            refuse_images(None if calibrates else images, scheme)
            if calibrates:
                chosen = {name: getattr(loaded, name) for name in streams}
                counts = {"num_samples": num_samples, "num_inference_steps": num_inference_steps, "seed": seed}
                check_calibration(loaded, chosen, prompts=prompts, images=pictures, **counts, **arguments)
    seconds_calibration = 0.0
    with work_folder(out) as work:
        search_started = time.perf_counter()
        locations = {name: work / "weights" / name for name in streams}
        with progress("searching and packing weights") as report:
            for name, stream in streams.items():
                with writing(out):
                    stream.write(locations[name], on_progress=report)
        seconds_search = time.perf_counter() - search_started
        journals = [work / "weights" / f"{name}.jsonl" for name in streams] if plan else []
        lines = [journal.read_text(encoding="utf-8").splitlines()[0] for journal in journals]
        identity = {
            "weights": lines,
            "calibration": [num_samples, num_inference_steps, seed],
            "prompts": prompts,
            "source": [*state_of_files(path, out), *(state_of_files(Path(config), out) if config else ())],
        } | arguments
        if pictures is not None:
            identity["images"] = [state_of_file(file) for file in pictures]
        run = RecipeRun(work, plan, identity)
        if "." in streams:
            models = {".": streams["."].model}
            state = calibration_state(models["."])
            if budget is not None:
                (locations["."] / PLAN_FILE).write_text(made.text(), encoding="utf-8")
            publish(locations["."], out)
        else:
            models = {name: streams.pop(name).load(location) for name, location in locations.items()}
            loaded = cast(DiffusionPipeline, loaded)
            exchange_parts(loaded, **models)
            for name in encoders if path.is_file() else ():  # those of a folder are quantized while they are loaded
                quantize_model(getattr(loaded, name), request)
            models |= {name: getattr(loaded, name) for name in encoders}
            if run.latest is not None:
                done = f"stage {len(run.figures)} of {len(plan)}" if run.figures else "the calibration"
                stderr.print(f"Going on after {done}, found in {run.latest}.")
                loaded = load_pipeline(str(run.latest))
                models = {name: getattr(loaded, name) for name in models}
            teacher = teacher_beside(loaded, models, source, config, variant) if plan else None
            if calibration_state(loaded) == "observing":
                calibration_started = time.perf_counter()
                with progress("calibrating activations") as report:
                    calibrate(
                        loaded,
                        num_samples=num_samples,
                        num_inference_steps=num_inference_steps,
                        prompts=prompts,
                        images=pictures,
                        seed=seed,
                        on_progress=report,
                        **arguments,
                    )
                seconds_calibration = time.perf_counter() - calibration_started
                if plan:
                    write_checkpoint(loaded, run.calibrated, work, max_shard_size)
            state = calibration_state(loaded)
            if teacher is not None:
                run.run(
                    loaded,
                    teacher,
                    prompts=prompts,
                    save=lambda pipe, folder: write_checkpoint(pipe, folder, work, max_shard_size),
                    progress=progress,
                    arguments=arguments,
                )
            more = {} if budget is None else {PLAN_FILE: made.text()}
            write_checkpoint(loaded, out, work, max_shard_size, more)
    if state == "observing":
        stderr.print(
            "This model is no pipeline, so its activations could not be calibrated: they stay float during its first "
            "denoising run after loading, which sets their ranges."
        )
    layers = [layer for model in models.values() for _, layer in quant_layers(model)]
    bits = 8 * sum(layer.packed_bytes for layer in layers)
    parameters = sum(rows * length for rows, length in (layer.matrix_shape for layer in layers))
    if budget is not None:
        budget.done(out, made)
    return QuantizedCheckpoint(
        scheme=scheme,
        components=list(models),
        layers=len(layers),
        weight_bits_per_param=bits / parameters,
        bytes_reference=bytes_reference,
        bytes_quantized=sum(model_bytes(str(out), model, name) for name, model in models.items()),
        seconds=time.perf_counter() - started,
        seconds_calibration=seconds_calibration,
        seconds_search=seconds_search,
        peak_rss_bytes=peak_rss_bytes(),
        calibration_state=state,
        recipe=recipe,
        stages=run.figures,
        out=str(out),
    )

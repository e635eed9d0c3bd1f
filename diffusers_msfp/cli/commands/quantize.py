"""`diffusers-msfp quantize`."""

from pathlib import Path
from typing import Annotated

import typer

from ... import cli
from ...checkpoint.tensor_files import MAX_SHARD_SIZE
from ...errors import MSFPError
from ...recipes import DEFAULT_RECIPE, RECIPES
from ...schemes import DEFAULT_SCHEME, SCHEMES
from ..shared.budget import BudgetRequest
from ..shared.options import Guidance, Json, Prompts, Seed, Variant, parse_value, print_json
from ..shared.stages import asked_for, print_stages
from ..shared.terminal import megabytes, stdout


def _show_stages(items: list[str] | None) -> list[str] | None:
    """Print what there is to set, where that is asked for."""
    if names := asked_for(items):
        print_stages(names)
        raise typer.Exit
    return items


def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a pipeline or model, Hub id, single file.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    scheme: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEMES)}.")] = DEFAULT_SCHEME,
    recipe: Annotated[str, typer.Option(help=f"What follows search: one of {', '.join(RECIPES)}.")] = DEFAULT_RECIPE,
    correction: Annotated[
        bool | None,
        typer.Option(
            "--correction/--no-correction",
            help="Correct the output by timestep at the end; by default with 4-bit activations.",
        ),
    ] = None,
    setting: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            is_eager=True,
            callback=_show_stages,
            help="STAGE.NAME=VALUE for a stage, e.g. talora.minutes=5; repeatable. `--set help` and `--set STAGE.help` "
            "list all settings.",
        ),
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Images sampled to set ranges.")] = 64,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of each.")] = 20,
    seed: Seed = 0,
    prompt: Prompts = None,
    prompts: Annotated[Path | None, typer.Option(help="Text file with a prompt, or a caption, on each line.")] = None,
    images: Annotated[
        Path | None,
        typer.Option(help="Folder of pictures that set the ranges, noised; by default the pipeline's own samples do."),
    ] = None,
    guidance_scale: Guidance = None,
    modules_to_not_convert: Annotated[
        list[str] | None, typer.Option(help="Pattern of modules that stay float; repeatable.")
    ] = None,
    override: Annotated[list[str] | None, typer.Option(help="PATTERN=SCHEME for single layers; repeatable.")] = None,
    component: Annotated[list[str] | None, typer.Option(help="Component to quantize; repeatable.")] = None,
    target_bytes: Annotated[
        str | None, typer.Option(help="Choose bits for each layer: the weights' files never larger, like 1.2MB.")
    ] = None,
    target_psnr: Annotated[
        float | None, typer.Option(help="The same: pictures this near to the float ones, in decibels.")
    ] = None,
    target_step: Annotated[str | None, typer.Option(help="The same: a step of one picture here, like 90ms.")] = None,
    plan: Annotated[
        Path | None, typer.Option(help="File that keeps what was chosen; without a target, one to choose by.")
    ] = None,
    config: Annotated[str | None, typer.Option(help="Folder or Hub id with the configs of a single file.")] = None,
    variant: Variant = None,
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.")] = MAX_SHARD_SIZE,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint."""
    if prompt and prompts:
        raise MSFPError("Prompts come from `--prompt` or from the file `--prompts`, but got both. Leave one out.")
    overrides = {}
    for item in override or ():
        pattern, equals, name = item.rpartition("=")
        if not equals or not pattern:
            raise MSFPError(f"`--override` must read PATTERN=SCHEME, but got {item!r}.")
        overrides[pattern] = name
    settings: dict[str, dict] = {}
    for item in setting or ():
        key, equals, value = item.partition("=")
        stage, dot, name = key.partition(".")
        if not (equals and dot and name):
            raise MSFPError(f"`--set` must read STAGE.NAME=VALUE, but got {item!r}; `--set help` lists all settings.")
        settings.setdefault(stage, {})[name] = parse_value(value)
    targets = (target_bytes, target_psnr, target_step, plan)
    budget = BudgetRequest.parse(*targets, overwrite) if any(each is not None for each in targets) else None
    result = cli.quantize(
        source,
        out,
        scheme=scheme,
        recipe=recipe,
        correction=correction,
        settings=settings,
        num_samples=num_samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        prompts=prompts or prompt,
        images=images,
        guidance_scale=guidance_scale,
        modules_to_not_convert=modules_to_not_convert,
        scheme_overrides=overrides,
        components=component,
        budget=budget,
        config=config,
        variant=variant,
        max_shard_size=max_shard_size,
        overwrite=overwrite,
    )
    if as_json:
        return print_json(result)
    for done in result.stages:
        left_out = "left out, " if "left_out" in done["figures"] else ""
        stdout.print(f"stage {done['stage']}: {left_out}{done['seconds']:.1f} s")
    chosen = result.scheme if budget is None else "planned"
    stdout.print(
        f"[bold]{result.out}[/]: {result.layers} layers as {chosen}, {megabytes(result.bytes_reference)} → "
        f"{megabytes(result.bytes_quantized)}, {result.weight_bits_per_param:.2f} bits per quantized weight, "
        f"{result.seconds:.1f} s (weights {result.seconds_search:.1f} s, calibration "
        f"{result.seconds_calibration:.1f} s), ranges {result.calibration_state}."
    )

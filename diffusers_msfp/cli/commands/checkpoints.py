"""`diffusers-msfp inspect`, `convert-checkpoint`, `fuse` and `export`."""

from collections import Counter
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer

from ... import cli
from ...budget import BudgetPlan
from ...checkpoint.describe import ComponentDescription, LayerDescription
from ...doctor.machine import measured
from ...engines import openvino
from ...exports import TARGETS
from ...formats import FORMATS, largest_integer
from ...sampling.denoisers import DENOISERS
from ..shared.options import Guidance, Json, Prompts, Seed, Variant, print_json, print_router
from ..shared.terminal import megabytes, say, stdout

COLUMNS = ("layer", "weight", "scale", "error", "input", "scale", "zero point", "error", "engine")


def inspect(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized checkpoint.")],
    variant: Variant = None,
    as_json: Json = False,
) -> None:
    """List the layers of a quantized checkpoint, and the engine that `auto` would take for each on this CPU."""
    result = cli.inspect(source, variant=variant)
    if as_json:
        return print_json(result)
    for name, part in result.components.items():
        say(f"{name}: {part.scheme}, {part.calibration_state}, {megabytes(part.bytes_quantized)}", style="italic")
        _print_layers(part.layers)
        refusals = Counter(pair for layer in part.layers for pair in layer.engine_refusals.items())
        for (engine, reason), count in refusals.items():
            say(f"{engine} refuses {count} of {len(part.layers)} layers: {reason}")
        if name == "." or name in DENOISERS:
            say(_graph(part))
        if count := sum(layer.reads_residual for layer in part.layers):
            say(f"{count} of {len(part.layers)} layers read residual sums, which no norm has scaled, in 8 bits")
        for layer in part.layers:
            for question, ways in layer.measured.items():
                seconds = ", ".join(f"{way} {1e3 * each:.3g} ms" for way, each in ways.items())
                say(f"{layer.name}, measured for {question}: {seconds}")
        if correction := part.parts["output_correction"]:
            timesteps = correction["timesteps"]
            say(f"output corrected by timestep: {len(timesteps)} timesteps, {timesteps[0]:g} … {timesteps[-1]:g}")
        if adapters := part.parts["adapters"]:
            reads = {"codes": ", reading codes", "float": ", reading floats", None: ""}[adapters["reads"]]
            if adapters["num_adapters"] == 1 and adapters["placement"] == "merged":
                say(f"fine-tuned: the packed weights of {sum(adapters['ranks'].values())} layers are the updated ones")
            else:
                stdout.print(f"{adapters['num_adapters']} adapters per layer, {adapters['placement']}{reads}")
            print_router(adapters["intervals"], adapters["num_adapters"])
        if temporal := part.parts["temporal"]:
            _print_temporal(temporal)
        if result.plan is not None and result.plan.component == name:
            _print_plan(result.plan)
    if not measured(torch.device("cpu")):
        say("this kind of processor was never measured: engines give the reference's results here, at unknown speed")


def _graph(part: ComponentDescription) -> str:
    """What the whole is as a graph of OpenVINO's."""
    adapters, by_timestep = part.parts["adapters"], set((part.parts["temporal"] or {}).get("sets", ()))
    count = sum(_in_bytes(layer) for layer in part.layers if layer.name not in by_timestep)
    if part.calibration_state == "observing":
        return f"{openvino.NAME} runs no graph of it while it is being calibrated"
    if adapters is not None and adapters["placement"] == "side":
        return f"{openvino.NAME} runs no graph of it, since timestep-aware adapters stand beside its weights"
    held = f"{openvino.NAME} runs the whole as a graph, {count} of {len(part.layers)} layers in 8-bit integers"
    missing = openvino.why_missing()
    return f"{held}, but {missing}" if missing else held


def convert_checkpoint(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized pipeline or model.")],
    as_json: Json = False,
) -> None:
    """Raise a checkpoint to the present format version, in place: with a digest that is checked on loading."""
    result = cli.convert_checkpoint(source)
    if as_json:
        return print_json(result)
    names = ", ".join(result.converted)
    done = f"converted: {names}" if names else "nothing to convert"
    stdout.print(f"format version {result.format_version}, {done}", soft_wrap=True, highlight=False, markup=False)


def fuse(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized checkpoint.")],
    lora: Annotated[Path, typer.Option(help="Safetensors file, or a folder with one.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    weight: Annotated[float, typer.Option(help="What the LoRA is multiplied by.")] = 1.0,
    reference: Annotated[
        str | None, typer.Option(metavar="SRC", help="The float pipeline: measure the error against it, with the LoRA.")
    ] = None,
    recalibrate: Annotated[
        bool, typer.Option("--recalibrate", help="Set activation ranges anew; kept by default.")
    ] = False,
    num_samples: Annotated[int, typer.Option(min=1, help="Images for calibration and comparison.")] = 16,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of each.")] = 20,
    seed: Seed = 0,
    prompt: Prompts = None,
    guidance_scale: Guidance = None,
    variant: Variant = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Fuse a LoRA into the weights of a quantized checkpoint, which are searched and packed again."""
    result = cli.fuse(
        source,
        lora,
        out,
        weight=weight,
        reference=reference,
        recalibrate=recalibrate,
        num_samples=num_samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        prompts=prompt,
        guidance_scale=guidance_scale,
        variant=variant,
        overwrite=overwrite,
    )
    if as_json:
        return print_json(result)
    packed = ", ".join(f"{count} layers of {name}" for name, count in result.components.items()) or "no packed layer"
    say(f"{result.out}: {packed} packed anew, {result.float_layers} float layers changed, {result.seconds:.1f} s")
    say(f"ranges {'set anew' if result.calibrated else 'as they were'}")
    if result.taken_off:
        again = "fitted again" if result.corrected else "taken off; `--reference SRC` fits it again"
        say(f"{', '.join(result.taken_off)}: {again}")
    if result.error is not None:
        say(
            f"against {reference} with the LoRA: PSNR {result.error.image_psnr_db:.2f} dB, "
            f"traj_rel_l2 {result.error.traj_rel_l2:.4f}"
        )


def export(
    source: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a quantized pipeline or denoiser.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write.")],
    to: Annotated[str, typer.Option(help=f"Kind of file: {', '.join(TARGETS)}.")],
    batch: Annotated[int, typer.Option(min=1, help="Samples of a call; guidance makes two of each picture.")] = 1,
    size: Annotated[
        int | None, typer.Option(min=1, help="Height and width of the sample; the model's own by default.")
    ] = None,
    variant: Variant = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace existing files.")] = False,
    as_json: Json = False,
) -> None:
    """Write the quantized denoiser as a graph for torch, onnxruntime or OpenVINO, which run it without this package."""
    result = cli.export(source, out, to, batch=batch, size=size, variant=variant, overwrite=overwrite)
    if as_json:
        return print_json(result)
    files = ", ".join(f"{name} {megabytes(size)}" for name, size in result.files.items())
    say(f"{result.model} for {result.to}, {result.seconds:.1f} s: {files}")
    say("takes " + ", ".join(f"{name} {kind}" for name, kind in result.inputs.items()) + ", no other shapes")
    say(f"gives {', '.join(result.outputs)}")
    say(f"{result.layers_in_integers} of {result.layers} quantized layers multiply integers, the others exact floats")
    packed = megabytes(result.bytes_packed)
    if result.unpacked:
        say(f"their weights take {megabytes(result.bytes_weights)}, packed {packed}: {result.unpacked}")
    else:
        say(f"their weights take {packed}, packed as they are")


def _print_plan(plan: BudgetPlan) -> None:
    say(
        f"planned for {plan.aim}: at most {plan.bytes:,} bytes, `traj_rel_l2` {plan.error:.4f} as predicted; "
        f"of each layer, what else it could have had:"
    )
    for layer, reason in plan.reasons.items():
        say(f"  {layer}: {reason}")


def _print_temporal(temporal: dict) -> None:
    timesteps = temporal["timesteps"]
    say(
        f"temporal features: {len(temporal['block'])} layers depend on the timestep alone; a set of {len(timesteps)} "
        f"timesteps, {timesteps[0]:g} … {timesteps[-1]:g}"
    )
    say(
        f"  input parameters for each timestep: {len(temporal['sets'])} layers, {megabytes(temporal['sets_bytes'])}; "
        f"stored outputs: {len(temporal['cached'])} layers, {megabytes(temporal['cache_bytes'])}"
    )


def _print_layers(layers: list[LayerDescription]) -> None:
    """One line for each; in a terminal too narrow for that, names stand on lines of their own."""
    names, *columns = zip(COLUMNS, *map(_layer_row, layers), strict=True)
    widths = [max(map(len, column)) for column in columns]
    first = max(map(len, names))
    split = stdout.is_terminal and first + sum(widths) + 2 * len(widths) > stdout.width
    for line, (name, *cells) in enumerate(zip(names, *columns, strict=True)):
        figures = "  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)).rstrip()
        text = f"{name}\n  {figures}" if split else f"{name:<{first}}  {figures}"
        say(text, style="bold" if line == 0 else None)


def _layer_row(layer: LayerDescription) -> tuple[str, ...]:
    scale = _numbers([layer.weight_scale_min, layer.weight_scale_max])
    groups = f" g{layer.group_size}" if layer.group_size else ""
    row = (layer.name, f"{layer.weight_format}{groups}", scale, _error(layer.weight_rel_mse))
    if layer.input_signed is None:
        return (*row, layer.input_format or "float", "", "", "", layer.engine)
    zero_point = "" if layer.input_signed else _numbers(layer.input_zero_point)
    error = _error(cast(float, layer.input_rel_mse))
    return (*row, str(layer.input_format), _numbers(layer.input_scale), zero_point, error, layer.engine)


def _in_bytes(layer: LayerDescription) -> bool:
    read = FORMATS[cast(str, layer.input_format)] if layer.input_format in FORMATS else None
    largest = largest_integer(FORMATS[layer.weight_format], grouped=layer.group_size is not None)
    return openvino.multiplies_bytes(read, largest)


def _numbers(value: Any) -> str:
    """One number, or the range of several."""
    return f"{min(value):.2g}…{max(value):.2g}" if isinstance(value, list) else f"{value:.3g}"


def _error(value: float) -> str:
    return f"{value:.1e}".replace("e-0", "e-")

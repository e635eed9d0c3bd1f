"""The `diffusers-msfp` program: arguments in, tables or one JSON object out.

Standard output carries the result alone, standard error everything else. Exit code 0 only on success; a bad input gives
one line and 2.
"""

import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Annotated

import typer
from diffusers.utils import logging as diffusers_logging
from rich.console import Console
from rich.table import Table

from .. import __version__, cli
from ..errors import MSFPError
from ..schemes import DEFAULT_SCHEME, SCHEMES
from ..talora import PLACEMENTS
from ..workflow import FinetuneConfig
from .terminal import megabytes, stderr, stdout

app = typer.Typer(
    name="diffusers-msfp",
    help="4-bit floating-point weights and activations for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

INSPECT_WIDTH = 105

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="For pipelines that take prompts; repeatable.")]
Source = Annotated[str, typer.Argument(help="Folder, Hub id or single file of a pipeline.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


@app.command()
def quantize(
    source: Annotated[str, typer.Argument(metavar="SRC", help="Folder of a pipeline or model, Hub id, single file.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    scheme: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEMES)}.")] = DEFAULT_SCHEME,
    calibration_samples: Annotated[int, typer.Option(min=1, help="Images sampled to set ranges.")] = 64,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of each.")] = 20,
    seed: Seed = 0,
    prompts: Prompts = None,
    keep: Annotated[list[str] | None, typer.Option(help="Pattern of modules that stay float; repeatable.")] = None,
    override: Annotated[list[str] | None, typer.Option(help="PATTERN=SCHEME for single layers; repeatable.")] = None,
    component: Annotated[list[str] | None, typer.Option(help="Component to quantize; repeatable.")] = None,
    config: Annotated[str | None, typer.Option(help="Folder or Hub id with the configs of a single file.")] = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Quantize a checkpoint."""
    overrides = {}
    for item in override or ():
        pattern, equals, name = item.rpartition("=")
        if not equals or not pattern:
            raise MSFPError(f"`--override` must read PATTERN=SCHEME, but {item!r} came.")
        overrides[pattern] = name
    result = cli.quantize(
        source,
        out,
        scheme=scheme,
        calibration_samples=calibration_samples,
        steps=steps,
        seed=seed,
        prompts=prompts,
        modules_to_not_convert=keep,
        scheme_overrides=overrides,
        components=component,
        config=config,
        overwrite=overwrite,
    )
    if as_json:
        return _print_json(result)
    stdout.print(
        f"[bold]{result['out']}[/]: {result['layers']} layers as {scheme}, {megabytes(result['bytes_before'])} → "
        f"{megabytes(result['bytes_after'])}, {result['weight_bits_per_param']:.2f} bits per quantized weight, "
        f"{result['seconds']:.1f} s (weights {result['seconds_search']:.1f} s, calibration "
        f"{result['seconds_calibration']:.1f} s), ranges {result['calibration_state']}."
    )


@app.command()
def finetune(
    source: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a quantized pipeline.")],
    teacher: Annotated[str, typer.Option(help="The full-precision pipeline that it was made from.")],
    out: Annotated[Path, typer.Option(help="Folder to write; `<out>-training` keeps checkpoints, logs, previews.")],
    minutes: Annotated[float | None, typer.Option(help="Train as many updates as fit.")] = None,
    train_steps: Annotated[int | None, typer.Option(help="Train so many updates; 2000 if nothing is given.")] = None,
    num_adapters: Annotated[int, typer.Option(help="Adapters per layer; 1 is a single LoRA.")] = 2,
    rank: Annotated[int | None, typer.Option(help="Largest rank; 8 beside the weights, 32 merged.")] = None,
    placement: Annotated[str, typer.Option(help=f"One of {', '.join(PLACEMENTS)}.")] = "side",
    router_group: Annotated[
        list[str] | None, typer.Option(help="Pattern of layers that choose on their own; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the trajectories.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples per batch, over all processes.")] = 16,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches per update.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak, in steps of the weight grid per update.")] = 0.1,
    dfa_exponent: Annotated[float, typer.Option(help="Of the denoising factor in the loss; 0 turns it off.")] = 1.0,
    ema_decay: Annotated[float, typer.Option(help="Of a moving average of the adapters; 0 is none.")] = 0.0,
    mixed_precision: Annotated[str, typer.Option(help="`no` or `bf16`.")] = "no",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations to save memory.")] = False,
    blockwise: Annotated[bool, typer.Option(help="Train block after block to save memory.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 100,
    preview_every: Annotated[int, typer.Option(help="Updates between preview pictures; 0 is none.")] = 200,
    seed: Seed = 0,
    prompts: Prompts = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a quantized checkpoint with timestep-aware adapters (TALoRA, DFA)."""
    config = FinetuneConfig(
        num_adapters=num_adapters,
        rank=rank,
        placement=placement,
        router_groups=tuple(router_group or ()),
        num_inference_steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        train_steps=train_steps,
        minutes=minutes,
        learning_rate=learning_rate,
        denoising_factor_exponent=dfa_exponent,
        ema_decay=ema_decay,
        mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing,
        blockwise=blockwise,
        checkpoint_every=checkpoint_every,
        preview_every=preview_every,
        seed=seed,
    )
    result = cli.finetune(source, teacher, out, config, prompts=prompts, overwrite=overwrite)
    if result is None:  # not the first process
        return None
    if as_json:
        return _print_json(result)
    stdout.print(
        f"[bold]{result['out']}[/]: {result['updates']} updates in {result['seconds'] / 60:.1f} min, loss "
        f"{result['loss_first']:.5f} → {result['loss_last']:.5f}, {megabytes(result['bytes_before'])} → "
        f"{megabytes(result['bytes_after'])}; logs and previews in {result['training_dir']}."
    )
    _print_router(result["intervals"])
    if result["collapsed"]:
        stderr.print("[yellow]One adapter serves all timesteps[/] (the router has collapsed): try more updates.")
    return None


@app.command()
def sample(
    source: Source,
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    num: Annotated[int, typer.Option(min=1, help="Pictures.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    seed: Seed = 0,
    prompts: Prompts = None,
    as_json: Json = False,
) -> None:
    """Draw a grid of pictures."""
    result = cli.sample(source, out, num=num, steps=steps, seed=seed, prompts=prompts)
    _print_json(result) if as_json else stdout.print(f"{num} pictures in [bold]{result['out']}[/].")


@app.command()
def compare(
    ref: Annotated[str, typer.Argument(help="The full-precision pipeline.")],
    cand: Annotated[str, typer.Argument(help="The quantized one.")],
    num: Annotated[int, typer.Option(min=1, help="Samples.")] = 16,
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    seed: Seed = 0,
    eta: Annotated[float, typer.Option(min=0, max=1, help="DDIM's eta.")] = 0.0,
    prompts: Prompts = None,
    as_json: Json = False,
) -> None:
    """Measure what a quantized pipeline lost."""
    result = cli.compare(ref, cand, num=num, steps=steps, seed=seed, eta=eta, prompts=prompts)
    if as_json:
        return _print_json(result)
    table = Table("figure", "value", title=f"{cand} against {ref}")
    for key in ("eps_mse", "eps_rel_l2"):
        table.add_row(key, f"{result[key]:.5f}")
    table.add_row("image_psnr_db", f"{result['image_psnr_db']:.2f}")
    table.add_row("size", f"{megabytes(result['bytes_ref'])} → {megabytes(result['bytes_cand'])}")
    stdout.print(table)
    times = Table("timestep", "eps_rel_l2")
    for timestep, value in result["eps_rel_l2_by_timestep"].items():
        times.add_row(timestep, f"{value:.4f}")
    stdout.print(times)


@app.command()
def inspect(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized checkpoint.")],
    as_json: Json = False,
) -> None:
    """List the layers of a quantized checkpoint."""
    result = cli.inspect(source)
    if as_json:
        return _print_json(result)
    for name, part in result.items():
        title = f"{name}: {part['scheme']}, {part['calibration_state']}, {megabytes(part['bytes'])}"
        columns = ("layer", "weight", "scale", "rel. MSE", "input", "sign", "scale", "zero point", "rel. MSE")
        table = Table(*columns, title=title)
        for layer in part["layers"]:
            table.add_row(*_layer_row(layer))
        longest = max(len(layer["name"]) for layer in part["layers"])
        Console(width=max(stdout.width, longest + INSPECT_WIDTH), soft_wrap=True).print(table)
        if part["adapters"]:
            stdout.print(f"{part['adapters']['num_adapters']} adapters per layer, {part['adapters']['placement']}")
            _print_router(part["adapters"]["intervals"])


def _print_router(intervals: list) -> None:
    """Which adapter serves which timesteps."""
    for group, runs in enumerate(intervals):
        title = f"router, layer group {group}" if len(intervals) > 1 else "router"
        table = Table("timesteps", "adapter", "share", title=title)
        for first, last, adapter in runs:
            table.add_row(f"{first} … {last}", f"{adapter}", f"{(last - first + 1) / (runs[-1][1] + 1):.0%}")
        stdout.print(table)


def _layer_row(layer: dict) -> tuple[str, ...]:
    scale = f"{layer['weight_scale_min']:.2g} … {layer['weight_scale_max']:.2g}"
    row = (layer["name"], layer["weight_format"], scale, f"{layer['weight_rel_mse']:.1e}")
    if layer["input_signed"] is None:
        return (*row, layer["input_format"] or "float", "", "", "", "")
    sign = "signed" if layer["input_signed"] else "unsigned"
    zero_point = "" if layer["input_signed"] else _numbers(layer["input_zero_point"], ".4f")
    error = f"{layer['input_rel_mse']:.1e}"
    return (*row, layer["input_format"], sign, _numbers(layer["input_scale"], ".3g"), zero_point, error)


def _numbers(value: float | list[float], style: str) -> str:
    """One number, or one for each adapter."""
    return ", ".join(format(number, style) for number in (value if isinstance(value, list) else [value]))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the checkpoints.")] = Path("msfp-demo"),
    steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the pictures.")] = 50,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Quantize the embedded model and show it beside full precision."""
    result = cli.demo(out, steps=steps, seed=seed)
    if as_json:
        return _print_json(result)
    columns = ("scheme", "size", "eps_rel_l2", "image PSNR", "quantized in")
    table = Table(*columns, title="Fashion-MNIST DDPM, 20 DDIM steps")
    for name, row in result["schemes"].items():
        size = f"{megabytes(row['bytes_before'])} → {megabytes(row['bytes_after'])}"
        psnr = f"{row['image_psnr_db']:.1f} dB"
        table.add_row(name, size, f"{row['eps_rel_l2']:.4f}", psnr, f"{row['seconds']:.1f} s")
    stdout.print(table)
    stdout.print(f"Look at [bold]{result['picture']}[/]: full precision in the first row, the schemes below.")


def _print_json(result: dict) -> None:
    sys.stdout.write(json.dumps(result) + "\n")


def main() -> None:
    """Entry point: errors that the user can put right, a full disk too, become one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    try:
        app()
    except (MSFPError, OSError) as error:
        stderr.print(f"[red]error:[/] {' '.join(str(error).split())}", soft_wrap=True, highlight=False)
        sys.exit(2)
    except KeyboardInterrupt:
        stderr.print("interrupted")
        sys.exit(130)


if __name__ == "__main__":
    main()

"""`diffusers-msfp bench` and `diffusers-msfp warmup`."""

from typing import Annotated

import typer
from rich.table import Table

from ... import cli
from ..shared.load import DTYPES
from ..shared.options import Json, Variant, print_json
from ..shared.terminal import say, stdout


def bench(
    model: Annotated[str, typer.Option(help="ddpm-cifar10, sd15, or a folder or Hub id.")] = "ddpm-cifar10",
    providers: Annotated[
        str,
        typer.Option(help="Comma-separated: fp32, bf16, a scheme, sdnq:int8, openvino:int8, …; options behind colons."),
    ] = "",
    batch: Annotated[int, typer.Option(min=1, help="Samples.")] = 1,
    size: Annotated[int | None, typer.Option(min=8, help="Height and width of a sample.")] = None,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps that are timed as one.")] = 1,
    repeats: Annotated[int, typer.Option(min=2, help="Timed rounds.")] = 7,
    variant: Variant = None,
    as_json: Json = False,
) -> None:
    """Time one denoising step against bfloat16, in turns."""
    names = [name.strip() for name in providers.split(",") if name.strip()]
    result = cli.bench(
        model,
        names or None,
        batch=batch,
        size=size,
        num_inference_steps=num_inference_steps,
        repeats=repeats,
        variant=variant,
        skip_missing=True,
    )
    if as_json:
        return print_json(result)
    columns = ("provider", "ms per step", "quartiles", "× bf16 channels last", "× floor", "layers by engine")
    table = Table(*columns, title=f"{model}, batch {batch}, {result.threads} threads")
    for row in result.rows:
        engines = ", ".join(f"{name} {count}" for name, count in row.engines.items())
        quartiles = f"{1e3 * row.seconds_low:.1f} … {1e3 * row.seconds_high:.1f}"
        above = f"{row.seconds / row.floor_seconds:.2f}" if row.floor_seconds else ""
        table.add_row(row.provider, f"{1e3 * row.seconds:.1f}", quartiles, f"{row.speedup:.2f}", above, engines)
    stdout.print(table)
    first = result.rows[0]
    limit = f"; oneDNN alone is limited to {first.onednn_limit}" if first.onednn_limit else ""
    settings = ", ".join(f"{name}={value}" for name, value in first.openmp.items()) or "default settings"
    say(f"{first.processor} ({', '.join(first.instruction_sets)}){limit}; OpenMP: {settings}")
    for question, ways in result.measured.items():
        seconds = ", ".join(f"{way} {1e3 * each:.3g} ms" for way, each in ways.items())
        say(f"{question}: {seconds}")


def warmup(
    model: Annotated[str | None, typer.Argument(help="Folder or Hub id of a quantized model to time.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Samples of its step; with guidance, two a picture.")] = 1,
    size: Annotated[int | None, typer.Option(min=8, help="Height and width of a sample, for the denoiser.")] = None,
    dtype: Annotated[str, typer.Option(help=f"That the model will run in: {', '.join(DTYPES)}.")] = DTYPES[0],
    as_json: Json = False,
) -> None:
    """Compile the CPU kernels once on this machine, which the first picture would otherwise wait for.

    With a model, its step is timed layer by layer and, if OpenVINO is installed, as a graph; later the faster is taken.
    """
    result = cli.warmup(model, batch=batch, size=size, dtype=dtype)
    if as_json:
        return print_json(result)
    say(f"{len(result.seconds_by_kernel)} kernels of {result.kernels} are ready, after {result.seconds:.1f} s")
    for name, ways in result.steps.items():
        say(f"{name}, {dtype}, batch {batch}: {', '.join(f'{way} {1e3 * each:.3g} ms' for way, each in ways.items())}")
    for reason in result.refused.values():
        say(f"layers are warm; {reason}")

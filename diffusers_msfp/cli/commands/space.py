"""`diffusers-msfp space`."""

from pathlib import Path
from typing import Annotated

import typer

from ... import cli
from ..shared.options import Json, Variant, print_json
from ..shared.terminal import megabytes, stdout
from ..space import Address, print_address

space = typer.Typer(
    name="space", help="A page that shows a quantized model beside full precision.", no_args_is_help=True
)

Reference = Annotated[
    str | None, typer.Option(help="Full-precision pipeline; by default the base that the model card names.")
]
Title = Annotated[str | None, typer.Option(help="Heading; the model's name by default.")]


@space.command()
def run(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="DIR", help="Quantized pipeline, folder or Hub id; by default the embedded model, fine-tuned."
        ),
    ] = None,
    reference: Reference = None,
    title: Title = None,
    variant: Variant = None,
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="The first free one from 7860 by default.")] = None,
    as_json: Json = False,
) -> None:
    """Serve the page on this machine."""
    on_start = (lambda address: print_json(Address(address=address))) if as_json else print_address
    cli.space_run(source, reference=reference, title=title, variant=variant, port=port, on_start=on_start)


@space.command()
def create(
    source: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a quantized pipeline.")],
    out: Annotated[Path, typer.Option(help="Folder to write.")],
    reference: Reference = None,
    title: Title = None,
    variant: Variant = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing Space.")] = False,
    as_json: Json = False,
) -> None:
    """Write a Hugging Face Space that serves the page."""
    result = cli.space_create(source, out, reference=reference, title=title, variant=variant, overwrite=overwrite)
    if as_json:
        return print_json(result)
    beside = f"beside {result.reference}" if result.reference else "alone, as no reference is known"
    stdout.print(
        f"[bold]{result.out}[/]: {source} {beside}, {len(result.files)} files, {megabytes(result.bytes)}. "
        f"Try it with `cd {result.out} && python app.py`, publish it with "
        f"`hf upload USER/SPACE {result.out} --repo-type space`."
    )
    return None

"""`diffusers-msfp convert-checkpoint`."""

from pathlib import Path
from typing import Annotated

import typer

from ... import cli
from ..shared.options import Json, print_json
from ..shared.terminal import stdout


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

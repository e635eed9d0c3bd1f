"""`diffusers-msfp inspect`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ... import cli
from ..terminal import megabytes, stdout
from .options import Json, print_json, print_router

INSPECT_WIDTH = 105


def inspect(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized checkpoint.")],
    as_json: Json = False,
) -> None:
    """List the layers of a quantized checkpoint."""
    result = cli.inspect(source)
    if as_json:
        return print_json(result)
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
            print_router(part["adapters"]["intervals"])


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

"""What commands share: options, and ways to print a result."""

import json
import sys
from typing import Annotated

import typer
from rich.table import Table

from ..terminal import stdout

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else on standard output.")]
Seed = Annotated[int, typer.Option(min=0, help="Seed of the noise.")]
Prompts = Annotated[list[str] | None, typer.Option("--prompt", help="For pipelines that take prompts; repeatable.")]
Variant = Annotated[
    str | None,
    typer.Option(help="Of the weights that are read, like `fp16`, where a model has it; else plain ones, or the only."),
]
Source = Annotated[str, typer.Argument(help="Folder, Hub id or single file of a pipeline.")]


def print_json(result: dict) -> None:
    """One object on standard output."""
    sys.stdout.write(json.dumps(result) + "\n")


def parse_value(text: str) -> object:
    """A value as JSON knows it; anything else is text."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def print_router(intervals: list) -> None:
    """Which adapter serves which timesteps."""
    for group, runs in enumerate(intervals):
        title = f"router, layer group {group}" if len(intervals) > 1 else "router"
        table = Table("timesteps", "adapter", "share", title=title)
        for first, last, adapter in runs:
            table.add_row(f"{first} … {last}", f"{adapter}", f"{(last - first + 1) / (runs[-1][1] + 1):.0%}")
        stdout.print(table)

"""The `diffusers-msfp` program: arguments in, tables or one JSON object out.

Standard output carries the result alone, standard error everything else. Exit code 0 only on success; a bad input gives
one line and 2, Ctrl-C one line, on what is kept and how to go on, and 130.
"""

import logging
import sys
import warnings
from collections.abc import Callable
from typing import Annotated, cast

import typer
from diffusers.utils import logging as diffusers_logging
from rich.markup import escape

from .. import __version__
from ..errors import MSFPError
from ..outputs import reason_of
from .commands import COMMANDS, GROUPS
from .shared.aliases import Command
from .shared.interrupts import interruptible
from .shared.options import with_verbosity
from .shared.terminal import stderr

app = typer.Typer(
    name="diffusers-msfp",
    help="4-bit floating-point weights and activations for diffusion models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    pass


for command in COMMANDS:
    app.command(cls=Command)(with_verbosity(interruptible(command)))
for group in GROUPS:
    for each in group.registered_commands:
        each.callback, each.cls = with_verbosity(interruptible(cast(Callable, each.callback))), Command
    app.add_typer(group)


def main() -> None:
    """Entry point: errors that the user can put right, a full disk too, become one line and exit code 2."""
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(message)s")
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()
    warnings.filterwarnings("ignore")
    try:
        app()
    except (MSFPError, OSError) as error:
        said = reason_of(error) if isinstance(error, OSError) else str(error)
        stderr.quiet = False  # `--quiet` leaves errors alone
        stderr.print(f"[red]error:[/] {escape(' '.join(said.split()))}", soft_wrap=True, highlight=False)
        sys.exit(2)


if __name__ == "__main__":
    main()

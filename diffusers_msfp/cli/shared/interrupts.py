"""Ctrl-C: a verb says what it keeps, and the program in one line how to go on."""

import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path

import typer

from .terminal import say_anyway

NOTHING = "nothing is kept, and the same command begins anew"
INTERRUPTED = 130
"""Exit code after Ctrl-C, as of shells."""


class Interrupted(KeyboardInterrupt):
    """Ctrl-C in a verb; the message says what is kept and whether the same command goes on."""


@contextmanager
def keeping(kept: str | Callable[[], str]) -> Iterator[None]:
    """Say what a Ctrl-C in here leaves.

    Args:
        kept (`str` or `Callable[[], str]`): half a sentence, or what makes it when it is needed.

    Raises:
        Interrupted: on Ctrl-C; one from further in stays as it is.
    """
    try:
        yield
    except Interrupted:
        raise
    except KeyboardInterrupt as stop:
        raise Interrupted(kept() if callable(kept) else kept) from stop


def interruptible(command: Callable) -> Callable:
    """A command that ends on Ctrl-C with one line on standard error and exit code 130."""

    @wraps(command)
    def called(*args: object, **options: object) -> object:
        try:
            return command(*args, **options)
        except KeyboardInterrupt as stop:
            if int(os.environ.get("RANK") or 0) == 0:  # of several processes one speaks
                said = f"interrupted: {str(stop) or NOTHING}: {command_line()}"
                say_anyway(said)
            raise typer.Exit(INTERRUPTED) from stop

    return called


def command_line() -> str:
    """What the user typed, ready to be pasted; of a launcher the program's part."""
    program, *arguments = sys.argv
    ours = ["python", "-m", "diffusers_msfp"] if Path(program).name == "__main__.py" else [Path(program).name]
    return shlex.join([*ours, *arguments])

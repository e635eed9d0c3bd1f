"""What verbs say on the way: progress and notes go to standard error, results to standard output.

In a terminal progress is a bar with the time left. Elsewhere, as in a log, it is a line now and then, and one at the
end of whatever took long. `--quiet` leaves errors alone; `--verbose` gives every step a line, in a terminal too.
"""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...results import OnProgress

stderr = Console(stderr=True)
stdout = Console()

EVERY, LONG = 30.0, 5.0
"""Seconds between lines of a log, and from which on the end of something is worth one."""
_said = {"verbose": False}


def set_verbosity(*, quiet: bool, verbose: bool) -> None:
    """What this program's run says beside its result."""
    stderr.quiet, _said["verbose"] = quiet, verbose
    level = logging.ERROR if quiet else logging.INFO if verbose else logging.WARNING
    logging.getLogger("diffusers_msfp").setLevel(level)


def say_anyway(text: str, *, style: str = "") -> None:
    """A line that `--quiet` does not silence: what went wrong."""
    stderr.quiet = False
    stderr.print(text, style=style, soft_wrap=True, highlight=False, markup=False)


@contextmanager
def progress(title: str) -> Iterator[OnProgress]:
    """Progress on standard error; yields what moves it, with what it is told beside its title."""
    if stderr.is_terminal and not _said["verbose"]:
        with _bar(title) as report:
            yield report
    else:
        yield _Lines(title)


@contextmanager
def _bar(title: str) -> Iterator[OnProgress]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=stderr.quiet) as bar:
        task = bar.add_task(title, total=None)

        def report(done: int, total: int, /, **info: object) -> None:
            bar.update(task, completed=done, total=total or None, description=" ".join([title, *_notes(info)]))

        yield report


class _Lines:
    """Progress as lines: now and then, with the time left."""

    def __init__(self, title: str) -> None:
        self._title, self._began = title, time.monotonic()
        self._last = self._began

    def __call__(self, done: int, total: int, /, **info: object) -> None:
        """See `OnProgress`."""
        now = time.monotonic()
        took, ended = now - self._began, bool(total) and done >= total
        if not (_said["verbose"] or now - self._last >= EVERY or (ended and took >= LONG)):
            return
        self._last = now
        words = [self._title, *_notes(info)]
        if ended:
            when = f"{took:.0f} s"
        elif total and done:
            when = f"about {took / done * (total - done):.0f} s left"
        else:
            when = f"{took:.0f} s so far"
        stderr.print(
            f"{' '.join(words)}: {done} of {total or 'unknown'}, {when}", soft_wrap=True, highlight=False, markup=False
        )


def _notes(info: dict) -> list[str]:
    return [f"loss {value:.5f}" if key == "loss" else str(value) for key, value in info.items()]


def say(text: str, style: str | None = None) -> None:
    """A line of a result, as it is."""
    stdout.print(text, style=style, soft_wrap=True, highlight=False, markup=False)


def megabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.2f} MB"

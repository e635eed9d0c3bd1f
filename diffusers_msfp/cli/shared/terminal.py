"""What verbs say on the way: progress and notes go to standard error, results to standard output."""

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ...results import OnProgress

stderr = Console(stderr=True)
stdout = Console()


@contextmanager
def progress(title: str) -> Iterator[OnProgress]:
    """A progress bar on standard error; yields what moves it, with what it is told beside its title."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(title, total=None)

        def report(done: int, total: int, /, **info: object) -> None:
            notes = (f"loss {value:.5f}" if key == "loss" else str(value) for key, value in info.items())
            bar.update(task, completed=done, total=total or None, description=" ".join([title, *notes]))

        yield report


def say(text: str, style: str | None = None) -> None:
    """A line of a result, as it is."""
    stdout.print(text, style=style, soft_wrap=True, highlight=False, markup=False)


def megabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.2f} MB"

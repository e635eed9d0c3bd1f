"""What verbs say on the way: progress and notes go to standard error, results to standard output."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

stderr = Console(stderr=True)
stdout = Console()


@contextmanager
def progress(title: str) -> Iterator[Callable[..., None]]:
    """A progress bar on standard error; yields a function of (done, total, note=""), total 0 where it is not known."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=stderr, transient=True, disable=not stderr.is_terminal) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total, note="": bar.update(
            task, completed=done, total=total or None, description=f"{title} {note}".rstrip()
        )


def megabytes(size: float) -> str:
    """Bytes for people."""
    return f"{size / 1e6:.2f} MB"

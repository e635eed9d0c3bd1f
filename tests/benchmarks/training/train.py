"""Train one of the real models; started again, it goes on from its last checkpoint.

    python tests/benchmarks/training/train.py cifar10-pixel --data cifar10_jpeg60k.npz

Checkpoints, samples and the loss curve go to `.training/<name>`, which git ignores; `--export DIR` writes the averaged
weights as a stock pipeline in float16. Ctrl-C and SIGTERM save before they end the run; after `kill -9` it goes on from
a checkpoint that is a few minutes old, to the same result. Several processes: `accelerate launch … train.py …`.
"""

from pathlib import Path
from typing import Annotated

import torch
import typer
from data import load_cifar10
from loop import Settings, Task, train
from pixel import PixelTask

TASKS = {
    "cifar10-pixel": lambda data: PixelTask(load_cifar10(data)),
}


def make_task(name: str, data: Path, seed: int) -> Task:
    """A task with weights drawn from the seed."""
    torch.manual_seed(seed)
    return TASKS[name](data)


def main(
    name: Annotated[str, typer.Argument(help="of the model: " + ", ".join(TASKS))],
    data: Annotated[Path, typer.Option(help="cifar10_jpeg60k.npz")],
    out: Annotated[Path | None, typer.Option(help="the run's folder [default: .training/NAME]")] = None,
    updates: int = Settings.updates,
    batch_size: int = Settings.batch_size,
    learning_rate: float = Settings.learning_rate,
    seed: int = Settings.seed,
    stop_at: Annotated[int | None, typer.Option(help="stop at this update")] = None,
    save_every: Annotated[float, typer.Option(help="seconds between checkpoints")] = 240,
    sample_every: Annotated[int, typer.Option(help="updates between sample grids")] = 2000,
    export: Annotated[Path | None, typer.Option(help="write the averaged weights here, as a pipeline")] = None,
) -> None:
    """Train to the end, or to `--stop-at`."""
    settings = Settings(updates=updates, batch_size=batch_size, learning_rate=learning_rate, seed=seed)
    task = make_task(name, data, seed)
    out = out or Path(".training") / name
    train(task, out, settings, save_every=save_every, sample_every=sample_every, stop_at=stop_at, say=_say)
    if export is not None:
        task.half().eval()
        task.pipeline().save_pretrained(export)


def _say(line: str) -> None:
    typer.echo(line, err=True)


if __name__ == "__main__":
    typer.run(main)

"""Train one of the real models; started again, it goes on from its last checkpoint.

    python tests/benchmarks/training/train.py cifar10-pixel --data cifar10_jpeg60k.npz
    python tests/benchmarks/training/train.py cifar10-autoencoder --data cifar10_jpeg60k.npz --export AUTOENCODER
    python tests/benchmarks/training/train.py cifar10-latent-dit --data cifar10_jpeg60k.npz --autoencoder AUTOENCODER
    python tests/benchmarks/training/train.py cifar10-text --data cifar10_jpeg60k.npz --autoencoder AUTOENCODER

Checkpoints, samples and the loss curve go to `.training/<name>`, which git ignores; `--export DIR` writes the averaged
weights in float16, as a stock pipeline or autoencoder, with `--stop-at 0` those of the last checkpoint. Ctrl-C and
SIGTERM save before they end the run; after `kill -9` it goes on from a checkpoint that is a few minutes old, to the
same result. Where checkpoints are lost, `--begin-with model_cards/NAME` goes on from the averaged weights that were put
there, with a new optimizer. Several processes: `accelerate launch … train.py …`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from autoencoder import AutoencoderTask
from data import load_cifar10
from dit import DiTTask
from latents import load_autoencoder, make_latents
from loop import SettingsError, Task, train
from pixel import PixelTask
from text import TextTask

TASKS = {task.name: task for task in (PixelTask, AutoencoderTask, DiTTask, TextTask)}
LATENT = (DiTTask.name, TextTask.name)


def make_task(name: str, data: Path, autoencoder: Path | None, cache: Path, **changes) -> Task:
    """A task with weights drawn from the seed.

    Args:
        name (`str`): of `TASKS`.
        data (`Path`): the pictures.
        autoencoder (`Path`, *optional*): exported; needed by those on latents.
        cache (`Path`): keeps latents.
        **changes: of the task's settings.
    """
    kind, pictures = TASKS[name], load_cifar10(data)
    settings = replace(kind.defaults(), **changes)
    if name in LATENT:
        vae = load_autoencoder(autoencoder)
        parts = (vae, make_latents(vae, pictures, cache, _say))
    elif name == AutoencoderTask.name:
        parts = (pictures, load_cifar10(data, train=False))
    else:
        parts = (pictures,)
    torch.manual_seed(settings.seed)
    return kind(*parts, settings)


def main(
    name: Annotated[str, typer.Argument(help="of the model: " + ", ".join(TASKS))],
    data: Annotated[Path, typer.Option(help="cifar10_jpeg60k.npz")],
    autoencoder: Annotated[Path | None, typer.Option(help="exported; for " + " and ".join(LATENT))] = None,
    out: Annotated[Path | None, typer.Option(help="the run's folder [default: .training/NAME]")] = None,
    updates: Annotated[int | None, typer.Option(help="[default: the task's, as the next three]")] = None,
    batch_size: int | None = None,
    learning_rate: float | None = None,
    seed: int | None = None,
    stop_at: Annotated[int | None, typer.Option(help="stop at this update")] = None,
    save_every: Annotated[float, typer.Option(help="seconds between checkpoints")] = 240,
    sample_every: Annotated[int, typer.Option(help="updates between sample grids")] = 2000,
    begin_with: Annotated[Path | None, typer.Option(help="published weights to go on from, without checkpoint")] = None,
    export: Annotated[Path | None, typer.Option(help="write the averaged weights here")] = None,
) -> None:
    """Train to the end, or to `--stop-at`."""
    if name not in TASKS:
        raise typer.BadParameter(f"unknown model {name!r}; known: {', '.join(TASKS)}")
    if begin_with is not None and name == AutoencoderTask.name:
        raise typer.BadParameter(f"{name} is no pipeline, and trained in one go")
    if (name in LATENT) != (autoencoder is not None):
        raise typer.BadParameter(f"`--autoencoder` belongs to {' and '.join(LATENT)}, and only to them")
    given = {"updates": updates, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    out = out or Path(".training") / name
    changes = {key: value for key, value in given.items() if value is not None}
    task = make_task(name, data, autoencoder, out.parent, **changes)
    try:
        progress = train(
            task,
            out,
            save_every=save_every,
            sample_every=sample_every,
            stop_at=stop_at,
            begin_with=begin_with,
            say=_say,
        )
    except SettingsError as error:
        _say(str(error))
        raise typer.Exit(1) from error
    if export is not None and progress.update >= task.settings.end(stop_at):  # not where a signal ended it
        task.export(export)


def _say(line: str) -> None:
    typer.echo(line, err=True)


if __name__ == "__main__":
    typer.run(main)

"""Checkpoints of a training run: complete or absent, and refused where the settings differ."""

import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import torch
from accelerate import Accelerator
from diffusers.training_utils import EMAModel
from torch import nn

from ...sampling.calls import drawing_from
from ..losses import floats
from ..runs import SETTINGS, Stop, check_settings, write_settings
from .config import FinetuneConfig
from .student import Student

PREFIX = "checkpoint-"
TIMED_UPDATES = 6  # before the length of a run of so many minutes is set; the first is not counted


def checkpoints_in(path: Path) -> list[Path]:
    """The complete ones in a folder, the oldest first; none where there is no folder."""
    found = [p for p in path.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()]
    return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))


class Progress:
    """How far a run is; saved and loaded by accelerate together with optimizer and random states.

    Args:
        student (`Student`): its trainable tensors are part of the state; the frozen ones are not.
        ema (`EMAModel`, *optional*): as well.
    """

    def __init__(self, student: Student, ema: EMAModel | None = None) -> None:
        self.student, self.ema = student, ema
        self.update = 0
        self.total = 0  # 0: not known yet
        self.seconds = 0.0
        self.first = 0.0  # seconds of the first update, which warms up
        self.losses: list[float] = []

    def set_length(self, minutes: float | None, accelerator: Accelerator) -> None:
        """Fix the number of updates that fit into the minutes asked for, once their speed is known."""
        if self.update == 1:
            self.first = self.seconds
        if self.total or self.update < TIMED_UPDATES:
            return
        rate = (self.seconds - self.first) / (self.update - 1)
        left = 60 * cast(float, minutes) - self.seconds
        more = floats([left / rate], accelerator.device)
        self.total = self.update + max(0, int(accelerator.gather(more).min()))

    def state_dict(self) -> dict:
        """Tensors and plain numbers."""
        return {
            "update": self.update,
            "total": self.total,
            "seconds": self.seconds,
            "first": self.first,
            "losses": list(self.losses),
            "trainable": self.student.trainable_state(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        self.student.load_trainable_state(state["trainable"])
        self.update, self.total = state["update"], state["total"]
        self.seconds, self.losses = state["seconds"], list(state["losses"])
        self.first = state.get("first", 0.0)
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.student.model.device)


class TrainingFolder:
    """Where a run keeps its checkpoints; `None` keeps nothing.

    Args:
        path (`Path`, *optional*): the folder.
        accelerator (`Accelerator`): whose state is kept.
        progress (`Progress`): registered with it.
        config (`FinetuneConfig`), digests (`dict[str, str]`): what must be equal for a run to go on, as the number of
            processes must; of the quantized model as it came, whole, and of all else.

    Raises:
        ConfigError: the folder holds a training run with other settings.
    """

    def __init__(
        self,
        path: Path | None,
        accelerator: Accelerator,
        progress: Progress,
        config: FinetuneConfig,
        digests: dict[str, str],
    ) -> None:
        self.path, self.accelerator, self.progress, self.config = path, accelerator, progress, config
        self._saved = self._previewed = time.monotonic()
        self._preview_cost = 0.0
        if path is None:
            return
        settings = config.to_dict() | {"processes": accelerator.num_processes} | digests
        if accelerator.is_main_process:
            write_settings(path, settings)
        accelerator.wait_for_everyone()
        check_settings(path, settings)
        accelerator.register_for_checkpointing(progress)
        # The model itself is frozen and comes from its checkpoint.
        accelerator.register_save_state_pre_hook(lambda _models, weights, _folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, _folder: models.clear())

    def checkpoints(self) -> list[Path]:
        """Complete ones, the oldest first."""
        return [] if self.path is None else checkpoints_in(self.path)

    def resume(self) -> bool:
        """Load the newest checkpoint; False if there is none."""
        found = self.checkpoints()
        if found:
            with drawing_from(0, self.accelerator):  # which leaves the user's random numbers as they are
                self.accelerator.load_state(str(found[-1]))
        return bool(found)

    def keep(self, stop: Stop) -> None:
        """After an update: save what is due by number, by time or at the end, and before a signal ends the run.

        Args:
            stop (`Stop`): of this process; what one process was asked holds for all.
        """
        if self.path is None:
            return
        progress, limit = self.progress, self.config.checkpoint_seconds
        due = bool(limit) and time.monotonic() - self._saved >= limit
        device = self.accelerator.device
        asked = self.accelerator.gather(torch.tensor([[due, stop.asked is not None]], device=device, dtype=torch.int))
        by_time, stopped = asked.bool().any(0).tolist()
        if (
            by_time
            or stopped
            or progress.update == progress.total
            or progress.update % self.config.checkpoint_every == 0
        ):
            self.save()
            self._saved = time.monotonic()
        if stopped:
            stop.end()

    def preview_due(self) -> bool:
        """Whether pictures are to be drawn after this update."""
        config, update, now = self.config, self.progress.update, time.monotonic()
        if not config.preview_every:
            return False
        patience = max(config.preview_seconds, 10 * self._preview_cost)
        by_time = bool(config.preview_seconds) and now - self._previewed >= patience
        return by_time or update % config.preview_every == 0 or update == self.progress.total

    @contextmanager
    def previewing(self) -> Iterator[None]:
        """Take the time of drawing them."""
        started = time.monotonic()
        yield
        self._previewed = time.monotonic()
        self._preview_cost = self._previewed - started

    def save(self) -> None:
        """Write a checkpoint beside its place, move it there in one step, and drop older ones."""
        if self.path is None:
            return
        target = self.path / f"{PREFIX}{self.progress.update}"
        part = self.path / f"{target.name}.part"
        if self.accelerator.is_main_process and part.exists():
            shutil.rmtree(part)
        self.accelerator.wait_for_everyone()
        self.accelerator.save_state(str(part))
        self.accelerator.wait_for_everyone()
        if self.accelerator.is_main_process:
            if target.exists():  # of a run that was stopped right here
                shutil.rmtree(target)
            part.rename(target)
            for old in self.checkpoints()[:-1]:
                shutil.rmtree(old)
        self.accelerator.wait_for_everyone()

    def clear(self) -> None:
        """Remove checkpoints and settings; logs and pictures stay."""
        if self.path is None or not self.accelerator.is_main_process:
            return
        for checkpoint in self.checkpoints():
            shutil.rmtree(checkpoint)
        (self.path / SETTINGS).unlink(missing_ok=True)


def optimizer_for(student: Student, config: FinetuneConfig) -> torch.optim.Optimizer:
    """AdamW; `peak` of a group is the learning rate that the schedule scales.

    Adapters learn in steps of their layer's weight grid (EfficientDM's scale-aware learning rate): groups of equal rate
    are joined, in steps of a tenth.
    """
    ranges: list[nn.Parameter] = []
    affine = [parameter for parameter, _ in student.norms]
    adapters: dict[float, list[nn.Parameter]] = {}
    for trainee in student.trainees():
        ranges += [p for p in (trainee.log_scale, trainee.relative_zero_point) if p is not None]
        affine += [p for p in (trainee.bias, trainee.log_weight_scale) if p is not None]
        peak = float(f"{cast(float, config.learning_rate) * trainee.weight_step():.1e}")
        adapters.setdefault(peak, []).extend(trainee.adapters.parameters())
    groups = [
        {"params": params, "peak": peak, "weight_decay": config.weight_decay} for peak, params in adapters.items()
    ]
    for params, peak in (
        (ranges, config.activation_learning_rate),
        (affine, config.affine_learning_rate),
        (list(student.router.parameters()), config.router_learning_rate),
    ):
        if params:
            groups.append({"params": params, "peak": peak, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=0.0)

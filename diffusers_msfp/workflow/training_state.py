"""Checkpoints of a training run: complete or absent, and refused where the settings differ."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ..errors import ConfigError
from .adapters import base_fingerprint
from .finetune_config import FinetuneConfig
from .student import Student

SETTINGS = "settings.json"
PREFIX = "checkpoint-"


class Progress:
    """How far a run is; saved and loaded by accelerate together with optimizer and random states.

    Args:
        student (`Student`): its trainable tensors are part of the state; the frozen ones are not.
        ema (`EMAModel`, *optional*): as well.
    """

    def __init__(self, student: Student, ema=None) -> None:
        self.student, self.ema = student, ema
        self.update = 0
        self.total = 0  # 0: not known yet
        self.seconds = 0.0
        self.losses: list[float] = []

    def state_dict(self) -> dict:
        """Tensors and plain numbers."""
        return {
            "update": self.update,
            "total": self.total,
            "seconds": self.seconds,
            "losses": list(self.losses),
            "trainable": self.student.trainable_state(),
            "ema": self.ema.state_dict() if self.ema is not None else None,
        }

    def load_state_dict(self, state: dict) -> None:
        """Inverse of `state_dict`."""
        self.student.load_trainable_state(state["trainable"])
        self.update, self.total = state["update"], state["total"]
        self.seconds, self.losses = state["seconds"], list(state["losses"])
        if self.ema is not None:
            self.ema.load_state_dict(state["ema"])
            self.ema.to(self.student.model.device)


def plain_config(part: object) -> dict:
    """Settings of a model or scheduler, without diffusers' own notes, whose order differs from process to process."""
    config = getattr(part, "config", None)
    return {key: value for key, value in config.items() if key[0] != "_"} if isinstance(config, Mapping) else {}


def inputs_digest(model: nn.Module, *others: object) -> str:
    """SHA-256 of a model's state and of other things; tensors count by their values, objects by their kind."""
    digest = hashlib.sha256()

    def describe(value: object) -> str:
        if hasattr(value, "__tensor_flatten__"):  # other people's quantized tensors
            return " ".join(describe(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous().reshape(-1)
            return hashlib.sha256(plain.view(torch.uint8).numpy()).hexdigest()
        return type(value).__name__

    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{describe(tensor)}".encode())
    digest.update(json.dumps(others, default=describe, sort_keys=True).encode())
    return digest.hexdigest()


class TrainingFolder:
    """Where a run keeps its checkpoints; `None` keeps nothing.

    Args:
        path (`Path`, *optional*): the folder.
        accelerator (`Accelerator`): whose state is kept.
        progress (`Progress`): registered with it.
        config (`FinetuneConfig`), inputs (`str`): must be equal for a run to go on, as the quantized model and the
            number of processes.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """

    def __init__(
        self, path: Path | None, accelerator: Accelerator, progress: Progress, config: FinetuneConfig, inputs: str
    ) -> None:
        self.path, self.accelerator, self.progress = path, accelerator, progress
        if path is None:
            return
        settings = config.to_dict() | {
            "processes": accelerator.num_processes,
            "inputs": inputs,
            "model": base_fingerprint(progress.student.model),
        }
        file = path / SETTINGS
        if accelerator.is_main_process and not file.is_file():
            path.mkdir(parents=True, exist_ok=True)
            new = file.with_suffix(".part")
            new.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            new.replace(file)
        accelerator.wait_for_everyone()
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConfigError(
                f"{file} must be JSON, but it is not ({error}). Delete the folder to begin anew."
            ) from error
        if settings != found:
            differ = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
            raise ConfigError(
                f"{path} holds a training run with other settings ({', '.join(differ)}). Give the same settings to go "
                f"on with it, or delete the folder to begin anew."
            )
        accelerator.register_for_checkpointing(progress)
        # The model itself is frozen and comes from its checkpoint.
        accelerator.register_save_state_pre_hook(lambda _models, weights, _folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, _folder: models.clear())

    def checkpoints(self) -> list[Path]:
        """Complete ones, the oldest first."""
        if self.path is None or not self.path.is_dir():
            return []
        found = [p for p in self.path.glob(f"{PREFIX}*") if p.name.removeprefix(PREFIX).isdecimal()]
        return sorted(found, key=lambda p: int(p.name.removeprefix(PREFIX)))

    def resume(self) -> bool:
        """Load the newest checkpoint; False if there is none."""
        found = self.checkpoints()
        if found:
            self.accelerator.load_state(str(found[-1]))
        return bool(found)

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
    ranges, adapters = [], {}
    for trainee in student.trainees():
        ranges += [p for p in (trainee.log_scale, trainee.relative_zero_point) if p is not None]
        peak = float(f"{config.learning_rate * trainee.weight_step():.1e}")
        adapters.setdefault(peak, []).extend(trainee.adapters.parameters())
    groups = [
        {"params": params, "peak": peak, "weight_decay": config.weight_decay} for peak, params in adapters.items()
    ]
    for params, peak in (
        (ranges, config.activation_learning_rate),
        (list(student.router.parameters()), config.router_learning_rate),
    ):
        if params:
            groups.append({"params": params, "peak": peak, "weight_decay": 0.0})
    return torch.optim.AdamW(groups, lr=0.0)

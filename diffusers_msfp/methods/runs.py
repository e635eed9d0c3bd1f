"""Runs that can be interrupted: what tells one from another, kept in the run's folder, and how signals wait for it."""

import hashlib
import json
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..outputs import write_whole
from ..sampling.denoisers import denoiser_of, labels_of, scheduler_of

SETTINGS = "settings.json"


def plain_config(part: object) -> dict:
    """Settings of a model or scheduler, without diffusers' own notes, whose order differs from process to process."""
    config = getattr(part, "config", None)
    return {key: value for key, value in config.items() if key[0] != "_"} if isinstance(config, Mapping) else {}


def inputs_digest(model: nn.Module, *others: object) -> str:
    """SHA-256 of a model's state and of other things.

    Tensors, arrays and pictures count by their values, other objects by their kind.
    """
    digest = hashlib.sha256()

    def describe(value: object) -> str:
        if hasattr(value, "__tensor_flatten__"):  # other people's quantized tensors
            return " ".join(describe(getattr(value, name)) for name in value.__tensor_flatten__()[0])
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous().reshape(-1)
            return f"{tuple(value.shape)} {hashlib.sha256(plain.view(torch.uint8).numpy().data).hexdigest()}"
        if isinstance(value, Image.Image):
            stored = value.tobytes() + bytes(value.getpalette() or ())
            return f"{value.mode} {value.size} {hashlib.sha256(stored).hexdigest()}"
        if isinstance(value, np.ndarray | np.generic):
            return f"{value.dtype} {value.shape} {hashlib.sha256(value.tobytes()).hexdigest()}"
        return type(value).__name__

    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}:{describe(tensor)}".encode())
    digest.update(json.dumps(others, default=describe, sort_keys=True).encode())
    return digest.hexdigest()


def digests_of(teacher: DiffusionPipeline, model: nn.Module, *given: object) -> dict[str, str]:
    """What tells one run from another, besides its settings.

    Args:
        teacher (`DiffusionPipeline`): whose denoiser, text encoders, scheduler and labels decide what is learned.
        model (`nn.Module`): that learns, as it comes.
        *given: prompts and arguments.
    """
    scheduler = scheduler_of(teacher)
    parts = [part for part in teacher.components.values() if isinstance(part, PreTrainedModel)]
    encoders = [
        repr(part) if any(each.is_meta for each in part.parameters()) else inputs_digest(part)  # offloaded, or at hand
        for part in parts
    ]
    asked = [type(scheduler).__name__, plain_config(scheduler), list(labels_of(teacher)), encoders]
    return {"inputs": inputs_digest(denoiser_of(teacher), *given, *asked), "model": inputs_digest(model)}


def write_settings(path: Path, settings: dict) -> None:
    """Say in a folder which run it belongs to, unless it says so already."""
    file = path / SETTINGS
    if not file.is_file():
        path.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(settings, indent=1) + "\n")


def check_settings(path: Path, settings: dict) -> None:
    """Refuse a folder of another run.

    Raises:
        ConfigError: its settings differ, or cannot be read.
    """
    file = path / SETTINGS
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{file} must be JSON, but it is not ({error}). Delete the folder to begin anew.") from error
    if settings != found:
        differ = sorted(key for key in settings.keys() | found.keys() if settings.get(key) != found.get(key))
        raise ConfigError(
            f"{path} holds a training run with other settings ({', '.join(differ)}). Give the same settings to go on "
            f"with it, or delete the folder to begin anew."
        )


class Stop:
    """Whether a signal has asked a run to end."""

    asked: int | None = None
    _before: Mapping[int, Any] = {}

    def end(self) -> None:
        """Let the signal take its effect; where it came to another process, that of Ctrl-C.

        Raises:
            KeyboardInterrupt: by Python's own handler.
        """
        number = self.asked or signal.SIGINT
        if number in self._before:
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        raise KeyboardInterrupt


@contextmanager
def deferred_signals(enabled: bool = True) -> Iterator[Stop]:
    """Let Ctrl-C and SIGTERM wait until the run calls `Stop.end`; Ctrl-C a second time does not wait.

    Args:
        enabled (`bool`): whether there is something to wait for. Only the main thread can have signals wait.
    """
    stop = Stop()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, _frame: object) -> None:
        if stop.asked == number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.asked = number

    numbers = (signal.SIGINT, signal.SIGTERM)
    stop._before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, ask)
        yield stop
    finally:
        for deferred, before in stop._before.items():
            signal.signal(deferred, before)
    if stop.asked is not None:  # after the last update
        signal.raise_signal(stop.asked)

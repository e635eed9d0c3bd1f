"""What tells one interrupted run from another: settings and inputs, kept in the run's folder."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..errors import ConfigError

SETTINGS = "settings.json"


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


def write_settings(path: Path, settings: dict) -> None:
    """Say in a folder which run it belongs to, unless it says so already."""
    file = path / SETTINGS
    if not file.is_file():
        path.mkdir(parents=True, exist_ok=True)
        new = file.with_suffix(".part")
        new.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
        new.replace(file)


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

"""Finished parts of learned rounding on disk, so that an interrupted run goes on."""

import json
from pathlib import Path
from typing import cast

from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from ...layers import QuantLayer
from ..runs import check_settings, digests_of, write_settings
from .config import RoundingConfig

STORED = ("packed_weight", "weight_error")


class RoundingFolder:
    """One file for each finished part: packed weights, their errors, and what became of the part.

    Args:
        path (`str` or `Path`, *optional*): the folder; `None` keeps nothing.
        model (`nn.Module`), teacher (`DiffusionPipeline`), config (`RoundingConfig`): must be equal for a run to go on.
        inputs (`object`): prompts and arguments, which must be, too.

    Raises:
        ConfigError: the folder holds a run with other settings.
    """

    def __init__(
        self,
        path: str | Path | None,
        model: nn.Module,
        teacher: DiffusionPipeline,
        config: RoundingConfig,
        *inputs: object,
    ) -> None:
        self.path = Path(path) if path else None
        if self.path is not None:
            settings = config.to_dict() | digests_of(teacher, model, *inputs)
            write_settings(self.path, settings)
            check_settings(self.path, settings)

    def save(self, number: int, layers: dict[str, QuantLayer], record: dict) -> None:
        """Keep a finished part: its layers by name, and what became of it."""
        if self.path is None:
            return
        tensors = {f"{key}.{name}": getattr(layer, name) for key, layer in layers.items() for name in STORED}
        file = self._file(number)
        new = file.with_suffix(".part")
        save_file(
            {key: tensor.detach().contiguous() for key, tensor in tensors.items()}, new, {"record": json.dumps(record)}
        )
        new.replace(file)

    def load(self, number: int, layers: dict[str, QuantLayer]) -> dict | None:
        """Put a finished part's weights into its layers; what became of it, or None if it is not finished."""
        if self.path is None or not self._file(number).is_file():
            return None
        with safe_open(self._file(number), "pt") as file:
            for key, layer in layers.items():
                layer.put_weight(*(file.get_tensor(f"{key}.{name}") for name in STORED))
            return json.loads(file.metadata()["record"])

    def _file(self, number: int) -> Path:
        return cast(Path, self.path) / f"part-{number:04}.safetensors"

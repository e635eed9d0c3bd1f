"""Safetensors files, opened."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError


@contextmanager
def opened(file: Path) -> Iterator[Any]:
    """A file's handle, on the CPU, as `safetensors.safe_open` gives it.

    Raises:
        CheckpointError: it cannot be read, or is no safetensors file.
    """
    try:
        with safe_open(file, framework="pt", device="cpu") as handle:
            yield handle
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{file} must be a safetensors file, but it is not ({error}).") from error

"""What a machine has measured, on disk."""

import contextlib
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from ...compat.processor import instruction_limit, instruction_sets, processor
from ...outputs import write_whole
from ..kernels import NAME, user_cache


def machine() -> dict[str, Any]:
    """All that times depend on besides the question."""
    return {
        "processor": processor(),
        "instruction_sets": list(instruction_sets()),
        "onednn_limit": instruction_limit(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "diffusers_msfp": _version(),
        "kernels": NAME,
    }


@lru_cache
def _version() -> str:
    try:
        return importlib.metadata.version("diffusers-msfp")
    except importlib.metadata.PackageNotFoundError:  # run from its sources without an installation
        return "sources"


def path() -> Path:
    """This machine's file."""
    digest = hashlib.sha256(json.dumps(machine(), sort_keys=True).encode()).hexdigest()[:16]
    return user_cache.folder("tuning") / f"{digest}.json"


def read() -> dict[str, dict[str, float]]:
    """Question → way → seconds; empty where there is no file, or none that this machine has written."""
    try:
        content = json.loads(path().read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    if not isinstance(content, dict) or content.get("machine") != machine():
        return {}
    found = content.get("seconds")
    return {q: ways for q, ways in found.items() if _is_measurement(ways)} if isinstance(found, dict) else {}


def _is_measurement(ways: object) -> bool:
    if not isinstance(ways, dict) or not ways:
        return False
    return all(type(each) is float and math.isfinite(each) and each > 0 for each in ways.values())


def add(seconds: Mapping[str, Mapping[str, float]]) -> None:
    """Write measurements beside those that are there, in one step; other processes may do the same."""
    content = {"machine": machine(), "seconds": read() | {question: dict(ways) for question, ways in seconds.items()}}
    file = path()
    with contextlib.suppress(OSError):  # a cache that cannot be kept is made anew
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, json.dumps(content, indent=1))

"""What every benchmark shares: result rows with their origin, and where they are kept."""

import inspect
import json
import platform
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_cards" / "results"
sys.path.insert(0, str(ROOT / "tests" / "benchmarks" / "training"))

from captions import captions  # noqa: E402
from data import CIFAR10_CLASSES, load_cifar10  # noqa: E402


def asked_of(model: Path, pipe: diffusers.DiffusionPipeline) -> dict:
    """What a real model is called with: prompts of its captions, where it takes some, and the guidance of its card."""
    card = model / "results" / "training.json"
    settings = json.loads(card.read_text(encoding="utf-8"))["training"]["settings"] if card.is_file() else {}
    asked = {"guidance_scale": settings["guidance"]} if "guidance" in settings else {}
    takes_prompts = "prompt" in inspect.signature(type(pipe).__call__).parameters
    return asked | ({"prompts": [captions(name)[0] for name in CIFAR10_CLASSES]} if takes_prompts else {})


def real_pictures(data: Path, folder: Path) -> Path:
    """An archive that evaluations read: Fashion-MNIST's own; JPEG CIFAR-10's test pictures, decoded into a folder."""
    with np.load(data) as archive:
        if "offsets" not in archive:
            return data
    decoded = folder / f"{data.stem}-test.npz"
    if not decoded.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        images = load_cifar10(data, train=False).images
        np.savez(part := folder / f"{data.stem}-test.part.npz", x_test=images.permute(0, 2, 3, 1).numpy())
        part.replace(decoded)
    return decoded


def origin() -> dict:
    """Machine, versions and commit of a result."""

    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()

    return {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "git": git("rev-parse", "--short", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--", "diffusers_msfp", "tests")),
    }


def write_results(name: str, command: str, rows: list[dict]) -> None:
    """Write `model_cards/results/<name>.json`; each row has the commit that it was made at, `git`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    now = origin()
    old = read_results(name) if (RESULTS / f"{name}.json").exists() else {"rows": []}
    stamped = [{**row, "git": row.get("git") or (old["origin"] if row in old["rows"] else now)["git"]} for row in rows]
    content = {"command": command, "origin": now, "rows": stamped}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_results(name: str) -> dict:
    """Read what `write_results` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def grouped(results: str, key: str) -> dict[str, list[dict]]:
    """The rows of a results file by their value under `key`."""
    groups = {}
    for row in read_results(results)["rows"]:
        groups.setdefault(row[key], []).append(row)
    return groups


def keep_rows(
    name: str, command: str, rows: Sequence[dict], by: Sequence[str], order: Callable[[dict], Any] | None = None
) -> None:
    """Put rows into a results file in the place of those that are equal to one of them under the keys `by`."""
    old = read_results(name)["rows"] if (RESULTS / f"{name}.json").exists() else []
    made = [[row.get(key) for key in by] for row in rows]
    kept = [row for row in old if [row.get(key) for key in by] not in made] + [*rows]
    write_results(name, command, kept if order is None else sorted(kept, key=order))

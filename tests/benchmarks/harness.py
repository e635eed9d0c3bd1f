"""What every benchmark shares: result rows with their origin, and where they are kept."""

import json
import platform
import subprocess
from pathlib import Path

import diffusers
import torch

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_cards" / "results"


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
    """Write `model_cards/results/<name>.json`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    content = {"command": command, "origin": origin(), "rows": rows}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_results(name: str) -> dict:
    """Read what `write_results` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))

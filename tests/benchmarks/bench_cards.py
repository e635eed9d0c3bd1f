"""Measure the checkpoints that the package brings, for their cards.

    python tests/benchmarks/bench_cards.py --data fashion_mnist.npz [--out DIR] [--only NAME] [--part comparison]

The checkpoints go to `--out`, ready for `diffusers-msfp publish`; everything of their repositories that is no weight
and no config goes to `model_cards/<name>/`. With `--part` the others stay as they were measured before.
"""

import argparse
import shutil
from collections.abc import Collection
from pathlib import Path

from harness import ROOT

from diffusers_msfp.assets import EMBEDDED_MODEL, TUNED_MODELS
from diffusers_msfp.cli import bench, compare, evaluate, publish
from diffusers_msfp.hub.prepare import as_json

OWNER, BASE = "diffusers-msfp", "ddpm-fashion-mnist-32"
CHECKPOINTS = {f"{BASE}-{scheme}": folder for scheme, folder in TUNED_MODELS.items()}
"""Name → the checkpoint that the package brings."""
PARTS = ("comparison", "evaluation", "speed")


def make(name: str, out: Path, data: str, parts: Collection[str]) -> Path:
    """The checkpoint with its measurements."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(CHECKPOINTS[name], folder)
    measures = {
        "comparison": lambda: compare(str(EMBEDDED_MODEL), str(folder), num_samples=256),
        "evaluation": lambda: evaluate(str(folder), reference=str(EMBEDDED_MODEL), data=data, out=out / "evaluation"),
        "speed": lambda: bench(str(folder), batch=8),
    }
    before = ROOT / "model_cards" / name / "results"
    found = {
        kind: as_json(measure().to_dict()) if kind in parts else (before / f"{kind}.json").read_bytes()
        for kind, measure in measures.items()
    }
    (folder / "results").mkdir()
    for kind, figures in found.items():
        (folder / "results" / f"{kind}.json").write_bytes(figures)
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="fashion_mnist.npz, for real test images")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "checkpoints")
    parser.add_argument("--only", choices=CHECKPOINTS)
    parser.add_argument("--part", action="append", choices=PARTS, help="to be measured; all if left out")
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else CHECKPOINTS:
        folder = make(name, arguments.out, arguments.data, arguments.part or PARTS)
        staged, card = arguments.out / f"{name}-publish", ROOT / "model_cards" / name
        shutil.rmtree(staged, ignore_errors=True)
        report = publish(
            folder,
            f"{OWNER}/{name}",
            license="mit",
            base_model=f"{OWNER}/{BASE}",
            dry_run=staged,
            num_inference_steps=50,
        )
        shutil.rmtree(card, ignore_errors=True)
        for place in report.files:
            if place.startswith(("README.md", "preview.png", "results/")):
                (card / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(staged / place, card / place)

"""Measure the checkpoints that the package brings, for their cards.

    python tests/benchmarks/bench_cards.py --data fashion_mnist.npz [--out DIR] [--only NAME]

The checkpoints go to `--out`, ready for `diffusers-msfp publish`; everything of their repositories that is no weight
and no config goes to `model_cards/<name>/`.
"""

import argparse
import shutil
from pathlib import Path

from harness import ROOT

from diffusers_msfp.assets import EMBEDDED_MODEL, TUNED_MODELS
from diffusers_msfp.cli import bench, compare, evaluate, publish
from diffusers_msfp.hub.prepare import as_json

OWNER, BASE = "diffusers-msfp", "ddpm-fashion-mnist-32"
CHECKPOINTS = {f"{BASE}-{scheme}": folder for scheme, folder in TUNED_MODELS.items()}
"""Name → the checkpoint that the package brings."""


def make(name: str, out: Path, data: str) -> Path:
    """The checkpoint with its measurements."""
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(CHECKPOINTS[name], folder)
    measured = {
        "comparison": compare(str(EMBEDDED_MODEL), str(folder), num_samples=256),
        "evaluation": evaluate(str(folder), str(EMBEDDED_MODEL), data=data, out=out / "evaluation"),
        "speed": bench(str(folder), batch=8),
    }
    results = folder / "results"
    results.mkdir()
    for kind, figures in measured.items():
        (results / f"{kind}.json").write_bytes(as_json(figures.to_dict()))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", required=True, help="fashion_mnist.npz, for real test images")
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "checkpoints")
    parser.add_argument("--only", choices=CHECKPOINTS)
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else CHECKPOINTS:
        folder = make(name, arguments.out, arguments.data)
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

"""Make the package's own checkpoints and the results for their cards.

    python tests/benchmarks/bench_cards.py [--out DIR] [--only NAME]

The checkpoints go to `--out`, ready for `diffusers-msfp publish`; everything of their repositories that is no weight
and no config goes to `model_cards/<name>/`.
"""

import argparse
import shutil
from pathlib import Path

from harness import ROOT

from diffusers_msfp import FinetuneConfig
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.cli import bench, compare, finetune, publish, quantize
from diffusers_msfp.hub.prepare import as_json

OWNER, BASE = "diffusers-msfp", "ddpm-fashion-mnist-32"
CHECKPOINTS = {f"{BASE}-w4a8": ("w4a8", None), f"{BASE}-w4a4-talora": ("w4a4", FinetuneConfig(train_steps=100))}
"""Name → scheme, and how it is fine-tuned."""


def make(name: str, out: Path) -> Path:
    """The checkpoint with its measurements."""
    scheme, tuning = CHECKPOINTS[name]
    folder = out / name
    quantized = folder if tuning is None else out / f"{name}-untuned"
    quantize(str(EMBEDDED_MODEL), quantized, scheme=scheme, overwrite=True)
    if tuning is not None:
        finetune(str(quantized), str(EMBEDDED_MODEL), folder, tuning, overwrite=True)
    results = folder / "results"
    results.mkdir()
    (results / "comparison.json").write_bytes(as_json(compare(str(EMBEDDED_MODEL), str(folder))))
    if tuning is None:  # `bench` compares with the float weights, which a model with adapters does not have
        (results / "speed.json").write_bytes(as_json(bench(str(folder), batch=8)))
    return folder


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "checkpoints")
    parser.add_argument("--only", choices=CHECKPOINTS)
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else CHECKPOINTS:
        folder = make(name, arguments.out)
        staged, card = arguments.out / f"{name}-publish", ROOT / "model_cards" / name
        shutil.rmtree(staged, ignore_errors=True)
        report = publish(
            folder, f"{OWNER}/{name}", license="mit", base_model=f"{OWNER}/{BASE}", dry_run=staged, steps=50
        )
        shutil.rmtree(card, ignore_errors=True)
        for place in report["files"]:
            if place.startswith(("README.md", "preview.png", "results/")):
                (card / place).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(staged / place, card / place)

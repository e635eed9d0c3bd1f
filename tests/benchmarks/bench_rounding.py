"""Learned rounding against nearest rounding on a real model.

    python tests/benchmarks/bench_rounding.py [--cells "w4a8,w4a8 block"]

`eps_rel_l2` and PSNR are of 20 DDIM steps, for noise that calibration has not seen. Each row is written as soon as it
is measured; with `--cells` only these rows are made anew. Writes `model_cards/results/<name>.json`.
"""

import copy
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline
from harness import keep_rows

from diffusers_msfp import RoundingConfig, learn_rounding, quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.sampling.solvers import with_ddim

COMMAND = "python tests/benchmarks/bench_rounding.py"
ROUNDINGS = {
    "nearest": None,
    "block": {},
    "layer": {"granularity": "layer"},
    "block without scale-awareness": {"scale_aware": False},
    "block without penalty": {"penalty": 0.0},
}
CELLS = {f"{scheme} {key}": (scheme, key) for scheme in ("w4a8", "w4a4") for key in ROUNDINGS}


def main(
    cells: Annotated[str, typer.Option(help="comma-separated; all if left out")] = "",
    seed: int = 0,
    iterations: int = RoundingConfig.iterations,
    name: Annotated[str, typer.Option(help="of the results file")] = "rounding",
) -> None:
    """Quantize, learn, compare, write rows."""
    reference = with_ddim(DiffusionPipeline.from_pretrained(EMBEDDED_MODEL))
    reference.set_progress_bar_config(disable=True)
    for cell in cells.split(",") if cells else CELLS:
        scheme, key = CELLS[cell]
        pipe = copy.deepcopy(reference)
        pipe.set_progress_bar_config(disable=True)
        quantize_pipeline(pipe, scheme, seed=seed)
        row = {"cell": cell, "scheme": scheme, "rounding": key, "seed": seed, "threads": torch.get_num_threads()}
        if ROUNDINGS[key] is not None:
            result = learn_rounding(
                pipe, reference, RoundingConfig(**{"iterations": iterations, "seed": seed} | ROUNDINGS[key])
            )
            row |= {
                "minutes": round(result.seconds / 60, 2),
                "iterations": sum(part["iterations"] for part in result.parts),
                "parts": len(result.parts),
            }
            row |= {
                k: round(getattr(result, k), 5) for k in ("changed", "sparsity_before", "sparsity", "maxval_over_amax")
            }
        compared = compare_pipelines(reference, pipe, seed=1000 + seed)
        row |= {
            figure: float(f"{getattr(compared, figure):.5g}") for figure in ("eps_mse", "eps_rel_l2", "image_psnr_db")
        }
        keep_rows(name, COMMAND, [row], by=("cell", "seed"), order=lambda r: (list(CELLS).index(r["cell"]), r["seed"]))
        typer.echo(f"{cell:30} eps_rel_l2 {row['eps_rel_l2']:.4f}  psnr {row['image_psnr_db']:.1f} dB", err=True)


if __name__ == "__main__":
    typer.run(main)

"""The recipe `msfp` with one part changed at a time, at equal updates; the paper's four rows among them.

    python tests/benchmarks/bench_recipe.py [--cells "as it is,low rank" --seeds 0,1,2]

The embedded model, 20 DDIM steps; updates have 16 samples, as always. Each row is written when it is finished, and rows
that are there for these weights, updates and pictures are not made again, so that a run that was stopped goes on;
`--cells` makes its rows anew. What is there for others gives way: differences are paired, over pictures whose noise
cells share. The seed is that of calibration, fine-tuning and pictures. Writes
`model_cards/results/recipe.json`.
"""

import copy
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated
from unittest import mock

import torch
import typer
from diffusers import DiffusionPipeline
from harness import RESULTS, keep_rows, read_results
from own_trajectories import by_the_student

from diffusers_msfp import (
    FinetuneConfig,
    RoundingConfig,
    TemporalConfig,
    correct_output,
    finetune,
    learn_rounding,
    maintain_temporal,
    quantize_pipeline,
)
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.checkpoint.digest import fingerprint
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.evaluation.compare import psnr_db
from diffusers_msfp.evaluation.images.distances import mean_of
from diffusers_msfp.evaluation.images.samples import draw_pictures
from diffusers_msfp.methods.routes import routing_of
from diffusers_msfp.methods.talora.router import TimestepRouter
from diffusers_msfp.recipes import RECIPES
from diffusers_msfp.sampling.solvers import with_ddim

COMMAND = "python tests/benchmarks/bench_recipe.py"
DRAW = {"num_inference_steps": 20, "sampler": "own"}
BY_TIMESTEP = {"fsc": "all", "iterations": 0, "cache_above": None}


@dataclass(frozen=True)
class Cell:
    """What differs from the recipe.

    Args:
        settings (`Mapping`): of fine-tuning.
        scheme (`str`): of the model.
        before (`str`): a stage before fine-tuning: `"rounding"`, `"timesteps"` (scales and zero points for each) or
            none.
        corrected (`bool`): the output, at the end.
        warm (`bool`): routers begin with ranges of timesteps that carry equal loads.
        own (`float`): share of the trajectories that are the student's own, with the teacher's answers.
    """

    settings: Mapping[str, object] = field(default_factory=dict)
    scheme: str = "w4a4"
    before: str = ""
    corrected: bool = True
    warm: bool = True
    own: float = 0.0


NO_DFA = {"denoising_factor_exponent": 0.0}
EXPLORING = {"exploration": 1.0, "router_learning_rate": 1e-3}
CELLS = {
    "as it is": Cell(),
    "output not corrected": Cell(corrected=False),
    "no learned input scales": Cell({"activation_learning_rate": 0.0}),
    "no biases, norms, weight scales": Cell({"affine_learning_rate": 0.0}),
    "low rank, 32": Cell({"rank": 32}),
    "two banks": Cell({"num_adapters": 2}),
    "two banks, fixed segments": Cell({"num_adapters": 2, "router_learning_rate": 0.0, "balance": 0.0}),
    "two banks, cold start": Cell({"num_adapters": 2} | EXPLORING, warm=False),
    "four banks": Cell({"num_adapters": 4}),
    "loss by γ²": Cell({"denoising_factor_exponent": 2.0}),
    "floor of 0.25 under γ": Cell({"denoising_factor_floor": 0.25}),
    "half of the trajectories its own": Cell(own=0.5),
    "all trajectories its own": Cell(own=1.0),
    "from learned rounding": Cell(before="rounding"),
    "scales for each timestep": Cell(before="timesteps"),
    "residual sums in 4 bits": Cell(scheme="w4a4-pure"),
    "group scales": Cell(scheme="w4g32a4"),
    "8-bit inputs": Cell(scheme="w4a8"),
    "uniform formats": Cell(scheme="int-w4a4"),
    "paper: signed formats": Cell(NO_DFA, scheme="w4a4-signed"),
    "paper: + mixed sign": Cell(NO_DFA),
    "paper: + TALoRA, two banks": Cell(NO_DFA | {"num_adapters": 2}),
    "paper: + DFA": Cell({"num_adapters": 2}),
}


def made(reference: DiffusionPipeline, cell: Cell, updates: int, seed: int) -> tuple[DiffusionPipeline, float]:
    """A cell's pipeline, and its fine-tuning's seconds."""
    pipe = copy.deepcopy(reference)
    quantize_pipeline(pipe, cell.scheme, seed=seed)
    if cell.before == "rounding":
        learn_rounding(pipe, reference, RoundingConfig(seed=seed))
    elif cell.before == "timesteps":
        maintain_temporal(pipe, reference, TemporalConfig(**BY_TIMESTEP, seed=seed))
    (stage,) = RECIPES["msfp"]
    own = {"train_steps": updates, "preview_every": 0, "seed": seed}
    started = time.perf_counter()
    cold = nullcontext() if cell.warm else mock.patch.object(TimestepRouter, "warm_start")
    with by_the_student(cell.own), cold:
        finetune(pipe, reference, FinetuneConfig(**dict(stage.settings) | own | dict(cell.settings)))
    seconds = time.perf_counter() - started
    if cell.corrected:
        correct_output(pipe, reference)
    return pipe, seconds


def main(
    cells: Annotated[str, typer.Option(help="semicolon-separated; all if left out")] = "",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0",
    updates: int = 250,
    num_samples: Annotated[int, typer.Option(help="pictures of a row")] = 256,
) -> None:
    """Quantize, fine-tune, compare, write rows."""
    reference = with_ddim(DiffusionPipeline.from_pretrained(EMBEDDED_MODEL, dtype=torch.float32))
    reference.set_progress_bar_config(disable=True)
    about = {"weights": fingerprint([reference.unet]), "updates": updates, "num_samples": num_samples}
    rows = read_results("recipe")["rows"] if (RESULTS / "recipe.json").exists() else []
    for seed in map(int, seeds.split(",")):
        expected = None
        for name in cells.split(";") if cells else CELLS:
            key = about | {"cell": name, "seed": seed}
            if not cells and any(is_of(key, row) for row in rows):
                continue
            pipe, seconds = made(reference, CELLS[name], updates, seed)
            draw = DRAW | {"num_samples": num_samples, "seed": 1000 + seed}
            expected = draw_pictures(reference, **draw) if expected is None else expected
            found = psnr_db(expected, draw_pictures(pipe, **draw))
            compared = compare_pipelines(reference, pipe, num_samples=64, seed=2000 + seed)
            row = key | {"seconds": round(seconds, 1), "psnr_db": digits(mean_of(found))}
            row |= {figure: float(f"{getattr(compared, figure):.5g}") for figure in ("traj_rel_l2", "eps_rel_l2")}
            routing = routing_of(pipe.unet)
            row |= {
                "bytes": pipe.unet.get_memory_footprint(),
                "intervals": None if routing is None else routing.intervals(),
                "psnr_db_by_picture": [round(p, 2) for p in found.tolist()],
            }
            keep_rows("recipe", COMMAND, [row], by=tuple(key), order=place, stays=partial(is_of, about))
            typer.echo(f"{name:32} seed {seed}  PSNR {row['psnr_db'][0]:.2f} dB  {seconds:.0f} s", err=True)


def is_of(about: Mapping, row: Mapping) -> bool:
    """Whether a row is of these weights and lengths."""
    return about.items() <= row.items()


def place(row: dict) -> tuple[int, int]:
    """Of a row in the file."""
    return list(CELLS).index(row["cell"]), row["seed"]


def digits(figure) -> list[float]:
    """Value and interval."""
    return [float(f"{end:.5g}") for end in (figure.value, figure.low, figure.high)]


if __name__ == "__main__":
    typer.run(main)

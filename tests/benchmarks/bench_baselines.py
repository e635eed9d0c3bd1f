"""Every method through one program: baselines after other papers, installed peers, and the package's own recipes.

    python tests/benchmarks/bench_baselines.py --data fashion_mnist.npz [--only "w4a4 ptq,w4a4 full"]

The embedded model, 20 DDIM steps, one seed. Baselines are a scheme and a recipe, as reconstructed, not their authors'
code. Fine-tuning stages get 200 updates of 16 samples each, temporal ones 1000; the recipe `msfp` is evaluated on the
checkpoint that the package brings (`diffusers_msfp/assets/README.md` has the command; with `--scheme w4a8` it makes the
other, for `--tuned DIR`). Rows
are written as they come, each with the commit that it was made with, so several processes may share the work with
`--only`. Fréchet distances are between features of the package's classifier, *not* FID. Writes
`model_cards/results/baselines.json`.
"""

import copy
import tempfile
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline
from filelock import FileLock
from harness import RESULTS, origin, read_results, write_results

from diffusers_msfp import quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL, TUNED_MODEL
from diffusers_msfp.evaluation import evaluate_pipelines
from diffusers_msfp.evaluation.timing.providers import provide
from diffusers_msfp.methods import METHODS
from diffusers_msfp.plugin.recipe import plan_stages
from diffusers_msfp.sampling.solvers import with_ddim

COMMAND = "python tests/benchmarks/bench_baselines.py --data fashion_mnist.npz"
SETTINGS = {"talora": {"train_steps": 200}, "temporal": {"iterations": 1000}}
MSFP = ("talora", "correction")
CORRECTED = " + correction"
"""Cells of this name end with the correction of the output."""
CELLS = {
    f"w4a4{CORRECTED}": ("w4a4", "ptq"),
    f"w4a4 msfp{CORRECTED}": ("w4a4", "msfp"),
    f"w4a8{CORRECTED}": ("w4a8", "ptq"),
    "w4a8 msfp": ("w4a8", "msfp"),
    f"w4a16{CORRECTED}": ("w4a16", "ptq"),
    f"w4g32a4{CORRECTED}": ("w4g32a4", "ptq"),
    f"w4g32a8{CORRECTED}": ("w4g32a8", "ptq"),
    f"w4g32a16{CORRECTED}": ("w4g32a16", "ptq"),
}
PURE = ("ptq", "tfmq", "rounded", "full", "split", "split-rounded", "split-full")
CELLS |= {f"w4a4-pure {recipe}": ("w4a4-pure", recipe) for recipe in PURE}
CELLS |= {
    "INT4": ("int-w4a4-pure", "ptq"),
    "INT4 split": ("int-w4a4-pure", "split"),
    "signed FP4": ("w4a4-signed-pure", "ptq"),
    "Q-Diffusion style": ("int-w4a4-pure", "q-diffusion"),
    "TFMQ-DM style": ("int-w4a4-pure", "tfmq-dm"),
    "EfficientDM style": ("int-w4a4-pure", "efficientdm"),
    "INT W4A8": ("int-w4a8", "ptq"),
    "Q-Diffusion style W4A8": ("int-w4a8", "q-diffusion"),
    "w4a8-wide ptq": ("w4a8-wide", "ptq"),
    "w4a8-wide tfmq": ("w4a8-wide", "tfmq"),
    "w4a8-wide rounded": ("w4a8-wide", "rounded"),
    "w4a8-wide full": ("w4a8-wide", "full"),
    "INT W6A6": ("int-w6a6-pure", "ptq"),
    "w6a6-pure ptq": ("w6a6-pure", "ptq"),
    "w6a6-pure full": ("w6a6-pure", "full"),
    "INT W8A8": ("int-w8a8", "ptq"),
    "w8a8-wide ptq": ("w8a8-wide", "ptq"),
    "SDNQ uint4 weights": ("sdnq:uint4", None),
    "SDNQ FP4 weights": ("sdnq:fp4", None),
    "SDNQ int8": ("sdnq:int8:matmul", None),
}


def made(
    reference, scheme: str, recipe: str | None, correction: bool, tuned: Path | None
) -> tuple[DiffusionPipeline, dict]:
    """A quantized pipeline, and what making it took."""
    pipe, started, stages = copy.deepcopy(reference), time.perf_counter(), {}
    if recipe == "msfp":  # the checkpoint that the package brings, or another that was made with the same command
        folder = TUNED_MODEL if scheme == "w4a4" else tuned
        if folder is None:
            raise typer.BadParameter(f"`--tuned`: where `quantize --scheme {scheme} --recipe msfp` has put its result")
        stages = dict.fromkeys(MSFP if correction else MSFP[:1])
        return DiffusionPipeline.from_pretrained(folder), {"minutes": None, "stages": stages}
    if recipe is None:
        x = torch.randn(1, *[pipe.unet.config.in_channels, 32, 32], dtype=torch.bfloat16)
        pipe.unet = provide(scheme, pipe.unet, lambda unet: unet(x, 0))
    else:
        quantize_pipeline(pipe, scheme)
        wanted = {stage: values for stage, values in SETTINGS.items() if stage in names_of(recipe)}
        for name, config in plan_stages(recipe, wanted, correction=64 if correction else 0):
            began = time.perf_counter()
            METHODS[name].run(pipe, reference, config)
            stages[name] = round(time.perf_counter() - began, 1)
    return pipe, {"minutes": round((time.perf_counter() - started) / 60, 2), "stages": stages}


def names_of(recipe: str) -> set[str]:
    """Stages of a recipe."""
    return {name for name, _ in plan_stages(recipe, {})}


def main(
    data: Annotated[str, typer.Option(help="fashion_mnist.npz, for real test images")],
    only: Annotated[str, typer.Option(help="names of cells separated by commas; all if left out")] = "",
    num_samples: Annotated[int, typer.Option(help="pictures of a cell")] = 2000,
    tuned: Annotated[Path | None, typer.Option(help="made by `quantize --scheme w4a8 --recipe msfp`")] = None,
) -> None:
    """Make, evaluate, write rows."""
    reference = with_ddim(DiffusionPipeline.from_pretrained(EMBEDDED_MODEL))
    reference.set_progress_bar_config(disable=True)
    pictures = Path(tempfile.gettempdir()) / "baseline-pictures"
    for name in only.split(",") if only else CELLS:
        scheme, recipe = CELLS[name]
        pipe, cost = made(reference, scheme, recipe, name.endswith(CORRECTED), tuned)
        result = evaluate_pipelines(reference, pipe, data=data, num_samples=num_samples, folder=pictures)
        row = {
            "cell": name,
            "scheme": scheme,
            "recipe": recipe,
            "num_samples": num_samples,
            "git": origin()["git"],
            "traj_rel_l2": result.traj_rel_l2,
            "eps_rel_l2": result.eps_rel_l2,
        }
        row |= cost | {"bytes": pipe.unet.get_memory_footprint()}
        row |= {
            f"{pair}.{figure}": [getattr(value, end) for end in ("value", "low", "high")]
            for pair, figures in result.figures.items()
            for figure, value in figures.items()
        }
        keep(rounded(row))
        typer.echo(f"{name}: eps_rel_l2 {row['eps_rel_l2']:.4f}, {cost}", err=True)


def rounded(value: object) -> object:
    """Four digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def keep(row: dict) -> None:
    """Put a row into the results file, in the order of the cells."""
    with FileLock(Path(tempfile.gettempdir()) / "baselines.lock"):
        rows = read_results("baselines")["rows"] if (RESULTS / "baselines.json").exists() else []
        rows = [each for each in rows if each["cell"] != row["cell"]] + [row]
        write_results("baselines", COMMAND, sorted(rows, key=lambda each: list(CELLS).index(each["cell"])))


if __name__ == "__main__":
    typer.run(main)

"""Every method through one program: baselines after other papers, installed peers, and the package's own recipes.

    python tests/benchmarks/bench_baselines.py --data fashion_mnist.npz [--only "w4a4 ptq,w4a4 full"] [--hours H]
    python tests/benchmarks/bench_baselines.py --model model_cards/cifar10-pixel --data cifar10_jpeg60k.npz

The embedded model or another pipeline's folder, 20 DDIM steps, one seed; of conditional models the rows of
`CONDITIONAL` alone. Rows that are there for these weights are not made again, so that a run that was stopped, as
`--hours` stops it between two rows, goes on; `--only` makes its rows anew. Pictures are kept for each commit. Baselines
are a scheme and a recipe, as reconstructed, not their authors' code; layers that that code leaves float stay float
here, and their output is corrected as ours is. Fine-tuning stages get 200 updates of 16 samples each, EfficientDM's and
those of the recipe `msfp` 1100, temporal ones 1000; where the package brings a checkpoint of `msfp`, that is evaluated
(`diffusers_msfp/assets/README.md` has the commands). Rows are written as they come, each with the commit that it was
made with, so several processes may share the work with `--only`. `bytes` are of the tensors as they ran,
`bytes_float16` with two bytes for weights, biases and what else is as in the float model. Fréchet distances are between
features of a classifier, *not* FID. Writes `model_cards/results/baselines.json`.
"""

import copy
import tempfile
import time
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated
from unittest import mock

import nncf_unet
import torch
import typer
from diffusers import DiffusionPipeline
from harness import CODE, keep_rows, of_this_code, read_results
from real_models import asked_of, real_pictures
from torch import nn

from diffusers_msfp import MSFPConfig, quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL, TUNED_MODELS
from diffusers_msfp.calibration import search
from diffusers_msfp.checkpoint.digest import fingerprint
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.evaluation import evaluate_pipelines
from diffusers_msfp.evaluation.timing.peers import require_packages
from diffusers_msfp.evaluation.timing.providers import provide
from diffusers_msfp.methods import METHODS
from diffusers_msfp.plugin.recipe import plan_stages
from diffusers_msfp.recipes import RECIPES
from diffusers_msfp.sampling.denoisers import denoiser_name, denoiser_of, labels_of
from diffusers_msfp.sampling.solvers import with_ddim
from diffusers_msfp.schemes import matches

COMMAND = "python tests/benchmarks/bench_baselines.py --data fashion_mnist.npz"
MSFP = ("talora", "correction")
CORRECTED = " + correction"
"""Cells of this name end with the correction of the output."""
FLOAT = ("conv_shortcut", "downsamplers")
"""What the code of TFMQ-DM (shortcuts, downsamplers) and EfficientDM (`skip`, `op`) leaves float."""


@dataclass(frozen=True)
class Cell:
    """One way to a quantized pipeline.

    Args:
        scheme (`str`): or an installed peer's name.
        recipe (`str`, *optional*): None for peers.
        keep (`tuple[str, ...]`): layers that stay float, where a model has such.
        zero_points (`bool`): inputs have 16 levels with a zero point wherever they may, not only where values are
            skewed.
        updates (`int`): of fine-tuning.
    """

    scheme: str
    recipe: str | None = "ptq"
    keep: tuple[str, ...] = ()
    zero_points: bool = False
    updates: int = 200


CELLS = {
    f"w4a4{CORRECTED}": Cell("w4a4"),
    f"w4a4 rounded{CORRECTED}": Cell("w4a4", "rounded"),
    f"w4a4 msfp{CORRECTED}": Cell("w4a4", "msfp", updates=1100),
    f"w4a8{CORRECTED}": Cell("w4a8"),
    "w4a8 msfp": Cell("w4a8", "msfp", updates=1100),
    f"w4a16{CORRECTED}": Cell("w4a16"),
    f"w4g32a4{CORRECTED}": Cell("w4g32a4"),
    f"w4g32a4 msfp{CORRECTED}": Cell("w4g32a4", "msfp", updates=1100),
    f"w4g32a8{CORRECTED}": Cell("w4g32a8"),
    f"w4g32a16{CORRECTED}": Cell("w4g32a16"),
    f"w4g32a16 rounded{CORRECTED}": Cell("w4g32a16", "rounded"),
    "w4g32a16 msfp": Cell("w4g32a16", "msfp", updates=1100),
}
PURE = ("ptq", "tfmq", "rounded", "full", "split", "split-rounded", "split-full")
CELLS |= {f"w4a4-pure {recipe}": Cell("w4a4-pure", recipe) for recipe in PURE}
CELLS |= {
    f"INT4{CORRECTED}": Cell("int-w4a4-pure"),
    f"INT4 asymmetric{CORRECTED}": Cell("int-w4a4-pure", zero_points=True),
    "INT4 split": Cell("int-w4a4-pure", "split"),
    f"signed FP4{CORRECTED}": Cell("w4a4-signed-pure"),
    f"Q-Diffusion style{CORRECTED}": Cell("int-w4a4-pure", "q-diffusion"),
    f"TFMQ-DM style{CORRECTED}": Cell("int-w4a4-pure", "tfmq-dm", FLOAT),
    f"EfficientDM style{CORRECTED}": Cell("int-w4a4-pure", "efficientdm", FLOAT, updates=1100),
    "INT W4A8": Cell("int-w4a8"),
    f"Q-Diffusion style W4A8{CORRECTED}": Cell("int-w4a8", "q-diffusion"),
    "w4a8-wide ptq": Cell("w4a8-wide"),
    "w4a8-wide tfmq": Cell("w4a8-wide", "tfmq"),
    "w4a8-wide rounded": Cell("w4a8-wide", "rounded"),
    "w4a8-wide full": Cell("w4a8-wide", "full"),
    "INT W6A6": Cell("int-w6a6-pure"),
    "w6a6-pure ptq": Cell("w6a6-pure"),
    "w6a6-pure full": Cell("w6a6-pure", "full"),
    "INT W8A8": Cell("int-w8a8"),
    "w8a8-wide ptq": Cell("w8a8-wide"),
    "SDNQ uint4 weights": Cell("sdnq:uint4", None),
    "SDNQ FP4 weights": Cell("sdnq:fp4", None),
    "SDNQ int8": Cell("sdnq:int8:matmul", None),
    "NNCF int8": Cell("nncf:int8", None),
    "NNCF int8 (time embedding float)": Cell("nncf:int8", None, ("time",)),
    "torchao int8": Cell("torchao", None),
}
CONDITIONAL = (
    f"w4a4{CORRECTED}",
    f"w4a4 rounded{CORRECTED}",
    f"w4a4 msfp{CORRECTED}",
    f"w4a8{CORRECTED}",
    f"EfficientDM style{CORRECTED}",
    "SDNQ uint4 weights",
)
"""Cells of models with classes or prompts."""


def brought(model: Path, cell: Cell) -> Path | None:
    """The checkpoint that the package brings of a model's cell, if it does."""
    return (
        TUNED_MODELS.get(cell.scheme) if cell.recipe == "msfp" and model.resolve() == EMBEDDED_MODEL.resolve() else None
    )


def identity(about: dict, folder: Path | None) -> dict:
    """What a row must say to be of this model, and of the checkpoint that the package brings, if it is of one."""
    if folder is None:
        return about
    return about | {"checkpoint": fingerprint([denoiser_of(DiffusionPipeline.from_pretrained(folder))])}


def made(reference, cell: Cell, correction: bool, tuned: Path | None, asked: dict) -> tuple[DiffusionPipeline, dict]:
    """A quantized pipeline, or one that is fine-tuned already, and what making it took."""
    pipe, started, stages = copy.deepcopy(reference), time.perf_counter(), {}
    if tuned is not None:
        stages = dict.fromkeys(MSFP if correction else MSFP[:1])
        return DiffusionPipeline.from_pretrained(tuned), {"float": [], "minutes": None, "stages": stages}
    name, keep = denoiser_name(pipe), kept_float(denoiser_of(pipe), cell)
    if cell.scheme == "nncf:int8":
        require_packages(cell.scheme, "nncf", "openvino")
        setattr(pipe, name, nncf_unet.quantized(pipe, keep))
    elif cell.recipe is None:
        setattr(pipe, name, provide(cell.scheme, denoiser_of(pipe), lambda _model: None))  # peers need no ranges
        pipe.to(torch.bfloat16)  # what reads and decodes, too: peers are used so
    else:
        with mock.patch.object(search, "is_skewed", return_value=True) if cell.zero_points else nullcontext():
            quantize_pipeline(pipe, MSFPConfig(cell.scheme, modules_to_not_convert=keep), **asked)
        for stage, config in plan_stages(cell.recipe, settings_for(cell), correction=64 if correction else 0):
            began = time.perf_counter()
            METHODS[stage].run(pipe, reference, config, **asked)
            stages[stage] = round(time.perf_counter() - began, 1)
    return pipe, {"float": list(keep), "minutes": round((time.perf_counter() - started) / 60, 2), "stages": stages}


def kept_float(model: nn.Module, cell: Cell) -> tuple[str, ...]:
    """A cell's patterns that fit something in a model: a transformer has no shortcuts."""
    names = [name for name, _ in model.named_modules() if name]
    return tuple(pattern for pattern in cell.keep if any(matches(pattern, name) for name in names))


def bytes_float16(model: nn.Module, reference: nn.Module) -> int:
    """Of a model's tensors: floats of a kind that the float model has, too, take two bytes, others what they take."""
    kinds = {kind_of(name) for name, _ in (*reference.named_parameters(), *reference.named_buffers())}
    return sum(
        tensor.numel() * (2 if kind_of(name) in kinds and tensor.is_floating_point() else tensor.element_size())
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    )


def kind_of(name: str) -> str:
    """Of a tensor, like `bias`."""
    return name.rpartition(".")[2]


def settings_for(cell: Cell) -> dict[str, dict]:
    """Equal lengths of stages, where a recipe does not set its own."""
    lengths = {"talora": {"train_steps": cell.updates}, "temporal": {"iterations": 1000}}
    stages = {stage.name: stage.settings for stage in RECIPES[cell.recipe]}
    return {name: own for name, own in lengths.items() if name in stages and not own.keys() & stages[name].keys()}


def main(
    data: Annotated[Path, typer.Option(help="fashion_mnist.npz or cifar10_jpeg60k.npz, for real test images")],
    only: Annotated[str, typer.Option(help="names of cells separated by commas; what is missing if left out")] = "",
    num_samples: Annotated[int, typer.Option(help="pictures of a cell")] = 2000,
    model: Annotated[Path, typer.Option(help="a float pipeline")] = EMBEDDED_MODEL,
    hours: Annotated[float | None, typer.Option(help="begin no cell later than that")] = None,
    work: Annotated[Path | None, typer.Option(help="keeps pictures, so that a cell that was killed goes on")] = None,
) -> None:
    """Make, evaluate, write rows."""
    started = time.monotonic()
    reference = with_ddim(DiffusionPipeline.from_pretrained(model, dtype=torch.float32))
    reference.set_progress_bar_config(disable=True)
    about = {"model": model.name, "weights": fingerprint([denoiser_of(reference)]), "num_samples": num_samples}
    asked = asked_of(model, reference)
    work = work or Path(tempfile.gettempdir()) / "baseline-pictures"
    pictures, real = of_this_code(work), real_pictures(data, work)

    def stays(row: dict) -> bool:
        return row["cell"] in CELLS and (row["model"] != model.name or about.items() <= row.items())

    everything = CONDITIONAL if asked or labels_of(reference) else CELLS
    for name in only.split(",") if only else missing(about, model, everything):
        cell, tuned = CELLS[name], brought(model, CELLS[name])
        if hours is not None and time.monotonic() - started > 3600 * hours:
            typer.echo(f"{name}: not begun, {hours:g} hours are over")
            return
        try:
            pipe, cost = made(reference, cell, name.endswith(CORRECTED), tuned, asked)
        except UnsupportedError as error:
            if cell.recipe is not None:
                raise
            typer.echo(f"{name}: left out. {error}")
            continue
        result = evaluate_pipelines(reference, pipe, data=real, num_samples=num_samples, folder=pictures, **asked)
        row = identity(about, tuned) | {
            "cell": name,
            "scheme": cell.scheme,
            "recipe": cell.recipe,
            "git": CODE["git"],
            "traj_rel_l2": result.traj_rel_l2,
            "eps_rel_l2": result.eps_rel_l2,
        }
        own = denoiser_of(pipe)
        size = own.get_memory_footprint()  # peers have 16 bits for what is float
        row |= cost | {"bytes": size}
        row["bytes_float16"] = size if cell.recipe is None else bytes_float16(own, denoiser_of(reference))
        row |= {
            f"{pair}.{figure}": [getattr(value, end) for end in ("value", "low", "high")]
            for pair, figures in result.figures.items()
            for figure, value in figures.items()
        }
        keep_rows("baselines", COMMAND, [rounded(row)], by=("model", "cell"), order=place, stays=stays)
        typer.echo(f"{name}: eps_rel_l2 {row['eps_rel_l2']:.4f}, {cost}", err=True)


def missing(about: dict, model: Path, cells: Iterable[str]) -> list[str]:
    """Those of some cells without a row of these weights."""
    rows = read_results("baselines")["rows"]
    wanted = {name: identity(about, brought(model, CELLS[name])) | {"cell": name} for name in cells}
    return [name for name, own in wanted.items() if not any(own.items() <= row.items() for row in rows)]


def rounded(value: object) -> object:
    """Four digits."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def place(row: dict) -> tuple:
    """Of a row in the file: the embedded model comes first."""
    return row["model"] != EMBEDDED_MODEL.name, row["model"], list(CELLS).index(row["cell"])


if __name__ == "__main__":
    typer.run(main)

"""A plan against uniform schemes and a choice by weight error, at equal bytes; a target for PSNR on fresh noise.

    python tests/benchmarks/bench_budget.py [--part sizes,steps,psnr,sums] [--num-samples 256] [--work DIR]

On the embedded model, or another's folder, with ranges observed once for all choices, so that rows differ in the choice
alone. `sizes` are those of the uniform schemes and the means of neighbours; intervals are of the paired difference over
pictures. `steps` takes plans for the time of each uniform scheme's step, which needs a machine that nothing else uses;
what was chosen is timed in turns with the scheme. `sums` says how well errors of single layers add up to the model's,
measured with all others float and with all others at 8 bits, on fewer calls. `--work` keeps what was measured, and a
later run of the same commit goes on with it. Writes `model_cards/results/budget.json`, each row when it is finished.
"""

import copy
import random
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from math import sqrt
from pathlib import Path
from statistics import median
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline
from harness import keep_rows, of_this_code
from real_models import asked_of
from steps import timed_on
from torch import Tensor

from diffusers_msfp import MSFPConfig, quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.budget.palette import CHOICES, STEP_CHOICES, Palette, make_palette, scheme_for
from diffusers_msfp.budget.plan import for_psnr
from diffusers_msfp.budget.psnr import psnr_of
from diffusers_msfp.budget.runs import Pictures, quantized, step_seconds
from diffusers_msfp.budget.sensitivity import Samples, measure, replaced
from diffusers_msfp.budget.size import layer_bytes
from diffusers_msfp.budget.table import Table
from diffusers_msfp.checkpoint.digest import fingerprint
from diffusers_msfp.evaluation.compare import psnr_db
from diffusers_msfp.evaluation.images.distances import mean_of
from diffusers_msfp.evaluation.images.samples import draw_pictures
from diffusers_msfp.sampling.denoisers import denoiser_of
from diffusers_msfp.sampling.solvers import with_sampler
from diffusers_msfp.schemes import resolve

COMMAND = "python tests/benchmarks/bench_budget.py"
STEPS = 20
FRESH = 4321  # seed of the noise that no plan has seen
PLANNING = 64  # pictures of a run in which a plan is looked for, as by default
TARGETS_DB = (30.0, 27.0)
ROUNDS = 15  # of steps in turns


def float_pipe(folder: Path) -> DiffusionPipeline:
    """A model on DDIM."""
    pipe = DiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return with_sampler(pipe)


def rounded(value: float) -> float:
    """To five digits."""
    return float(f"{value:.5g}")


def scheme_choice(palette: Palette, scheme: str) -> dict[str, str]:
    """What a uniform scheme gives each layer: 8 bits at the edges, as every scheme does."""
    own = resolve("inner", scheme, {})
    return {name: scheme_for(name, scheme if resolve(name, scheme, {}) is own else "w8a8") for name in palette.layers}


def by_weight_error(palette: Palette, table: Table, *, relative: bool) -> Table:
    """The same sizes with the error of weights instead of the output's."""
    errors = {
        name: {
            scheme: layer.weight_error.item() * (1.0 if relative else layer.dequantize_weight().square().sum().item())
            for scheme, layer in options.items()
        }
        for name, options in palette.layers.items()
    }
    return replace(table, errors=errors)


def sizes(
    pipe: DiffusionPipeline, palette: Palette, table: Table, draw: dict, only: str, write: Callable[[dict], None]
) -> None:
    """Rows at the sizes of uniform schemes and between them."""
    uniform = {scheme: scheme_choice(palette, scheme) for scheme in CHOICES}
    limits = {scheme: table.sums(choice)[0] for scheme, choice in uniform.items()}
    halves = {
        f"{a} + {b}": (limits[a] + limits[b]) // 2
        for a, b in zip(CHOICES, CHOICES[1:], strict=False)
        if limits[b] > 1.1 * limits[a]
    }
    tables = {
        "plan": table,
        "relative weight error": by_weight_error(palette, table, relative=True),
        "absolute weight error": by_weight_error(palette, table, relative=False),
    }
    expected = draw_pictures(pipe, **draw)
    for size, limit in sorted((limits | halves).items(), key=lambda item: item[1]):
        if only and size != only:
            continue
        chosen = {kind: own.choice(own.least_error("bytes", limit).options) for kind, own in tables.items()}
        chosen |= {size: uniform[size]} if size in uniform else {}
        found = {}
        for kind, choice in chosen.items():
            found[kind] = (
                found["plan"] if found and choice == chosen["plan"] else sampled(pipe, palette, choice, expected, draw)
            )
            size_of, error, _ = table.sums(choice)
            write(
                {"part": "sizes", "size": size, "limit_bytes": limit, "choice": kind, "bytes": size_of}
                | {"predicted_traj_rel_l2": rounded(sqrt(error)), "num_samples": draw["num_samples"]}
                | compared(found["plan"], found[kind], kind)
                | {"schemes": dict(sorted(Counter(choice.values()).items()))}
            )


def sampled(pipe: DiffusionPipeline, palette: Palette, choice: dict[str, str], expected: Tensor, draw: dict) -> Tensor:
    """PSNR of each picture."""
    with quantized(denoiser_of(pipe), palette, choice):
        return psnr_db(expected, draw_pictures(pipe, **draw))


def compared(planned: Tensor, found: Tensor, kind: str) -> dict:
    """A choice's PSNR, and by how much the plan is ahead, paired over pictures."""
    own, row = mean_of(found), {}
    if kind != "plan":
        gain = mean_of(planned - found)
        row = {"plan_gains_db": rounded(gain.value), "plan_gains_db_interval": [rounded(gain.low), rounded(gain.high)]}
    return {
        "image_psnr_db": rounded(own.value),
        "image_psnr_db_interval": [rounded(own.low), rounded(own.high)],
    } | row


@torch.no_grad()
def steps(
    pipe: DiffusionPipeline, samples: Samples, draw: dict, asked: dict, work: Path, write: Callable[[dict], None]
) -> None:
    """Rows of plans for the time of each uniform scheme's step."""
    palette = make_palette(pipe, STEP_CHOICES, num_samples=16, num_inference_steps=STEPS, seed=0, **asked)
    errors = measure(samples, palette, journal=work / "errors-steps.jsonl", settings={"choices": list(STEP_CHOICES)})
    model = denoiser_of(pipe)
    rest, layers = layer_bytes(model, palette)
    around, times = step_seconds(samples, palette)
    table = Table(errors, layers, rest, times, around)
    expected, call = draw_pictures(pipe, **draw), samples.steps[0]
    for scheme in STEP_CHOICES:
        uniform = scheme_choice(palette, scheme)
        limit = table.sums(uniform)[2]
        chosen = {"plan": table.choice(table.least_error("step", limit).options), scheme: uniform}
        seconds, found = {kind: [] for kind in chosen}, {}
        for _ in range(ROUNDS):
            for kind, choice in chosen.items():
                with quantized(model, palette, choice):
                    model(*call.args, **call.kwargs)
                    started = time.perf_counter()
                    model(*call.args, **call.kwargs)
                    seconds[kind].append(time.perf_counter() - started)
        for kind, choice in chosen.items():
            found[kind] = sampled(pipe, palette, choice, expected, draw)
            size_of, error, predicted = table.sums(choice)
            write(
                {"part": "steps", "size": scheme, "choice": kind, "limit_seconds": rounded(limit), "bytes": size_of}
                | {"predicted_seconds": rounded(predicted), "seconds": rounded(median(seconds[kind]))}
                | {"spread_seconds": [rounded(min(seconds[kind])), rounded(max(seconds[kind]))]}
                | {"predicted_traj_rel_l2": rounded(sqrt(error)), "num_samples": draw["num_samples"]}
                | compared(found["plan"], found[kind], kind)
                | {"schemes": dict(sorted(Counter(choice.values()).items())), "batch": len(call.output)}
                | timed_on()
            )


def psnr(
    pipe: DiffusionPipeline, palette: Palette, table: Table, draw: dict, asked: dict, write: Callable[[dict], None]
) -> None:
    """Rows of targets for PSNR: what was asked for, and what a real checkpoint gives on fresh noise."""
    expected, sampled = None, {}
    pictures = Pictures(pipe, palette, num_samples=PLANNING, num_inference_steps=STEPS, seed=2, **asked)

    def once(choice: dict[str, str]) -> float:
        key = tuple(choice.items())
        if key not in sampled:
            sampled[key] = pictures.psnr(choice)
        return sampled[key]

    for target in TARGETS_DB:
        runs: list[tuple[float, float]] = []
        choice = table.choice(for_psnr(table, target, once, runs).options)
        made = copy.deepcopy(pipe)
        config = MSFPConfig("w8a8", scheme_overrides=dict(sorted(choice.items(), key=lambda item: len(item[0]))))
        quantize_pipeline(made, config, num_samples=16, num_inference_steps=STEPS, **asked)
        expected = draw_pictures(pipe, **draw) if expected is None else expected
        own, (size, error, _) = mean_of(psnr_db(expected, draw_pictures(made, **draw))), table.sums(choice)
        write(
            {
                "part": "psnr",
                "target_psnr": target,
                "predicted_psnr_db": rounded(psnr_of(error, runs)),
                "image_psnr_db": rounded(own.value),
                "image_psnr_db_interval": [rounded(own.low), rounded(own.high)],
                "num_samples": draw["num_samples"],
                "bytes": size,
                "runs": [[rounded(error), rounded(found)] for error, found in runs],
                "pictures_of_a_run": PLANNING,
            }
        )


def sums(pipe: DiffusionPipeline, palette: Palette, asked: dict, work: Path, write: Callable[[dict], None]) -> None:
    """Rows of mixes of 4 and 8 bits: their error, and what errors of single layers say of it."""
    whole = Samples.of(pipe, num_samples=1, num_inference_steps=STEPS, seed=500, **asked)
    steps, factors = whole.steps[::2], whole.factors[::2]
    energy = sum(f * f * step.output.double().square().sum().item() for f, step in zip(factors, steps, strict=True))
    few, model = replace(whole, steps=steps, factors=factors, energy=energy), denoiser_of(pipe)
    palette = replace(
        palette,
        choices=("w4a8", "w8a8"),
        layers={
            name: {s: own[s] for s in (scheme_for(name, "w4a8"), scheme_for(name, "w8a8"))}
            for name, own in palette.layers.items()
        },
    )
    measured = {
        around: measure(few, palette, around=around, journal=work / f"sums-{around}.jsonl") for around in (None, "w8a8")
    }
    draw = random.Random(0)
    mixes = {"w8a8": 0.0, "w4a8": 1.0} | {f"mix {i}": (0.2, 0.5, 0.8)[i % 3] for i in range(10)}
    all8 = None
    for mix, share in mixes.items():
        choice = {name: scheme_for(name, "w8a8" if draw.random() >= share else "w4a8") for name in palette.layers}
        with replaced(model, {name: palette.layers[name][scheme] for name, scheme in choice.items()}):
            error = few.error(model)
        all8 = error if all8 is None else all8
        own = measured["w8a8"]
        beside = {name: own[name][s] - own[name][scheme_for(name, "w8a8")] for name, s in choice.items()}
        write(
            {
                "part": "sums",
                "mix": mix,
                "share_at_4_bits": share,
                "squared_error": rounded(error),
                "sum_others_float": rounded(sum(measured[None][name][s] for name, s in choice.items())),
                "sum_others_8_bits": rounded(all8 + sum(beside.values())),
            }
        )


KEY = ("model", "part", "size", "choice", "target_psnr", "mix")
"""Of a row."""
PARTS = ("sizes", "steps", "psnr", "sums")


def main(
    part: Annotated[str, typer.Option(help="comma-separated")] = ",".join(PARTS),
    num_samples: Annotated[int, typer.Option(help="pictures of 20 DDIM steps")] = 256,
    only: Annotated[str, typer.Option(help="of the sizes; all if left out")] = "",
    work: Annotated[Path | None, typer.Option(help="keeps what was measured")] = None,
    model: Annotated[Path, typer.Option(help="a float pipeline's folder")] = EMBEDDED_MODEL,
) -> None:
    """Measure, choose, sample, write rows."""
    parts, pipe = part.split(","), float_pipe(model)
    weights, asked = fingerprint([denoiser_of(pipe)]), asked_of(model, pipe)
    draw = {"num_samples": num_samples, "num_inference_steps": STEPS, "seed": FRESH, "sampler": "own"} | asked

    def write(row: dict) -> None:
        row = {"model": model.name, "weights": weights} | row
        keep_rows("budget", COMMAND, [row], by=KEY, order=lambda each: (each["model"], PARTS.index(each["part"])))
        typer.echo(str({key: value for key, value in row.items() if key != "schemes"}), err=True)

    with tempfile.TemporaryDirectory() as scratch:
        work = of_this_code(work or Path(scratch))
        work.mkdir(parents=True, exist_ok=True)
        samples = Samples.of(pipe, num_samples=2, num_inference_steps=STEPS, seed=500, **asked)
        if "steps" in parts:
            steps(pipe, samples, draw, asked, work, write)
        if {"sizes", "psnr", "sums"}.isdisjoint(parts):
            return
        palette = make_palette(pipe, CHOICES, num_samples=16, num_inference_steps=STEPS, seed=0, **asked)
        if "sizes" in parts or "psnr" in parts:
            errors = measure(samples, palette, journal=work / "errors.jsonl", settings={})
            rest, layers = layer_bytes(denoiser_of(pipe), palette)
            table = Table(errors, layers, rest)
        if "sizes" in parts:
            sizes(pipe, palette, table, draw, only, write)
        if "psnr" in parts:
            psnr(pipe, palette, table, draw, asked, write)
        if "sums" in parts:
            sums(pipe, palette, asked, work, write)


if __name__ == "__main__":
    typer.run(main)

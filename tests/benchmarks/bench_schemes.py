"""Schemes on a real model, and what may follow them: error of the predicted noise and of the pictures, by seeds.

    python tests/benchmarks/bench_schemes.py [--model DIR --name NAME]

    python tests/benchmarks/bench_schemes.py --cases "w4a4,w4a4 + rounding + correction" --seeds 1

With `--cases` only these rows are made anew; rows are written as they are finished. The seed is that of calibration;
pictures are compared on other noise. `msfp` is a checkpoint that the package brings, whose training had one seed.
Writes `model_cards/results/<name>.json`.
"""

import copy
import time
from dataclasses import replace
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline
from harness import RESULTS, read_results, write_results

from diffusers_msfp import (
    MSFPConfig,
    RoundingConfig,
    TemporalConfig,
    calibrate,
    correct_output,
    learn_rounding,
    maintain_temporal,
    quantize_pipeline,
)
from diffusers_msfp.assets import EMBEDDED_MODEL, TUNED_MODELS
from diffusers_msfp.evaluation import compare_pipelines

CASES = (
    *("int-w4a4-pure", "w4a4-signed-pure", "w4a4-pure", "int-w4a4", "w4a4", "w4a4 + correction"),
    *("w4a4 + rounding", "w4a4 + rounding + correction", "w4a4 + rounding + ranges", "w4a4 + msfp"),
    *("w4a4 + timesteps + correction", "w4a4 + rounding + timesteps + correction"),
    *("w4a4 + rounding + ranges + correction", "w6a6-pure", "w6a6", "w6a6 + correction", "w4a8", "w4a8 + correction"),
    "w4a8 + msfp",
    *("w4a8-wide", "w8a8", "w8a8-wide", "w4a16", "w4a16 + correction"),
    *("w4g32a4", "w4g32a4 + correction", "w4g32a8", "w4g32a8 + correction", "w4g32a16", "w4g32a16 + correction"),
    *("w4g32a16 + rounding + correction",),
)
"""Scheme, and what follows it in this order."""
BY_TIMESTEP = TemporalConfig(fsc="all", iterations=0, cache_above=None)
STEPS = {
    "correction": lambda pipe, reference, _seed: correct_output(pipe, reference),
    "rounding": lambda pipe, reference, seed: learn_rounding(pipe, reference, RoundingConfig(seed=seed)),
    "ranges": lambda pipe, _reference, seed: calibrate(pipe, seed=seed),
    "timesteps": lambda pipe, reference, seed: maintain_temporal(pipe, reference, replace(BY_TIMESTEP, seed=seed)),
}
"""What may follow: output corrected, weights rounded by learning, input ranges searched again for these weights, and
for each timestep."""
SAMPLERS = {"20": {}, "50": {"num_inference_steps": 50}, "dpm": {"sampler": "dpmsolver++"}}
"""Suffix of a row's keys → how the pipelines are sampled; 20 DDIM steps if nothing is said."""


def made(reference: DiffusionPipeline, case: str, seed: int) -> DiffusionPipeline:
    """A case's pipeline."""
    scheme, *steps = case.split(" + ")
    if steps == ["msfp"]:
        return DiffusionPipeline.from_pretrained(TUNED_MODELS[scheme])
    pipe = copy.deepcopy(reference)
    quantize_pipeline(pipe, MSFPConfig(scheme), **({} if scheme.endswith("a16") else {"seed": seed}))
    for step in steps:
        STEPS[step](pipe, reference, seed)
    return pipe


def main(
    model: Annotated[str, typer.Option(help="float pipeline")] = str(EMBEDDED_MODEL),
    name: Annotated[str, typer.Option(help="of the results file")] = "ddpm-fashion-mnist-32",
    seeds: int = 3,
    cases: Annotated[str, typer.Option(help="comma-separated; all if left out")] = "",
    num_samples: Annotated[int, typer.Option(help="pictures of 20 DDIM steps; a quarter of the others")] = 256,
) -> None:
    """Quantize, compare with three samplers, write rows."""
    reference = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    chosen = cases.split(",") if cases else list(CASES)
    kept = read_results(name)["rows"] if cases and (RESULTS / f"{name}.json").exists() else []
    rows = [row for row in kept if row["scheme"] not in chosen]
    for case in chosen:
        for seed in range(seeds):
            started = time.perf_counter()
            pipe = made(reference, case, seed)
            row = {
                "scheme": case,
                "seed": seed,
                "num_samples": num_samples,
                "seconds": round(time.perf_counter() - started, 1),
            }
            for suffix, sampler in SAMPLERS.items():
                number = num_samples if suffix == "20" else num_samples // 4
                result = compare_pipelines(reference, pipe, num_samples=number, seed=1000 + seed, **sampler)
                found = {key: getattr(result, key) for key in ("traj_rel_l2", "eps_rel_l2", "eps_mse", "image_psnr_db")}
                found["image_psnr_db_low"], found["image_psnr_db_high"] = result.image_psnr_db_interval
                row |= {f"{key}_{suffix}": float(f"{value:.5g}") for key, value in found.items()}
                if suffix == "20":
                    errors = result.eps_rel_l2_by_timestep.items()
                    row["eps_rel_l2_by_timestep"] = {t: float(f"{value:.4g}") for t, value in errors}
            rows = sorted([*rows, row], key=lambda each: CASES.index(each["scheme"]))
            write_results(name, "python tests/benchmarks/bench_schemes.py", rows)
            typer.echo(
                f"{case:38} seed {seed}  PSNR {row['image_psnr_db_20']:.2f} dB  traj {row['traj_rel_l2_20']:.4f}  "
                f"eps {row['eps_rel_l2_20']:.4f}  50 steps {row['image_psnr_db_50']:.2f} dB",
                err=True,
            )


if __name__ == "__main__":
    typer.run(main)

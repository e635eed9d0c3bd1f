"""Every scheme on a real model: error of the predicted noise and of the pictures, three seeds each.

    python tests/benchmarks/bench_schemes.py [--model DIR --name NAME]

The seed is that of calibration and of the noise compared on. Writes `model_cards/results/<name>.json`.
"""

import copy
import time
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline
from harness import write_results

from diffusers_msfp import SCHEMES, quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.evaluation import compare_pipelines

FIGURES = ("eps_mse", "eps_rel_l2", "image_psnr_db")


def main(
    model: Annotated[str, typer.Option(help="float pipeline")] = str(EMBEDDED_MODEL),
    name: Annotated[str, typer.Option(help="of the results file")] = "ddpm-fashion-mnist-32",
    seeds: int = 3,
) -> None:
    """Quantize, compare on 20 and on 50 DDIM steps, write rows."""
    reference = DiffusionPipeline.from_pretrained(model, torch_dtype=torch.float32)
    rows = []
    for scheme in SCHEMES:
        for seed in range(seeds):
            pipe = copy.deepcopy(reference)
            started = time.perf_counter()
            quantize_pipeline(pipe, scheme, **({} if scheme.endswith("a16") else {"seed": seed}))
            row = {"scheme": scheme, "seed": seed, "seconds": round(time.perf_counter() - started, 1)}
            for steps in (20, 50):
                result = compare_pipelines(reference, pipe, num_inference_steps=steps, seed=seed)
                row |= {f"{figure}_{steps}": float(f"{result[figure]:.5g}") for figure in FIGURES}
                if steps == 20:
                    errors = result["eps_rel_l2_by_timestep"].items()
                    row["eps_rel_l2_by_timestep"] = {t: float(f"{value:.4g}") for t, value in errors}
            rows.append(row)
            typer.echo(
                f"{scheme:12} seed {seed}  eps_rel_l2 {row['eps_rel_l2_20']:.4f}  "
                f"psnr@50 {row['image_psnr_db_50']:.1f} dB",
                err=True,
            )
    write_results(name, "python tests/benchmarks/bench_schemes.py", rows)


if __name__ == "__main__":
    typer.run(main)

"""Every scheme on a real model: error of the predicted noise and of the pictures, three seeds each.

    python tests/benchmarks/bench_schemes.py [--model DIR --name NAME]

    python tests/benchmarks/bench_schemes.py --cases "w4a4,w6a6"

With `--cases` only these rows are made anew. The seed is that of calibration and of the noise compared on. Writes
`model_cards/results/<name>.json`.
"""

import copy
import time
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline
from harness import RESULTS, read_results, write_results

from diffusers_msfp import SCHEMES, MSFPConfig, quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.evaluation import compare_pipelines

FIGURES = ("eps_mse", "eps_rel_l2", "image_psnr_db")

# The inputs of these layers are sums of residuals that no norm has scaled; the papers leave them float.
CASES = {name: MSFPConfig(scheme=name) for name in SCHEMES} | {
    f"{scheme} + residuals {other}": MSFPConfig(
        scheme=scheme, scheme_overrides={"conv_shortcut": other, "samplers": other}
    )
    for scheme, other in (("w4a4", "w4a8"), ("w6a6", "w8a8"))
}


def main(
    model: Annotated[str, typer.Option(help="float pipeline")] = str(EMBEDDED_MODEL),
    name: Annotated[str, typer.Option(help="of the results file")] = "ddpm-fashion-mnist-32",
    seeds: int = 3,
    cases: Annotated[str, typer.Option(help="comma-separated; all if left out")] = "",
) -> None:
    """Quantize, compare on 20 and on 50 DDIM steps, write rows."""
    reference = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    chosen = cases.split(",") if cases else list(CASES)
    kept = read_results(name)["rows"] if cases and (RESULTS / f"{name}.json").exists() else []
    rows = [row for row in kept if row["scheme"] not in chosen]
    for scheme in chosen:
        for seed in range(seeds):
            pipe = copy.deepcopy(reference)
            started = time.perf_counter()
            pipe.set_progress_bar_config(disable=True)
            quantize_pipeline(pipe, CASES[scheme], **({} if scheme.endswith("a16") else {"seed": seed}))
            row = {"scheme": scheme, "seed": seed, "seconds": round(time.perf_counter() - started, 1)}
            for steps in (20, 50):
                result = compare_pipelines(reference, pipe, num_inference_steps=steps, seed=seed)
                row |= {f"{figure}_{steps}": float(f"{getattr(result, figure):.5g}") for figure in FIGURES}
                if steps == 20:
                    errors = result.eps_rel_l2_by_timestep.items()
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

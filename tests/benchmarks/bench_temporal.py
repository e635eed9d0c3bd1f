"""Temporal feature maintenance by stage, on the embedded model: features, predicted noise, bytes, seconds.

    python tests/benchmarks/bench_temporal.py [--schemes w4a8,w4a4]

Every stage starts from the same quantized pipeline. `+ cache` and `FSC on all layers` leave reconstruction out: at the
timesteps of the set stored features are what they are. Rows are written as they come. Writes
`model_cards/results/temporal.json`.
"""

import copy
import time
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline
from harness import write_results

from diffusers_msfp import TemporalConfig, maintain_temporal, quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.methods.temporal.features import temporal_features
from diffusers_msfp.sampling.solvers import with_ddim

COMMAND = "python tests/benchmarks/bench_temporal.py"
STAGES = {
    "PTQ": None,
    "+ FSC": {"iterations": 0, "cache_above": None},
    "+ FSC + TIAR": {"cache_above": None},
    "+ FSC + TIAR, selected": {},
    "+ FSC + cache": {"iterations": 0, "cache_above": 0.0},
    "FSC on all layers + cache": {"iterations": 0, "cache_above": 0.0, "fsc": "all"},
}


def main(schemes: Annotated[str, typer.Option(help="comma-separated")] = "w4a8,w4a4") -> None:
    """Quantize once for each scheme, maintain, compare, write rows."""
    teacher = with_ddim(DiffusionPipeline.from_pretrained(EMBEDDED_MODEL))
    teacher.set_progress_bar_config(disable=True)
    rows = []
    for scheme in schemes.split(","):
        quantized = copy.deepcopy(teacher)
        quantize_pipeline(quantized, scheme)
        for stage, settings in STAGES.items():
            pipe, row = copy.deepcopy(quantized), {"scheme": scheme, "stage": stage}
            if settings is not None:
                started = time.perf_counter()
                made = maintain_temporal(pipe, teacher, TemporalConfig(**settings))
                row["seconds"] = round(time.perf_counter() - started, 1)
                row |= {key: getattr(made, key) for key in ("sets_bytes", "cache_bytes")} | {"cached": len(made.cached)}
            for steps in (20, 50):
                errors = temporal_features(teacher, pipe, num_inference_steps=steps)
                table = torch.tensor([list(by_timestep.values()) for by_timestep in errors.values()])
                row |= {f"features_max_{steps}": figure(table.max()), f"features_mean_{steps}": figure(table.mean())}
                row[f"features_max_by_layer_{steps}"] = {n: figure(max(e.values())) for n, e in errors.items()}
            compared = compare_pipelines(teacher, pipe, seed=1000)
            row |= {key: figure(getattr(compared, key)) for key in ("eps_rel_l2", "image_psnr_db")}
            row["bytes"] = pipe.unet.get_memory_footprint()
            rows.append(row)
            write_results("temporal", COMMAND, rows)
            typer.echo({key: value for key, value in row.items() if not isinstance(value, dict)}, err=True)


def figure(value: torch.Tensor | float) -> float:
    """Four digits."""
    return float(f"{float(value):.4g}")


if __name__ == "__main__":
    typer.run(main)

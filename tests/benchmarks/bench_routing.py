"""What routing costs a step: the quantized model without adapters, with merged ones, with adapters beside the weights.

    python tests/benchmarks/bench_routing.py

Variants take turns in one process, and every call has another adapter than the one before. Medians and the ratio to the
model without adapters; also what a switch of the adapter itself takes. Writes `model_cards/results/routing.json`.
"""

import copy
import time
from statistics import median, quantiles

import torch
import typer
from diffusers import DiffusionPipeline, UNet2DModel
from harness import write_results

from diffusers_msfp import MSFPConfig, freeze
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.evaluation.shapes import ddpm_cifar10
from diffusers_msfp.integration.in_memory import quantize_model
from diffusers_msfp.workflow.student import Student

TIMESTEPS = (100, 900)
SIDE_RANK = 7  # about the bytes of two merged banks on the package's model


def embedded() -> UNet2DModel:
    """The package's model."""
    return DiffusionPipeline.from_pretrained(EMBEDDED_MODEL).unet


def variants(build) -> dict[str, UNet2DModel]:
    """The same quantized model without and with untrained adapters."""
    torch.manual_seed(0)
    teacher = build().eval()
    base = copy.deepcopy(teacher)
    quantize_model(base, MSFPConfig(scheme="w4a4"))
    with torch.no_grad():
        base(torch.randn(1, base.config.in_channels, 32, 32), 500)
    freeze(base)
    made = {"without": base}
    for placement, rank in (("merged", 32), ("side", SIDE_RANK)):
        settings = {"num_timesteps": 1000, "num_adapters": 2, "rank": rank, "placement": placement}
        student = Student(copy.deepcopy(base), teacher, **settings)
        student.watch_timesteps([0.0, 999.0])
        made[placement] = student.finish()
        made[placement].timestep_router.table[:, 500:] = 1
        made[placement].timestep_router.table[:, :500] = 0
    return made


@torch.no_grad()
def main(rounds: int = 60, batch: int = 8) -> None:
    """Time, print, write."""
    rows = []
    for shape, build in {"embedded": embedded, "ddpm-cifar10": ddpm_cifar10}.items():
        models = variants(build)
        x = torch.randn(batch, models["without"].config.in_channels, 32, 32)
        seconds = {name: [] for name in models}
        for index in range(rounds + 2):
            for name in sorted(models, key=lambda name: (len(name) * index) % 7):  # no variant always goes first
                started = time.perf_counter()
                models[name](x, TIMESTEPS[index % 2])
                seconds[name].append(time.perf_counter() - started)
        router = models["merged"].timestep_router
        started = time.perf_counter()
        for index in range(1000):
            router.enter(TIMESTEPS[index % 2])
        switch = (time.perf_counter() - started) / 1000
        for name, values in seconds.items():
            pairs = [a / b for a, b in zip(values[2:], seconds["without"][2:], strict=True)]
            low, _, high = quantiles(pairs, n=4)
            row = {"shape": shape, "batch": batch, "adapters": name, "seconds": round(median(values[2:]), 4)}
            row |= {"ratio": round(median(pairs), 3), "ratio_quartiles": [round(low, 3), round(high, 3)]}
            row |= {"switch_microseconds": round(switch * 1e6, 1) if name != "without" else 0.0}
            row |= {"bytes": models[name].get_memory_footprint()}
            rows.append(row)
            typer.echo(row, err=True)
    write_results("routing", "python tests/benchmarks/bench_routing.py", rows)


if __name__ == "__main__":
    typer.run(main)

"""What adapters cost a step: the quantized model without, with merged ones, with some beside the weights, with a LoRA.

    python tests/benchmarks/bench_routing.py [--shapes embedded,ddpm-cifar10]

Beside the weights there are both kinds, those that read floats and those that read codes. Variants take turns in one
process, and every call has another adapter than the one before. Medians and the ratio to the model without adapters;
for a user's plain LoRA the ratio to bf16, channels last, with the same LoRA. Also what a switch of the adapter itself
takes. Writes `model_cards/results/routing.json`; rows of other shapes stay.
"""

import copy
import time
from statistics import median, quantiles

import torch
import typer
from diffusers import DiffusionPipeline, UNet2DModel
from harness import read_results, write_results
from peft import LoraConfig, inject_adapter_in_model

from diffusers_msfp import MSFPConfig, freeze
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.evaluation.timing.shapes import ddpm_cifar10
from diffusers_msfp.methods.talora.student import Student
from diffusers_msfp.plugin.quantize import quantize_model

TIMESTEPS = (100, 900)
SIDE_RANK = 7  # about the bytes of two merged banks on the package's model
KINDS = {
    "merged": (32, "merged", None),
    "side, codes": (SIDE_RANK, "side", "codes"),
    "side, floats": (SIDE_RANK, "side", "float"),
}
LORA = {"r": 8, "target_modules": ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]}
BASELINES = {"lora": "bf16 with lora"}  # the others': without


def embedded() -> UNet2DModel:
    """The package's model."""
    return DiffusionPipeline.from_pretrained(EMBEDDED_MODEL).unet


SHAPES = {"embedded": embedded, "ddpm-cifar10": ddpm_cifar10}


def quantized(teacher: UNet2DModel) -> UNet2DModel:
    """A copy in `w4a4`, calibrated on noise."""
    model = copy.deepcopy(teacher)
    quantize_model(model, MSFPConfig(scheme="w4a4"))
    with torch.no_grad():
        model(torch.randn(1, model.config.in_channels, 32, 32, dtype=teacher.dtype), 500)
    freeze(model)
    return model


def variants(build) -> dict[str, UNet2DModel]:
    """The same quantized model without and with untrained adapters; both models with a LoRA are in bfloat16."""
    torch.manual_seed(0)
    teacher = build().eval()
    base = quantized(teacher)
    made = {"without": base}
    for name, (rank, placement, reads) in KINDS.items():
        settings = {"num_timesteps": 1000, "num_adapters": 2, "rank": rank, "placement": placement, "reads": reads}
        student = Student(copy.deepcopy(base), teacher, **settings)
        student.watch_timesteps([0.0, 999.0])
        made[name] = student.finish()
        made[name].timestep_router.table[:, 500:] = 1
        made[name].timestep_router.table[:, :500] = 0
    half = copy.deepcopy(teacher).to(torch.bfloat16)
    made["lora"] = quantized(half)
    made["bf16 with lora"] = half.to(memory_format=torch.channels_last)
    for name in ("lora", "bf16 with lora"):
        inject_adapter_in_model(LoraConfig(**LORA, init_lora_weights=False), made[name])
    return made


@torch.no_grad()
def main(rounds: int = 60, batch: int = 8, shapes: str = ",".join(SHAPES)) -> None:
    """Time, print, write."""
    found = read_results("routing")["rows"]
    rows = [row for row in found if row["shape"] not in shapes.split(",")]
    for shape in shapes.split(","):
        models = variants(SHAPES[shape])
        x = torch.randn(batch, models["without"].config.in_channels, 32, 32)
        inputs = {
            name: x.to(next(p.dtype for p in m.parameters() if p.is_floating_point())) for name, m in models.items()
        }
        seconds = {name: [] for name in models}
        for index in range(rounds + 2):
            for name in sorted(models, key=lambda name: (len(name) * index) % 7):  # no variant always goes first
                started = time.perf_counter()
                models[name](inputs[name], TIMESTEPS[index % 2])
                seconds[name].append(time.perf_counter() - started)
        router = models["merged"].timestep_router
        started = time.perf_counter()
        for index in range(1000):
            router.enter(TIMESTEPS[index % 2])
        switch = (time.perf_counter() - started) / 1000
        for name, values in seconds.items():
            against = BASELINES.get(name, "without")
            pairs = [a / b for a, b in zip(values[2:], seconds[against][2:], strict=True)]
            low, _, high = quantiles(pairs, n=4)
            row = {"shape": shape, "batch": batch, "adapters": name, "seconds": round(median(values[2:]), 4)}
            row |= {
                "against": against,
                "ratio": round(median(pairs), 3),
                "ratio_quartiles": [round(low, 3), round(high, 3)],
            }
            row |= {"switch_microseconds": round(switch * 1e6, 1) if name in KINDS else 0.0}
            row |= {"bytes": models[name].get_memory_footprint()}
            rows.append(row)
            typer.echo(row, err=True)
    rows.sort(key=lambda row: list(SHAPES).index(row["shape"]))
    write_results("routing", "python tests/benchmarks/bench_routing.py", rows)


if __name__ == "__main__":
    typer.run(main)

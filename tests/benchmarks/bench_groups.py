"""Group scales as whole multipliers, and what was weighed against them: weight error, bits, time of the search.

    python tests/benchmarks/bench_groups.py

Errors are squared errors of all inner weights of the embedded model over their sum of squares. Left out of the package:
a format for each output channel; the code of -0 as a sixteenth value, which makes the uniform grid -8 … 7, with
multipliers of both signs, so that a group's largest weight may have it (`signed` with one more bit for the sign, or one
bit less for the multiplier); for comparison 16 uniform levels between a group's ends, as peers have them, with a scale
and a zero point of 16 bits each. The search is timed on random weights of the DDPM-CIFAR-10 shape. Writes
`model_cards/results/groups.json`.
"""

import time
from collections.abc import Callable
from functools import partial

import torch
import typer
from diffusers import DiffusionPipeline
from harness import write_results
from torch import Tensor
from torch.nn import functional as F

from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.calibration import search_groups, search_weight
from diffusers_msfp.calibration.groups import NUM_UNITS, UNIT_RATIOS
from diffusers_msfp.evaluation.timing.shapes import SHAPES
from diffusers_msfp.layers.convert import Conversion
from diffusers_msfp.numerics import QParams, fake_quantize
from diffusers_msfp.numerics.groups import by_weight
from diffusers_msfp.schemes import GROUP_SIZES, SCHEMES

SCHEME = "w4g32a16"
CHANNEL_BITS = 32


def squared(weight: Tensor, result) -> float:
    """Squared error of a search's result."""
    return result.error.item() * weight.square().sum().item()


def by_channel(weight: Tensor) -> float:
    """A scale for each output channel."""
    return squared(weight, search_weight(weight, SCHEMES["w4a16"].inner.weight))


def by_group(weight: Tensor, size: int) -> float:
    """As the package."""
    return squared(weight, search_groups(weight, SCHEMES[SCHEME].inner.weight, size))


def by_group_and_format(weight: Tensor, size: int) -> float:
    """With a format for each output channel."""
    errors = []
    for name in SCHEMES[SCHEME].inner.weight:
        found = search_groups(weight, [name], size)
        scale = found.qparams.scale * by_weight(found.multipliers, size, weight.shape[1])
        errors.append((fake_quantize(weight, QParams(name, scale)) - weight).square().sum(1))
    return torch.stack(errors).amin(0).sum().item()


def sixteen_values(weight: Tensor, size: int, largest: int) -> float:
    """The grid -8 … 7 with multipliers up to ± `largest`."""
    rows = grouped(weight, size)  # (C, G, size)
    best = torch.full((len(rows),), torch.inf)
    low, high = UNIT_RATIOS
    for i in range(NUM_UNITS):
        unit = weight.abs().amax(1) * low * (high / low) ** (i / (NUM_UNITS - 1)) / (8 * largest)
        steps = rows / unit.clamp_min(1e-30)[:, None, None]
        errors = [
            ((steps / m).round().clamp(-8, 7) * m - steps).square().sum(-1)
            for m in (*range(1, largest + 1), *range(-largest, 0))
        ]
        best = torch.minimum(best, torch.stack(errors).amin(0).sum(1) * unit.square())
    return best.sum().item()


def between_ends(weight: Tensor, size: int) -> float:
    """Sixteen levels from a group's smallest to its largest weight."""
    rows, inside = grouped(weight, size), grouped(torch.ones_like(weight), size) > 0
    low = rows.where(inside, torch.inf).amin(-1, keepdim=True)
    high = rows.where(inside, -torch.inf).amax(-1, keepdim=True)
    step = ((high - low) / 15).clamp_min(1e-30)
    return (((rows - low) / step).round() * step + low - rows).where(inside, 0).square().sum().item()


def grouped(weight: Tensor, size: int) -> Tensor:
    """`(C, n)` → `(C, groups, size)`, padded with zeros."""
    rows, length = weight.shape
    return F.pad(weight, (0, -length % size)).view(rows, -1, size)


def variants() -> dict[str, tuple[Callable[[Tensor], float], float, int | None]]:
    """Name → squared error of a weight, bits of a weight without its channel's scale, group size."""
    made: dict[str, tuple] = {"scale by output channel": (by_channel, 4.0, None)}
    for size in GROUP_SIZES:
        made |= {
            f"groups of {size}": (partial(by_group, size=size), 4 + 4 / size, size),
            f"groups of {size}, format by output channel": (
                partial(by_group_and_format, size=size),
                4 + 4 / size,
                size,
            ),
            f"groups of {size}, -8 … 7, ± 7": (partial(sixteen_values, size=size, largest=7), 4 + 4 / size, size),
            f"groups of {size}, -8 … 7, ± 15": (partial(sixteen_values, size=size, largest=15), 4 + 5 / size, size),
            f"groups of {size}, 16 levels between ends": (partial(between_ends, size=size), 4 + 32 / size, size),
        }
    return made


def inner_weights(model: torch.nn.Module) -> list[Tensor]:
    """Weights that the scheme groups, as matrices."""
    plan = Conversion.plan(model, SCHEME).layers
    return [model.get_parameter(f"{name}.weight").detach().flatten(1) for name in plan if plan[name].group_size]


def main() -> None:
    """Measure, write rows."""
    torch.manual_seed(0)
    weights = inner_weights(DiffusionPipeline.from_pretrained(EMBEDDED_MODEL).unet)
    energy, number = sum(w.square().sum().item() for w in weights), sum(w.numel() for w in weights)
    of_channels = CHANNEL_BITS * sum(len(w) for w in weights) / number
    rows = []
    for name, (error, bits, size) in variants().items():
        unit_bits = 0.0 if "between ends" in name else of_channels
        relative = sum(map(error, weights)) / energy
        rows.append(
            {
                "variant": name,
                "group_size": size,
                "weight_rel_mse": float(f"{relative:.4g}"),
                "bits_per_weight": round(bits + unit_bits, 3),
            }
        )
        typer.echo(rows[-1], err=True)
    shape = inner_weights(SHAPES["ddpm-cifar10"]())
    for name, search in (("w4a16", by_channel), (SCHEME, partial(by_group, size=32))):
        started, used = time.perf_counter(), time.process_time()
        for weight in shape:
            search(weight)
        rows.append(
            {
                "variant": f"search, {name}, DDPM-CIFAR-10 shape",
                "weights": sum(w.numel() for w in shape),
                "seconds": round(time.perf_counter() - started, 1),
                "processor_seconds": round(time.process_time() - used, 1),
            }
        )
        typer.echo(rows[-1], err=True)
    write_results("groups", "python tests/benchmarks/bench_groups.py", rows)


if __name__ == "__main__":
    typer.run(main)

"""The search beside what it was before and what was tried and left out: errors and pictures without any training.

    python tests/benchmarks/bench_search.py [--model DIR --name NAME] [--variants "as it is,linear ranges" --seeds 3]

Scheme `w4a4`, 20 DDIM steps; the seed is that of calibration, and pictures are compared on other noise. Variants:

- `linear ranges`: 100 ranges in equal steps from 0.012 to 1.2 of the largest value, none refined, and the extremes as
  two values of the sample: the search as it once was.
- `signed formats`: none of the candidates has a zero point; `behind SiLU`: unsigned ones only where no value lies
  below SiLU's smallest, -0.28, instead of wherever values are skewed.
- `by weight norm`: squared errors of an input channel weighted by the squared norm of its weights.
- `channel scales …`: inputs divided by a scale for each channel, which the weights are multiplied by before they are
  quantized. By root mean square, by the largest magnitude, both as powers of two, and by the root of the quotient of
  both sides' largest magnitudes (SmoothQuant, arXiv 2211.10438, equation 4 with α = 0.5).

Writes `model_cards/results/<name>-search.json`, each row when it is finished.
"""

import copy
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Annotated
from unittest import mock

import torch
import typer
from diffusers import DiffusionPipeline
from harness import keep_rows
from torch import Tensor, nn

from diffusers_msfp import quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.calibration import Observation, observe, search, search_activation
from diffusers_msfp.calibration.watch import watching_calls
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.layers import execution, quant_layer
from diffusers_msfp.sampling import residual
from diffusers_msfp.sampling.denoisers import denoiser_of

COMMAND = "python tests/benchmarks/bench_search.py"
SCHEME = "w4a4"
SILU_MIN = -0.2785
KEPT = ("conv_in", "conv_out", "time_embedding")
"""Layers that stay at 8 bits and keep their inputs as they are."""
WATCHED = {"num_inference_steps": 10, "batch_size": 4, "output_type": "np"}


@contextmanager
def linear_ranges() -> Iterator[None]:
    """The search as it once was."""

    def with_extremes(values: Tensor, formats: tuple[str, ...], bounds: tuple[float, float]) -> search.SearchResult:
        return search_activation(torch.cat([values, values.new_tensor(bounds)]), formats)

    with (
        mock.patch.object(search, "_activation_ratios", lambda device: torch.linspace(0.012, 1.2, 100, device=device)),
        mock.patch.object(search, "_refined", lambda ratios, best: ratios[best][..., None]),
        mock.patch.object(quant_layer, "search_activation", with_extremes),
    ):
        yield


def skewed_if(condition: Callable[[float, float], bool]) -> Callable:
    """Unsigned formats are tried under another condition on the smallest and largest value."""
    return lambda *_: mock.patch.object(search, "is_skewed", condition)


@contextmanager
def by_weight_norm(pipe: DiffusionPipeline) -> Iterator[None]:
    """Values are offered to a sample in proportion to the squared norm of their channel's weights, in eighths."""
    repeats = {}
    for name, layer in weighted_layers(pipe).items():
        norm = layer.weight.detach().square().sum([axis for axis in range(layer.weight.ndim) if axis != 1])
        repeats[name] = (8 * norm / norm.mean()).round().long()

    def offered(observation: Observation, x: Tensor, name: str) -> None:
        counts = repeats.get(name)
        axis = -1 if x.ndim < 4 else 1
        if counts is None or len(counts) != x.shape[axis] or not counts.any():
            observe(observation, x, name)
            return
        observe(observation, x.repeat_interleave(counts.to(x.device), dim=axis), name)
        low, high = torch.aminmax(x.detach().float())
        observation.range[0], observation.range[1] = (
            torch.minimum(observation.range[0], low),
            torch.maximum(observation.range[1], high),
        )

    with mock.patch.object(execution, "observe", offered):
        yield


class Divided(nn.Module):
    """Inputs divided by a scale for each channel.

    Args:
        scale (`Tensor`): shaped to broadcast against the input.
    """

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x / self.scale


def weighted_layers(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Layers with 4-bit inputs, by name."""
    return {
        name: module
        for name, module in denoiser_of(pipe).named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and not any(part in name for part in KEPT)
    }


@contextmanager
def channel_scales(pipe: DiffusionPipeline, rule: str, power_of_two: bool = False) -> Iterator[None]:
    """Fold a scale for each input channel into the weights of a float model, in place."""
    model, layers = denoiser_of(pipe), weighted_layers(pipe)
    seen: dict[str, Tensor] = {}

    def look(name: str, args: tuple) -> None:
        x = args[0].detach().float()
        rows = x.transpose(1, -1).flatten(0, -2) if x.ndim == 4 else x.flatten(0, -2)
        new = rows.square().mean(0) if rule == "rms" else rows.abs().amax(0)
        old = seen.get(name, torch.zeros_like(new))
        seen[name] = old + new if rule == "rms" else torch.maximum(old, new)

    with watching_calls(layers, look):
        pipe(generator=torch.Generator().manual_seed(7), **WATCHED)
    for name, found in seen.items():
        layer = layers[name]
        size = found.sqrt() if rule == "rms" else found
        if rule == "smooth":
            weight = layer.weight.detach().abs().amax([axis for axis in range(layer.weight.ndim) if axis != 1])
            size = (size.clamp_min(1e-6) / weight.clamp_min(1e-6)).sqrt()
        scale = size.clamp_min(1e-3 * size.max().clamp_min(1e-6))
        scale = scale / scale.log().mean().exp()
        if power_of_two:
            scale = scale.log2().round().exp2()
        shape = (1, -1) + (1,) * (layer.weight.ndim - 2)
        layer.weight.data.mul_(scale.view(shape))
        parent = model.get_submodule(name.rpartition(".")[0])
        divided = Divided(scale.view(shape) if layer.weight.ndim == 4 else scale)
        setattr(parent, name.rpartition(".")[2], nn.Sequential(divided, layer))
    with mock.patch.object(residual, "MOVES", residual.MOVES | {"__truediv__", "div", "true_divide"}):
        yield  # a layer that reads what another gives, divided, reads a residual stream as it would undivided


VARIANTS: dict[str, Callable] = {
    "as it is": lambda _: nullcontext(),
    "linear ranges": lambda _: linear_ranges(),
    "signed formats": skewed_if(lambda *_: False),
    "behind SiLU": skewed_if(lambda low, high: low >= SILU_MIN and -low < high),
    "by weight norm": by_weight_norm,
    "channel scales, rms": partial(channel_scales, rule="rms"),
    "channel scales, rms, powers of two": partial(channel_scales, rule="rms", power_of_two=True),
    "channel scales, max": partial(channel_scales, rule="max"),
    "channel scales, max, powers of two": partial(channel_scales, rule="max", power_of_two=True),
    "channel scales, SmoothQuant": partial(channel_scales, rule="smooth"),
}
"""Name → takes a float pipeline, which it may change, and holds while that is quantized."""


def place(row: dict) -> tuple[int, int]:
    """Of a row in the file."""
    return list(VARIANTS).index(row["variant"]), row["seed"]


def main(
    model: Annotated[str, typer.Option(help="float pipeline")] = str(EMBEDDED_MODEL),
    name: Annotated[str, typer.Option(help="of the results file")] = "ddpm-fashion-mnist-32",
    seeds: int = 1,
    variants: Annotated[str, typer.Option(help="semicolon-separated; all if left out")] = "",
    num_samples: Annotated[int, typer.Option(help="pictures of a row")] = 256,
) -> None:
    """Quantize, compare, write rows."""
    reference = DiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    reference.set_progress_bar_config(disable=True)
    chosen, file = variants.split(";") if variants else list(VARIANTS), f"{name}-search"
    for variant in chosen:
        for seed in range(seeds):
            pipe, started = copy.deepcopy(reference), time.perf_counter()
            with VARIANTS[variant](pipe):
                quantize_pipeline(pipe, SCHEME, seed=seed)
            seconds = time.perf_counter() - started
            result = compare_pipelines(reference, pipe, num_samples=num_samples, seed=1000 + seed)
            low, high = result.image_psnr_db_interval
            row = {"variant": variant, "seed": seed, "num_samples": num_samples, "seconds": round(seconds, 1)}
            found = {"image_psnr_db_low": low, "image_psnr_db_high": high}
            found |= {key: getattr(result, key) for key in ("image_psnr_db", "traj_rel_l2", "eps_rel_l2")}
            row |= {key: float(f"{value:.5g}") for key, value in found.items()}
            keep_rows(file, COMMAND, [row], by=("variant", "seed"), order=place)
            typer.echo(
                f"{variant:36} seed {seed}  PSNR {row['image_psnr_db']:.2f} dB  traj {row['traj_rel_l2']:.4f}  "
                f"eps {row['eps_rel_l2']:.4f}",
                err=True,
            )


if __name__ == "__main__":
    typer.run(main)

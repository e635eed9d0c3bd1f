"""What benchmarks of a step share, beside `harness`, which must not import the package: some time other versions."""

from collections.abc import Mapping, Sequence
from statistics import median, quantiles

import torch
from diffusers import DiffusionPipeline
from torch import nn

from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.compat.processor import instruction_sets, openmp_settings, processor
from diffusers_msfp.evaluation.timing.providers import BASELINE
from diffusers_msfp.evaluation.timing.shapes import SHAPES


def timed_on() -> dict:
    """The processor and what bounds it, of a row with times."""
    return {"processor": processor(), "instruction_sets": instruction_sets(), "openmp": openmp_settings()}


def times_of(seconds: Mapping[str, Sequence[float]]) -> dict[str, dict]:
    """Provider → median and quartiles of its turns, and the median of its ratios to the baseline's."""
    found = {}
    for provider, times in seconds.items():
        low, _, high = quantiles(times, n=4)
        ratios = [base / own for base, own in zip(seconds[BASELINE], times, strict=True)]
        found[provider] = {
            "seconds": median(times),
            "seconds_low": low,
            "seconds_high": high,
            "speedup": median(ratios),
        }
    return found


def float_model(name: str) -> nn.Module:
    """A float denoiser: of a name in `SHAPES`, with random weights, or the embedded one."""
    torch.manual_seed(0)
    return (SHAPES[name]() if name in SHAPES else DiffusionPipeline.from_pretrained(EMBEDDED_MODEL).unet).eval()


class PlainModel(nn.Module):
    """A denoiser that takes tensors in order and returns its prediction."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.model(*inputs, return_dict=False)[0]

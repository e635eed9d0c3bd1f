"""`bench`: how fast a model's step is in several ways; `warmup`: what its first one would have to wait for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..engines import kernels, tuning
from ..engines.kernels.ahead import compile_kernels
from ..evaluation.timing.shapes import SHAPES
from ..evaluation.timing.speed import Timing, benchmark
from ..results import Result
from ..sampling.observation import quantized_models
from .shared.load import load_any, require_variant
from .shared.terminal import progress, stderr

DEFAULT_PROVIDERS = ("fp32", "bf16", "w4a4", "w4a8")


@dataclass(frozen=True, kw_only=True)
class Bench(Result):
    """What `bench` timed.

    Args:
        model (`str`): as it was named.
        threads (`int`): of torch.
        rows (`list[Timing]`): the baseline first.
        measured (`Mapping[str, Mapping[str, float]]`): what was asked of this machine, now or before, to choose the
            fastest way of computing a layer, a norm or attention → way → seconds.
    """

    model: str
    threads: int
    rows: list[Timing]
    measured: Mapping[str, Mapping[str, float]]


def bench(
    model: str = "ddpm-cifar10",
    providers: list[str] | None = None,
    *,
    batch: int = 1,
    size: int | None = None,
    num_inference_steps: int = 1,
    repeats: int = 7,
    variant: str | None = None,
    skip_missing: bool = False,
) -> Bench:
    """Time one denoising step.

    Args:
        model (`str`): a name in `SHAPES`, or a folder or Hub id of a pipeline or model, float or quantized.
        providers (`list[str]`, *optional*): see `evaluation.timing.providers`.
        batch, size: of the samples.
        num_inference_steps (`int`): denoising steps that are timed as one.
        repeats (`int`): timed rounds.
        variant (`str`, *optional*): of the weights of a folder or Hub id.
        skip_missing (`bool`): leave out peers that are not installed or cannot run the model, instead of refusing.

    Raises:
        MSFPError: an unknown model or provider.
    """
    with stderr.status(f"preparing {model}"):
        loaded = _load(model, variant)
    quantized = any(True for _ in quantized_models(loaded))
    names = providers or (("msfp",) if quantized else DEFAULT_PROVIDERS)
    with progress("timing steps") as report:
        rows = benchmark(
            loaded,
            names,
            batch=batch,
            size=size,
            num_inference_steps=num_inference_steps,
            repeats=repeats,
            skip_missing=skip_missing,
            on_progress=report,
        )
    return Bench(model=model, threads=torch.get_num_threads(), rows=rows, measured=tuning.measured())


@dataclass(frozen=True, kw_only=True)
class Warmup(Result):
    """What `warmup` compiled.

    Args:
        kernels (`str`): `"numba"`, or `"torch"`, which has nothing to compile.
        seconds (`float`): of all of them.
        seconds_by_kernel (`Mapping[str, float]`): next to nothing where a kernel had been compiled before.
    """

    kernels: str
    seconds: float
    seconds_by_kernel: Mapping[str, float]


def warmup() -> Warmup:
    """Compile the CPU kernels now, for this user on this machine, so that no first picture waits for it."""
    with progress("compiling kernels") as report:
        seconds = compile_kernels(report)
    return Warmup(kernels=kernels.NAME, seconds=sum(seconds.values()), seconds_by_kernel=seconds)


def _load(model: str, variant: str | None) -> Any:
    if model in SHAPES:
        torch.manual_seed(0)
        return SHAPES[model]().eval()
    require_variant(variant, model)
    return load_any(model, variant=variant)

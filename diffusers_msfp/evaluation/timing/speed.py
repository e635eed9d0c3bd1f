"""How fast a model's step is: variants take turns in one process, so that all see the same machine."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, DiTTransformer2DModel, ModelMixin, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from ...compat.processor import instruction_limit, instruction_sets, openmp_settings, processor
from ...compat.wrappers import sees_through
from ...engines.choose import engines_of
from ...errors import UnsupportedError
from ...results import OPTIONAL, OnProgress, Result
from ...sampling.denoisers import denoiser_of
from .floor import floor_of
from .providers import BASELINE, PEERS, provide

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Timing(Result):
    """One denoising step, timed.

    Args:
        provider (`str`): what ran it, see `providers`.
        batch, size (`int`): samples; their height and width.
        num_inference_steps (`int`): denoising steps that were timed as one.
        seconds, seconds_low, seconds_high (`float`): of one step: median and quartiles.
        speedup (`float`): the baseline's time through this one's in each round, median.
        engines (`Mapping[str, int]`): layers by engine.
        processor (`str`), instruction_sets (`Sequence[str]`), openmp (`Mapping[str, str]`): where and how it was timed:
            see `compat.processor`; no OpenMP variables are its default settings.
        onednn_limit (`str`, *optional*): `ONEDNN_MAX_CPU_ISA`; only oneDNN was limited, other kernels were not.
        floor_seconds (`float`, *optional*): the least that the step could take, where that was measured.
        floor_parts (`Mapping[str, float]`, *optional*): what it consists of.
    """

    provider: str
    batch: int
    size: int
    num_inference_steps: int
    seconds: float
    seconds_low: float
    seconds_high: float
    speedup: float
    engines: Mapping[str, int]
    processor: str = field(default_factory=processor)
    instruction_sets: Sequence[str] = field(default_factory=instruction_sets)
    openmp: Mapping[str, str] = field(default_factory=openmp_settings)
    onednn_limit: str | None = field(default_factory=lambda: instruction_limit() or None, metadata=OPTIONAL)
    floor_seconds: float | None = field(default=None, metadata=OPTIONAL)
    floor_parts: Mapping[str, float] | None = field(default=None, metadata=OPTIONAL)


def example_inputs(model: ModelMixin, batch: int, size: int | None = None) -> dict[str, Tensor]:
    """Random inputs of a denoiser, float32.

    Args:
        batch (`int`): samples.
        size (`int`, *optional*): height and width of the sample; the model's own by default.

    Raises:
        UnsupportedError: an architecture whose inputs are not known here.
    """
    config, generator = model.config, torch.Generator().manual_seed(0)
    own = size or getattr(config, "sample_size", None)
    height, width = own if isinstance(own, list | tuple) and len(own) == 2 else (own, own)

    def noise(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device="cpu")

    timestep = torch.full((batch,), 500)
    plain = config.get("addition_embed_type") is None and isinstance(config.get("cross_attention_dim"), int)
    conditional = isinstance(model, UNet2DConditionModel) and plain
    if not (conditional or isinstance(model, UNet2DModel | DiTTransformer2DModel)):
        raise UnsupportedError(
            f"A benchmark needs to know a model's inputs: UNet2DModel, UNet2DConditionModel without added conditions, "
            f"or DiTTransformer2DModel; but got {type(model).__name__}."
        )
    if not (isinstance(height, int) and isinstance(width, int)):
        raise UnsupportedError(
            f"A benchmark needs a size, but the `sample_size` of this {type(model).__name__} is {own!r}. Name one: "
            f"`size`, `--size`."
        )
    if isinstance(model, UNet2DModel):
        return {"sample": noise(batch, config.in_channels, height, width), "timestep": timestep}
    if conditional:
        text = noise(batch, 77, config.cross_attention_dim)
        sample = noise(batch, config.in_channels, height, width)
        return {"sample": sample, "timestep": timestep, "encoder_hidden_states": text}
    sample = noise(batch, config.in_channels, height, width)
    labels = torch.zeros(batch, dtype=torch.int64)
    return {"hidden_states": sample, "timestep": timestep, "class_labels": labels}


def step_of(model: nn.Module, inputs: Mapping[str, Tensor], num_inference_steps: int = 1) -> Callable[[], object]:
    """Calls of a model with inputs in its dtype, images channels last; several have falling timesteps."""
    dtype = next(tensor.dtype for tensor in model.parameters() if tensor.is_floating_point())
    ready = {name: x.to(dtype) if x.is_floating_point() else x for name, x in inputs.items()}
    ready = {name: x.contiguous(memory_format=torch.channels_last) if x.ndim == 4 else x for name, x in ready.items()}

    def run() -> object:
        with torch.no_grad():
            for left in range(num_inference_steps - 1, 0, -1):
                model(**ready | {"timestep": ready["timestep"] + 499 * left // num_inference_steps})
            return model(**ready)

    return run


def take_turns(
    calls: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 2, on_progress: OnProgress | None = None
) -> dict:
    """Seconds of each call, `{name: [repeats values]}`; every round runs all of them, in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for done, (name, call) in enumerate(calls.items()):
            start = time.perf_counter()
            call()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
            if on_progress:
                on_progress(turn * len(calls) + done + 1, (warmup + repeats) * len(calls))
    return seconds


@sees_through(changes=False)
def benchmark(
    model: ModelMixin | DiffusionPipeline,
    names: Sequence[str],
    *,
    batch: int = 1,
    size: int | None = None,
    num_inference_steps: int = 1,
    repeats: int = 7,
    with_floor: bool = True,
    skip_missing: bool = False,
    on_progress: OnProgress | None = None,
) -> list[Timing]:
    """Time one step of a model in several ways.

    Args:
        model (`ModelMixin` or `DiffusionPipeline`): float32, or quantized for the provider `msfp`; of a pipeline its
            denoiser is timed.
        names (`Sequence[str]`): see `providers`; the baseline `bf16:cl` is always among them.
        batch, size: of the samples.
        num_inference_steps (`int`): denoising steps that are timed as one.
        repeats (`int`): timed rounds.
        with_floor (`bool`): also measure the least that the first provider with an int8 engine could take.
        skip_missing (`bool`): leave out peers that are not installed or fail on the model, and say so.
        on_progress (`OnProgress`, *optional*): called with (done, total) after each call.

    Returns:
        `list[Timing]`: the baseline first.
    """
    timed = cast(ModelMixin, denoiser_of(model).eval() if isinstance(model, DiffusionPipeline) else model)
    inputs = example_inputs(timed, batch, size)
    names = list(dict.fromkeys((BASELINE, *names)))
    made = {}
    for name in names:
        try:
            made[name] = provide(name, timed, lambda each: step_of(each, inputs)())
            step_of(made[name], inputs)()
        except Exception as error:  # noqa: BLE001 – a peer may fail in any way
            if not (skip_missing and name.partition(":")[0] in PEERS):
                raise
            made.pop(name, None)
            logger.warning("%s is left out: %s", name, error)
    runs = {name: step_of(each, inputs, num_inference_steps) for name, each in made.items()}
    seconds = {
        name: [t / num_inference_steps for t in times]
        for name, times in take_turns(runs, repeats, on_progress=on_progress).items()
    }
    rows = []
    for name, times in seconds.items():
        low, _, high = quantiles(times, n=4)
        ratios = [base / own for base, own in zip(seconds[BASELINE], times, strict=True)]
        engines, floor = engines_of(made[name]), None
        if with_floor and engines.get("int8") and "compile" not in name:
            floor = floor_of(made[name], step_of(made[name], inputs))
        rows.append(
            Timing(
                provider=name,
                batch=batch,
                size=size or cast(Any, timed).config.sample_size,
                num_inference_steps=num_inference_steps,
                seconds=median(times),
                seconds_low=low,
                seconds_high=high,
                speedup=median(ratios),
                engines=engines,
                floor_seconds=None if floor is None else floor.total,
                floor_parts=None if floor is None else floor.parts,
            )
        )
    return rows

"""How well each layer alone reproduces its float original: signal-to-noise ratios on the float model's trajectory.

Each layer of the candidate gets the input that the float layer of the same name has just had, so the figure is the
layer's own and holds no error of the layers before it. Layers are found by their names, so that any quantizer will do
which puts its layers in the place of the float ones.
"""

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import Tensor, nn

from ..compat.wrappers import sees_through
from ..errors import ConfigError
from ..methods.routes import enter_timestep
from ..methods.talora.attach import plan_of
from ..results import OnProgress, Result
from ..sampling.calls import batched_calls, call_arguments, quiet, require_positive, unseen
from ..sampling.solvers import with_sampler
from ..sampling.timestep import first_timestep, timestep_argument
from ..sampling.used_output import counted, used_channels
from .compare import in_place_of, paired_denoisers

MAX_SNR_DB = 100.0
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def snr_db(signal: float, noise: float) -> float:
    """Ratio of two energies in decibels, at most 100."""
    return MAX_SNR_DB if noise <= signal * 1e-10 else 10 * math.log10(signal / noise) if signal else -MAX_SNR_DB


@dataclass(frozen=True, kw_only=True)
class LayerError(Result):
    """How well one layer reproduces its float original.

    Args:
        snr_db (`float`): `10 log10(Σ‖float‖² / Σ‖Δ‖²)` over all samples and timesteps, at most 100.
        by_timestep (`Mapping[str, float]`): timestep → the same.
        adapted (`bool`): it has timestep-aware adapters, which let it differ from its float original on purpose.
    """

    snr_db: float
    by_timestep: Mapping[str, float]
    adapted: bool


@sees_through(changes=False)
def layer_snr(
    reference: DiffusionPipeline,
    candidate: DiffusionPipeline | ModelMixin,
    *,
    num_samples: int = 4,
    num_inference_steps: int = 20,
    seed: int = 0,
    sampler: str | None = None,
    prompts: list[str] | None = None,
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> dict[str, LayerError]:
    """Signal-to-noise ratio of every linear and convolution in the denoisers.

    Of the last one, channels that put out a variance are not counted.

    Args:
        reference, candidate, num_samples, num_inference_steps, seed, sampler, prompts, on_progress, **arguments: see
            `compare_pipelines`.

    Returns:
        `dict[str, LayerError]`: by the layer's name (of several denoisers: `component:layer`).

    Raises:
        ConfigError: no layer of the reference has a counterpart of its name.
    """
    require_positive(num_samples=num_samples, num_inference_steps=num_inference_steps)
    candidate, reference = in_place_of(reference, candidate), with_sampler(reference, sampler, arguments=arguments)
    originals, students = paired_denoisers(reference, candidate)
    make_arguments = call_arguments(reference, prompts, num_inference_steps, {"output_type": "pt"} | arguments)
    calls = batched_calls(make_arguments, list(students.values()), num_samples, unseen(seed))
    signal: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    noise: dict[str, dict[float, float]] = defaultdict(lambda: defaultdict(float))
    done, running = 0, math.nan
    used, trying = {}, False

    def begin(
        module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *, component: str, student: nn.Module
    ) -> None:
        nonlocal done, running, trying
        if trying:
            return
        if component not in used:
            trying = True
            used[component] = used_channels(reference, module, args, kwargs)
            trying = False
        timestep = timestep_argument(module).of(args, kwargs)
        if timestep is not None:
            enter_timestep(student, timestep)
        running, done = first_timestep(timestep), done + 1
        if on_progress is not None:
            on_progress(done, max(done, len(calls) * num_inference_steps))

    def measure(
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        output: Any,
        *,
        component: str,
        name: str,
        key: str,
        layer: nn.Module,
        dtype: torch.dtype,
    ) -> None:
        if trying:
            return
        x, *rest = (*args, *kwargs.values())
        actual = output if layer is module else layer(x.to(dtype), *rest)
        output, actual = counted(used[component], name, [output, actual])
        signal[key][running] += output.double().square().sum().item()
        noise[key][running] += _energy(actual, output)

    handles, names = [], {}
    try:
        for component, teacher in originals.items():
            student, prefix = students[component], f"{component}:" if len(originals) > 1 else ""
            start, dtype = partial(begin, component=component, student=student), cast(ModelMixin, student).dtype
            handles.append(teacher.register_forward_pre_hook(start, with_kwargs=True))
            for name, (layer, own) in _pairs(teacher, student).items():
                look = partial(measure, component=component, name=name, key=prefix + name, layer=own, dtype=dtype)
                handles.append(layer.register_forward_hook(look, with_kwargs=True))
                names[prefix + name] = _adapted(student, name)
        with quiet(reference), torch.no_grad():
            for call in calls:
                call.run(reference)
    finally:
        for handle in handles:
            handle.remove()
    return {
        name: LayerError(
            snr_db=snr_db(sum(signal[name].values()), sum(noise[name].values())),
            by_timestep={f"{t:g}": snr_db(signal[name][t], noise[name][t]) for t in sorted(signal[name])[::-1]},
            adapted=adapted,
        )
        for name, adapted in names.items()
        if name in signal
    }


def _adapted(student: nn.Module, name: str) -> bool:
    """Whether a layer, or a part of it, has timestep-aware adapters."""
    plan = plan_of(student)
    return plan is not None and any(own == name or own.startswith(f"{name}.") for own in plan.rank_of())


def _pairs(teacher: nn.Module, student: nn.Module) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Layers of a float model with those of the same names in its quantized version."""
    counterparts = dict(student.named_modules())
    pairs: dict[str, tuple[nn.Module, nn.Module]] = {
        name: (layer, counterparts[name])
        for name, layer in teacher.named_modules()
        if isinstance(layer, LAYERS) and name in counterparts
    }
    if not pairs:
        raise ConfigError(
            f"A quantized {type(teacher).__name__} must have layers of the same names as its float original, but "
            f"{type(student).__name__} has none of them: the candidate is not a quantized version of the reference."
        )
    return pairs


def _energy(a: Tensor, b: Tensor) -> float:
    return (a.double() - b.double()).square().sum().item()

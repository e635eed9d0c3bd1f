"""The denoising factor of any diffusers scheduler, asked of the scheduler itself."""

import copy
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..compat.diffusers import Scheduler
from ..errors import ConfigError, NonFiniteError
from .finite_steps import SHAPE, learns_variance, no_finite_step, probe_of

NONLINEAR = ("clip_sample", "thresholding", "use_dynamic_thresholding")
"""What makes a step non-linear in the model's output."""
SMALL = 1e-4
"""Of the output's norm: the step of a derivative."""


def denoising_factors(scheduler: SchedulerMixin, num_inference_steps: int, **step_arguments: Any) -> dict[float, float]:
    """`gamma_t` of each step: the coefficient with which the model's output enters the next sample.

    A copy of the scheduler makes every step twice, with outputs that differ by one, from the same sample, noise and
    history; clipping and thresholding are off, and a learned variance is a fixed one. Exact for samplers that are
    linear in the output, whatever it predicts (epsilon, v, sample or flow). Samples count in the unit in which the
    model sees them, so that Euler's unscaled samples give the same factors as DDIM's.

    Args:
        scheduler (`SchedulerMixin`): not changed.
        num_inference_steps (`int`): steps of the sampler.
        **step_arguments: for its `step`, e.g. `eta=1.0`.

    Returns:
        `dict[float, float]`: timestep → factor ≥ 0; the mean where a sampler visits a timestep more than once.

    Raises:
        ConfigError: the scheduler cannot be probed.
        NonFiniteError: a step has no finite coefficient, as with zero terminal SNR where epsilon is predicted.

    Source:
        arXiv 2505.21591 (DFA), as reconstructed; this way of obtaining the coefficient is ours.

    Example:
        >>> from diffusers import DDIMScheduler
        >>> list(denoising_factors(DDIMScheduler(), 4))
        [750.0, 500.0, 250.0, 0.0]
    """
    changes: dict[str, Any] = {key: False for key in NONLINEAR if key in cast(Scheduler, scheduler).config}
    changes |= {"variance_type": "fixed_small"} if learns_variance(scheduler) else {}
    try:
        probe = probe_of(scheduler, num_inference_steps, **changes)
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{type(scheduler).__name__} must offer {num_inference_steps} steps, but it fails: {error}. Take another "
            f"number of steps."
        ) from error
    if "generator" in inspect.signature(probe.step).parameters:
        step_arguments = {"generator": 0} | step_arguments
    sample = torch.zeros(SHAPE)
    found: dict[float, list[float]] = {}
    timesteps = list(probe.timesteps)
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        try:
            _as_input(probe, sample, timestep)
            before = copy.deepcopy(probe)
            low = _step(probe, torch.zeros(SHAPE), timestep, sample, step_arguments)
            high = _step(before, torch.ones(SHAPE), timestep, sample, step_arguments)
            difference = high - low
            if following is not None:
                difference = _as_input(copy.deepcopy(probe), difference, following)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"{type(scheduler).__name__} must make a step from a sample, a timestep and an output, but it fails: "
                f"{error}. Turn the denoising factor off (exponent 0)."
            ) from error
        if not difference.isfinite().all():
            raise NonFiniteError(no_finite_step(scheduler, float(timestep)))
        found.setdefault(float(timestep), []).append(difference.double().mean().abs().item())
    return {timestep: sum(values) / len(values) for timestep, values in found.items()}


def known_factors(scheduler: SchedulerMixin, num_inference_steps: int) -> dict[float, float] | None:
    """`denoising_factors`; None of a scheduler that has none."""
    try:
        return denoising_factors(scheduler, num_inference_steps)
    except (ConfigError, NonFiniteError):
        return None


def at_timestep(values: Mapping[float, float], timestep: float) -> float:
    """What a table of a sampler's timesteps says of the nearest one."""
    return values[min(values, key=lambda known: abs(known - timestep))]


def clips(scheduler: Scheduler) -> bool:
    """Whether a scheduler's step is not linear in the model's output, see `NONLINEAR`."""
    return any(scheduler.config.get(key) for key in NONLINEAR)


@torch.no_grad()
def clipped_factors(
    scheduler: Scheduler, num_inference_steps: int, calls: Iterable[tuple[float, Tensor, Tensor, Tensor]]
) -> dict[float, float]:
    """`gamma_t` of a sampler that clips: how far an error of the model's output moves the next sample, where it goes.

    Clipping of the predicted sample takes a part of an error away, and with it what would have cancelled the rest: then
    the next sample moves further than the linear coefficient says. Here the real step is made twice, from real samples
    of a trajectory, with and without a small share of a model's real error.

    Args:
        scheduler (`SchedulerMixin`): not changed; deterministic, and not scaling the model's input.
        num_inference_steps (`int`): steps of the sampler.
        calls (`Iterable[tuple[float, Tensor, Tensor, Tensor]]`): timestep, sample, output and its error, all of one
            shape, in the sampler's order.

    Returns:
        `dict[float, float]`: timestep → root mean square over samples of the derivative of the step along the error.

    Source:
        In the place of `denoising_factors`, which is for linear steps (DFA, arXiv 2505.21591); ours.
    """
    probe = probe_of(scheduler, num_inference_steps)
    found = {}
    for timestep, (at, sample, output, error) in zip(list(probe.timesteps), calls, strict=True):
        sample, output, error = (each.double() for each in (sample, output, error))
        beside = copy.deepcopy(probe)
        size = error.flatten(1).norm(dim=1).clamp_min(1e-30)
        share = SMALL * output.norm() / error.norm().clamp_min(1e-30)
        moved = beside.step(output + share * error, timestep, sample).prev_sample
        moved = (moved - probe.step(output, timestep, sample).prev_sample) / share
        found[at] = (moved.flatten(1).norm(dim=1) / size).square().mean().sqrt().item()
    return found


def _as_input(scheduler: Scheduler, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A sample as the model sees it; flow-matching schedulers scale nothing."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def _step(
    scheduler: Scheduler, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, given: dict
) -> torch.Tensor:
    arguments = dict(given)
    if arguments.get("generator") == 0:
        arguments["generator"] = torch.Generator().manual_seed(0)
    return scheduler.step(output, timestep, sample, **arguments).prev_sample


def step_arguments(scheduler: Scheduler, arguments: dict) -> dict:
    """Those of a pipeline's arguments that its scheduler's step takes, such as `eta`."""
    known = inspect.signature(scheduler.step).parameters
    return {key: value for key, value in arguments.items() if key in known}

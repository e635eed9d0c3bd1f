"""The denoising factor of any diffusers scheduler, asked of the scheduler itself."""

import copy
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from diffusers import SchedulerMixin
from torch import Tensor

from ..compat.diffusers import Scheduler, scheduler_as_set
from ..errors import ConfigError, NonFiniteError
from .solvers import SHAPE, learns_variance, no_finite_step, probe_of
from .timestep import tellings

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
    try:
        probe = probe_of(scheduler, num_inference_steps, **_made_linear(scheduler))
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise ConfigError(
            f"{type(scheduler).__name__} must offer {num_inference_steps} steps, but it fails: {error}. Take another "
            f"number of steps."
        ) from error
    return _factors(probe, step_arguments)


def _made_linear(scheduler: Scheduler) -> dict[str, Any]:
    """Settings with which a scheduler's steps are linear in the model's output."""
    changes: dict[str, Any] = {key: False for key in NONLINEAR if key in scheduler.config}
    if "noise_sampler_seed" in scheduler.config:  # else it is drawn by torch's own generator
        changes["noise_sampler_seed"] = 0
    return changes | ({"variance_type": "fixed_small"} if learns_variance(scheduler) else {})


def _factors(probe: Scheduler, step_arguments: dict[str, Any]) -> dict[float, float]:
    """`denoising_factors` of a scheduler that is ready to step, which is used up."""
    sample = torch.zeros(SHAPE, dtype=torch.float32, device="cpu")
    found: dict[float, list[float]] = {}
    timesteps = list(probe.timesteps)[getattr(probe, "begin_index", None) or 0 :]
    for timestep, following in zip(timesteps, [*timesteps[1:], None], strict=True):
        try:
            _as_input(probe, sample, timestep)
            before = copy.deepcopy(probe)
            low = _step(probe, torch.zeros_like(sample), timestep, sample, step_arguments)
            high = _step(before, torch.ones_like(sample), timestep, sample, step_arguments)
            difference = high - low
            if following is not None:
                difference = _as_input(copy.deepcopy(probe), difference, following)
        except (TypeError, ValueError, LookupError, AttributeError, RuntimeError) as error:
            raise ConfigError(
                f"{type(probe).__name__} must make a step from a sample, a timestep and an output, but it fails: "
                f"{error}. Turn the denoising factor off (exponent 0)."
            ) from error
        if not difference.isfinite().all():
            raise NonFiniteError(no_finite_step(probe, float(timestep)))
        found.setdefault(float(timestep), []).append(difference.double().mean().abs().item())
    return {timestep: sum(values) / len(values) for timestep, values in found.items()}


class RunFactors:
    """`denoising_factors` of a run: with the sigmas that a pipeline sets, by the timesteps that its denoiser is given.

    Args:
        scheduler (`SchedulerMixin`): of the run; not changed.
        num_inference_steps (`int`): steps of the sampler, where the pipeline does not set them before its first call.
        **step_arguments: as in `denoising_factors`.

    Attributes:
        scheduler, num_inference_steps, step_arguments: as given.
    """

    def __init__(self, scheduler: Scheduler, num_inference_steps: int, **step_arguments: Any) -> None:
        self.scheduler, self.num_inference_steps, self.step_arguments = scheduler, num_inference_steps, step_arguments
        self._found: dict[float, float] | None = None
        self._error: ConfigError | NonFiniteError | None = None

    def look(self) -> None:
        """To be called in a denoiser's call, before the sampler's first step; only the first time counts."""
        if self._found is not None or self._error is not None:
            return
        try:
            with torch.random.fork_rng(devices=[]):  # a step that draws leaves the pipeline's own noise as it is
                if getattr(self.scheduler, "num_inference_steps", None) is None:
                    self._found = denoising_factors(self.scheduler, self.num_inference_steps, **self.step_arguments)
                else:
                    probe = scheduler_as_set(self.scheduler, **_made_linear(self.scheduler))
                    self._found = _factors(probe, self.step_arguments)
        except (ConfigError, NonFiniteError) as error:
            self._error = error

    def required(self, timesteps: Sequence[float]) -> dict[float, float]:
        """`of`, where nothing else will do.

        Raises:
            ConfigError: the scheduler has no factors, or the model was given other timesteps.
            NonFiniteError: a step has no finite coefficient.
        """
        if self._error is not None:
            raise self._error
        if (found := self.of(timesteps)) is None:
            raise ConfigError(
                f"The denoiser must be called with timesteps of its sampler, but {type(self.scheduler).__name__} has "
                f"{[round(t, 3) for t in self._found or ()][:4]} …, and the denoiser was given "
                f"{[round(t, 3) for t in timesteps][:4]} …. Turn the denoising factor off (exponent 0)."
            )
        return found

    def of(self, timesteps: Sequence[float]) -> dict[float, float] | None:
        """Timestep that the model was given → factor.

        None where the model was given others than `tellings` know, or the scheduler has no factors.
        """
        trained, found = float(self.scheduler.config.get("num_train_timesteps") or 0), self._found or {}
        for scale, start, lost in tellings(trained) if found else ():
            told = {t: start + scale * t for t in timesteps}
            meant = {t: _nearest(found, told[t]) for t in timesteps}
            near = all(abs(meant[t] - told[t]) <= lost + 0.01 * abs(meant[t]) for t in timesteps)
            if near and len(set(meant.values())) == len(meant):
                return {t: found[known] for t, known in meant.items()}
        return None


def _nearest(known: Iterable[float], wanted: float) -> float:
    return min(known, key=lambda each: abs(each - wanted))


def at_timestep(values: Mapping[float, float], timestep: float) -> float:
    """What a table of a sampler's timesteps says of the nearest one."""
    return values[_nearest(values, timestep)]


def clips(scheduler: Scheduler) -> bool:
    """Whether a scheduler's step is not linear in the model's output, see `NONLINEAR`."""
    return any(scheduler.config.get(key) for key in NONLINEAR)


@torch.no_grad()
def clipped_factors(
    scheduler: Scheduler,
    num_inference_steps: int,
    calls: Iterable[tuple[float, Tensor, Tensor, Tensor]],
    **step_arguments: Any,
) -> dict[float, float]:
    """`gamma_t` of a sampler that clips: how far an error of the model's output moves the next sample, where it goes.

    Clipping of the predicted sample takes a part of an error away, and with it what would have cancelled the rest: then
    the next sample moves further than the linear coefficient says. Here the real step is made twice, from real samples
    of a trajectory, with equal noise, with and without a small share of a model's real error.

    Args:
        scheduler (`SchedulerMixin`): not changed; not scaling the model's input.
        num_inference_steps (`int`): steps of the sampler.
        calls (`Iterable[tuple[float, Tensor, Tensor, Tensor]]`): timestep, sample, output and its error, all of one
            shape, in the sampler's order.
        **step_arguments: for its `step`, e.g. `eta=1.0`.

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
        moved = _step(beside, output + share * error, timestep, sample, step_arguments)
        moved = (moved - _step(probe, output, timestep, sample, step_arguments)) / share
        found[at] = (moved.flatten(1).norm(dim=1) / size).square().mean().sqrt().item()
    return found


def _as_input(scheduler: Scheduler, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
    """A sample as the model sees it; flow-matching schedulers scale nothing."""
    scale = getattr(scheduler, "scale_model_input", None)
    return sample if scale is None else scale(sample, timestep)


def _step(
    scheduler: Scheduler, output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor, given: dict
) -> torch.Tensor:
    """The next sample; noise is always the same."""
    draws = "generator" in inspect.signature(scheduler.step).parameters
    noise = {"generator": torch.Generator().manual_seed(0)} if draws else {}
    return scheduler.step(output, timestep, sample, **given | noise).prev_sample


def step_arguments(scheduler: Scheduler, arguments: dict) -> dict:
    """Those of a pipeline's arguments that its scheduler's step takes, such as `eta`."""
    known = inspect.signature(scheduler.step).parameters
    return {key: value for key, value in arguments.items() if key in known}

"""Copies of pipelines on another sampler, or with another model, than their own; whether samplers' steps are finite."""

import copy
import functools
import inspect
from collections.abc import Mapping
from typing import Any, cast

import torch
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    SchedulerMixin,
    TCDScheduler,
)
from diffusers.utils import logging as diffusers_logging

from ..compat.diffusers import Scheduler
from ..errors import ConfigError, NonFiniteError

SHAPE = (1, 1, 8, 8)
SAMPLERS = {"ddim": DDIMScheduler, "dpmsolver++": DPMSolverMultistepScheduler, "euler": EulerDiscreteScheduler}
"""Samplers of one equation by the names that verbs know; `"own"` is the pipeline's."""
OTHER_EQUATIONS = (LCMScheduler, TCDScheduler, DDIMInverseScheduler)
"""Schedulers with the configs of diffusion's solvers that do something else."""


def with_parts(pipe: DiffusionPipeline, **parts: Any) -> DiffusionPipeline:
    """A copy of a pipeline in which some components are others; the rest is shared.

    It keeps class, config, progress bar and whatever else its constructor or its user has set; models and their hooks
    are not copied.

    Args:
        pipe (`DiffusionPipeline`): not changed.
        **parts: components by name, taken as they are: a pipeline's constructor may change a scheduler.
    """
    other = copy.copy(pipe)
    for name, inner in _inner_pipelines(pipe).items():
        vars(other)[name] = copy.copy(inner)
    exchange_parts(other, **parts)
    return other


def exchange_parts(pipe: DiffusionPipeline, **parts: Any) -> None:
    """Put other components into a pipeline, and into those of which it is combined; names as in `components`."""
    instead = {id(old): part for name, part in parts.items() if (old := getattr(pipe, name, None)) is not None}
    for inner in _inner_pipelines(pipe).values():
        own = {name: instead[id(old)] for name, old in inner.components.items() if id(old) in instead}
        inner.register_modules(**own)
    pipe.register_modules(**parts)


def _inner_pipelines(pipe: DiffusionPipeline) -> dict[str, DiffusionPipeline]:
    """The pipelines of which a combined one is made, by the names of its attributes."""
    return {name: value for name, value in vars(pipe).items() if isinstance(value, DiffusionPipeline)}


def solver_from(cls: type[SchedulerMixin], scheduler: Scheduler) -> Scheduler:
    """A scheduler of another class with the settings of this one; it clips samples only if this one does."""
    clips = {"clip_sample": False} if "clip_sample" in inspect.signature(cls).parameters else {}
    return cast(Any, cls).from_config(
        scheduler.config, **clips | {k: scheduler.config[k] for k in clips if k in scheduler.config}
    )


def ddim_for(scheduler: Scheduler) -> DDIMScheduler | None:
    """DDIM with a scheduler's settings; None where it would not solve the same equation.

    That is so for a flow's schedulers, for those of consistency models, for other noise schedules than DDIM has, for
    models that are told the noise instead of a timestep (`timestep_type="continuous"`: Stable Video Diffusion's), and
    for models that learn variances, whose steps need them.
    """
    config = scheduler.config
    same = "beta_schedule" in config and config.get("prediction_type") in ("epsilon", "v_prediction", "sample")
    same &= config.get("timestep_type", "discrete") == "discrete"
    if not same or learns_variance(scheduler) or isinstance(scheduler, OTHER_EQUATIONS):
        return None
    try:
        ddim = solver_from(DDIMScheduler, scheduler)
    except (NotImplementedError, TypeError, ValueError):  # a schedule that it does not know
        return None
    own = getattr(scheduler, "alphas_cumprod", None)
    if not isinstance(own, torch.Tensor) or own.shape != ddim.alphas_cumprod.shape:
        return None
    own = own.to(ddim.alphas_cumprod)
    divides = config["prediction_type"] == "epsilon" and bool((own[-1] > 0) & (ddim.alphas_cumprod[-1] <= 0))
    return None if divides or not torch.allclose(own, ddim.alphas_cumprod, atol=1e-6) else ddim


def takes_ddim(scheduler: Scheduler) -> bool:
    """Whether DDIM, or another solver of the same equation, can take a scheduler's place; see `ddim_for`."""
    return ddim_for(scheduler) is not None


def with_sampler(
    pipe: Any, sampler: str | None = None, eta: float = 0.0, arguments: Mapping[str, Any] | None = None
) -> Any:
    """A copy of a pipeline on another sampler.

    Args:
        pipe (`DiffusionPipeline`): not changed.
        sampler (`str`, *optional*): one of `SAMPLERS`, or `"own"` for the pipeline itself; None is DDIM where that can
            take the scheduler's place, and else its own.
        eta (`float`): of DDIM, see `with_ddim`.
        arguments (`Mapping[str, Any]`, *optional*): that the pipeline will be called with. `timesteps` and `sigmas` are
            for its own scheduler where DDIM takes none.

    Raises:
        ConfigError: an unknown sampler, one that does not solve the pipeline's equation or takes none of the
            `timesteps` or `sigmas` that are given, or an `eta` without DDIM.
    """
    steps = [name for name in ("timesteps", "sigmas") if (arguments or {}).get(name) is not None]
    cls: Any = SAMPLERS.get(sampler or "ddim")
    unknown = [name for name in steps if cls and name not in inspect.signature(cls.set_timesteps).parameters]
    if unknown and (sampler or eta):
        raise ConfigError(
            f"`{unknown[0]}` need a scheduler that takes them, but {cls.__name__} does not. Leave them out, or use the "
            f"sampler `own`" + (" without `eta`." if eta else ".")
        )
    if sampler is None and unknown:
        return pipe
    if sampler is None:
        return with_ddim(pipe, eta)
    if sampler not in (*SAMPLERS, "own"):
        raise ConfigError(f"`sampler` must be one of {', '.join(SAMPLERS)} or own, but got {sampler!r}.")
    if eta and sampler != "ddim":
        raise ConfigError(f"`eta` is DDIM's, but got {eta} with the sampler {sampler!r}. Leave one of them out.")
    if sampler == "own":
        return pipe
    if getattr(pipe, "scheduler", None) is None or not takes_ddim(pipe.scheduler):
        raise ConfigError(
            f"The sampler {sampler!r} must solve the equation of the pipeline's scheduler, but {type(pipe).__name__} "
            f"has {type(getattr(pipe, 'scheduler', None)).__name__}, whose place it cannot take. Use `own`."
        )
    if sampler == "ddim":
        return with_ddim(pipe, eta)
    return with_parts(pipe, scheduler=solver_from(SAMPLERS[sampler], pipe.scheduler))


def without_ancestral(pipe: DiffusionPipeline, arguments: Mapping[str, Any] | None = None) -> DiffusionPipeline:
    """A pipeline on DDIM instead of ancestral sampling, which needs all its steps; others as they are.

    Args:
        arguments (`Mapping[str, Any]`, *optional*): see `with_sampler`.
    """
    ancestral = isinstance(getattr(pipe, "scheduler", None), DDPMScheduler)
    return with_sampler(pipe, arguments=arguments) if ancestral else pipe


def with_ddim(pipe: DiffusionPipeline, eta: float = 0.0) -> DiffusionPipeline:
    """A copy of a pipeline on DDIM; the pipeline itself where its scheduler must be kept, see `ddim_for`.

    Args:
        pipe (`DiffusionPipeline`): not changed.
        eta (`float`): 0 is deterministic, 1 as noisy as DDPM.

    Raises:
        ConfigError: an `eta` for a pipeline that keeps its own scheduler.
    """
    scheduler = getattr(pipe, "scheduler", None)  # UnCLIP has one for each part
    ddim = None if scheduler is None else ddim_for(scheduler)
    if ddim is None:
        if eta:
            raise ConfigError(
                f"`eta` is DDIM's, but {type(pipe).__name__} keeps its own {type(scheduler).__name__}, which DDIM "
                f"cannot replace. Leave `eta` at 0."
            )
        return pipe
    if eta:
        step = ddim.step
        signature = inspect.signature(step)

        @functools.wraps(step)  # pipelines look at the signature for what they may pass
        def noisy(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.arguments["eta"] = eta
            return step(*bound.args, **bound.kwargs)

        vars(ddim)["step"] = noisy
    return with_parts(pipe, scheduler=ddim)


def learns_variance(scheduler: Scheduler) -> bool:
    """Whether the second half of the model's output is a variance, which the sampler's step expects."""
    return str(scheduler.config.get("variance_type") or "").startswith("learned")


def probe_of(scheduler: Scheduler, num_inference_steps: int, **changes: Any) -> Scheduler:
    """A new scheduler of the same class and settings, but for some changes, ready to make steps; nothing is logged."""
    verbosity = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()
    try:
        probe = type(scheduler).from_config(scheduler.config, **changes)
        probe.set_timesteps(num_inference_steps)
    finally:
        diffusers_logging.set_verbosity(verbosity)
    return probe


def require_finite_steps(scheduler: Scheduler, num_inference_steps: int) -> None:
    """Refuse a sampler that makes infinity or NaN of finite samples and outputs.

    A probe makes every step from noise. What cannot be stepped without a pipeline is left to the pipeline.

    Args:
        scheduler (`SchedulerMixin`): not changed.
        num_inference_steps (`int`): steps of the sampler.

    Raises:
        NonFiniteError: a step is not finite; the message names the setting.
    """
    generator = torch.Generator().manual_seed(0)
    channels = 2 if learns_variance(scheduler) else 1

    def noise(number: int) -> torch.Tensor:
        return torch.randn((SHAPE[0], number, *SHAPE[2:]), generator=generator)

    try:
        with torch.device("cpu"):  # where the generator is, whatever the user's default
            probe = probe_of(scheduler, num_inference_steps)
            more = {"generator": generator} if "generator" in inspect.signature(probe.step).parameters else {}
            for timestep in list(probe.timesteps):
                sample = noise(1)
                if hasattr(probe, "scale_model_input"):
                    probe.scale_model_input(sample, timestep)
                if not probe.step(noise(channels), timestep, sample, **more)[0].isfinite().all():
                    raise NonFiniteError(no_finite_step(scheduler, float(timestep)))
    except NonFiniteError:
        raise
    except Exception:  # noqa: BLE001 – schedulers fail in their own ways where a pipeline has to prepare them
        return


def no_finite_step(scheduler: Scheduler, timestep: float) -> str:
    """The message about a step that is not finite."""
    name, config = type(scheduler).__name__, scheduler.config
    if config.get("rescale_betas_zero_snr") and config.get("prediction_type") == "epsilon":
        return (
            f"{name} must make finite steps, but at timestep {timestep:g} it divides by zero: it is set to "
            f"`rescale_betas_zero_snr=True` with `prediction_type='epsilon'`, and at zero signal the noise says "
            f"nothing of the picture. Set `prediction_type='v_prediction'` if the model was trained so, else "
            f"`rescale_betas_zero_snr=False`: `pipe.scheduler = {name}.from_config(pipe.scheduler.config, …)`."
        )
    return (
        f"{name} must make finite steps, but at timestep {timestep:g} it makes infinity or NaN of finite numbers. "
        f"Check its settings (`pipe.scheduler.config`), or take another scheduler or number of steps."
    )

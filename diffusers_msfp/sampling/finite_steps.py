"""Whether a sampler's steps are finite where its samples are."""

import inspect
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging

from ..compat.diffusers import Scheduler
from ..errors import NonFiniteError

SHAPE = (1, 1, 8, 8)


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

"""Denoising-factor alignment (DFA): an error counts as much as the sampler uses the output at that timestep.

`L_t = gamma_t * MSE(teacher, student)` with the denoising factor `gamma_t`, the coefficient with which the model's
output enters the next sample (arXiv 2505.21591, as reconstructed: first power; which closed form the paper takes and
whether it normalises was not found). Here it is normalised to mean 1 over the sampler's steps, so that learning rates
keep their meaning; where the sampler clips, the factor is that of its real steps.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ..errors import ConfigError, NonFiniteError
from ..sampling.denoising_factor import RunFactors, clipped_factors, clips
from ..sampling.solvers import learns_variance, probe_of
from ..sampling.trajectory import Trajectories
from ..sampling.used_output import sample_of


def floats(values: Iterable[float | tuple[float, ...]], device: torch.device) -> Tensor:
    """Numbers, or rows of them, as float32, whatever torch's default is."""
    return torch.tensor([*values], dtype=torch.float32, device=device)


def loss_weights(factors: Mapping[float, float], exponent: float = 1.0, floor: float = 0.0) -> dict[float, float]:
    """Weight of each timestep's error: `max(gamma, floor * mean) ** exponent`, normalised to mean 1.

    Args:
        factors (`Mapping[float, float]`): timestep → denoising factor, see `sampling.denoising_factor`.
        exponent (`float`): 1 as in the paper's summaries, 2 for exact squared errors of one step, 0 for no weighting.
        floor (`float`): smallest factor as a share of the mean; protects the last step.

    Raises:
        ConfigError: no factor is positive, or a negative exponent or floor.

    Example:
        >>> loss_weights({999.0: 3.0, 0.0: 1.0})
        {999.0: 1.5, 0.0: 0.5}
    """
    if exponent < 0 or floor < 0:
        raise ConfigError(f"Exponent and floor of the denoising factor must be ≥ 0, but got {exponent} and {floor}.")
    values = torch.tensor(list(factors.values()), dtype=torch.float64, device="cpu")
    if not len(values) or not torch.isfinite(values).all() or values.sum() <= 0:
        raise ConfigError(f"Denoising factors must be finite and positive somewhere, but got {dict(factors)}.")
    weights = (values / values.mean()).clamp_min(floor) ** exponent
    return dict(zip(factors, (weights / weights.mean()).tolist(), strict=True))


def weighted_mean(weight: Tensor, errors: Tensor) -> Tensor:
    """Mean of errors, each times the weight of its sample, which may stand for several rows: the frames of a video.

    Args:
        weight (`Tensor`, `(B,)`), errors (`Tensor`, `(B * m,)`).
    """
    return (weight.repeat_interleave(len(errors) // len(weight)) * errors).mean()


def squared_error(output: Tensor, target: Tensor, *, relative: bool = False) -> Tensor:
    """Mean squared error of each sample in float32, `(B, …)` → `(B,)`.

    Args:
        relative (`bool`): divide by the mean square of the whole target.
    """
    target = target.to(torch.float32)
    error = (output.to(torch.float32) - target).square().flatten(1).mean(1)
    return error / target.square().mean().clamp_min(1e-12) if relative else error


@torch.no_grad()
def real_factors(
    sampler: RunFactors, trajectories: Trajectories, answers: Iterable[Tensor]
) -> dict[float, float] | None:
    """Denoising factors of a sampler that clips, for a model's errors as they are, see `clipped_factors`.

    Args:
        sampler (`RunFactors`): says what steps it makes.
        trajectories (`Trajectories`): of the teacher on it.
        answers (`Iterable[Tensor]`): the model's to the calls of the rollout; not asked for without need.

    Returns:
        `dict[float, float]`: timestep → factor; None where the linear ones hold: nothing is clipped, or the sampler
        does not step from what the model reads and gives, as with guidance, scaled inputs or learned variances, or
        begins after its first step.
    """
    scheduler, steps = sampler.scheduler, trajectories.steps()
    samples = [sample_of(step.args, step.kwargs) for step in steps]
    as_it_is = not hasattr(scheduler, "sigmas") and all(
        len(step.output) == trajectories.share and step.output.shape == sample.shape
        for step, sample in zip(steps, samples, strict=True)
    )
    if not clips(scheduler) or learns_variance(scheduler) or not as_it_is:
        return None
    if len(steps) != len(probe_of(scheduler, sampler.num_inference_steps).timesteps):  # from a picture on
        return None
    calls = [
        (float(step.timesteps[0]), sample, step.output, answer - step.output)
        for step, sample, answer in zip(steps, samples, answers, strict=True)
    ]
    found = clipped_factors(scheduler, sampler.num_inference_steps, calls, **sampler.step_arguments)
    if not all(math.isfinite(factor) for factor in found.values()):
        raise NonFiniteError("The teacher's and the student's outputs must be finite, but got NaN or infinity.")
    return found

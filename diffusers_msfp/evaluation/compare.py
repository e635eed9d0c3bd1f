"""A quantized pipeline against its full-precision original.

Both see the same noise. The denoiser's error is taken on the *reference's* trajectory: whatever the reference denoiser
is called with, the candidate is called with too, in every stock pipeline. Pictures come from each pipeline's own run.
"""

import math
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from ..compat.torch import tree_map
from ..errors import ConfigError
from ..workflow.sampling import (
    batched_calls,
    call_arguments,
    denoiser_of,
    model_output,
    quiet,
    require_positive,
)
from ..workflow.solvers import with_ddim
from ..workflow.timestep import timestep_of, timestep_position
from ..workflow.used_output import used_part
from .samples import pictures_tensor

MAX_PSNR_DB = 100.0


def psnr_db(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, at most 100; images `(N, …)` in [0, 1] → `(N,)`."""
    error = (a.double() - b.double()).flatten(1).square().mean(1)
    return (-10 * torch.log10(error)).clamp_max(MAX_PSNR_DB)


def compare_pipelines(
    reference,
    candidate,
    *,
    num_samples: int = 16,
    num_inference_steps: int = 20,
    seed: int = 0,
    eta: float = 0.0,
    prompts: list[str] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_pictures: Callable[[Tensor, Tensor], None] | None = None,
    **arguments,
) -> dict:
    """Error of the denoiser and of the pictures for equal noise, on DDIM where it can take the scheduler's place.

    Variances that a model puts out beside its prediction are not counted.

    Args:
        reference, candidate (`DiffusionPipeline`): of the same architecture; neither is changed.
        num_samples, num_inference_steps, seed, eta: of both runs.
        prompts (`list[str]`, *optional*): taken in turn where the pipeline takes prompts.
        on_step (`Callable[[int, int], None]`, *optional*): called after each step of the reference with (done, total).
        on_pictures (`Callable[[Tensor, Tensor], None]`, *optional*): called with each batch of the reference's and the
            candidate's pictures, `(N, channels, H, W)` in [0, 1].
        **arguments: passed on to both pipelines.

    Returns:
        `dict`: `eps_mse` (mean squared difference of the outputs), `eps_rel_l2` (`sqrt(Σ‖Δ‖² / Σ‖reference‖²)`), both
        pooled over samples and timesteps; `eps_rel_l2_by_timestep` (timestep → value); `image_psnr_db` (mean over
        images of [0, 1]).

    Raises:
        ConfigError: the denoisers give outputs of different shapes, numbers below 1, or an `eta` for a pipeline that
            DDIM cannot sample.
    """
    require_positive(num_samples=num_samples, num_inference_steps=num_inference_steps)
    reference, candidate = with_ddim(reference, eta), with_ddim(candidate, eta)
    student = denoiser_of(candidate)
    make_arguments = call_arguments(reference, prompts, num_inference_steps, {"output_type": "pt"} | arguments)
    calls, again = (batched_calls(make_arguments, [student], num_samples, seed) for _ in range(2))  # generators advance
    error, energy, count = defaultdict(float), defaultdict(float), 0
    done = 0
    asking = False  # the candidate may be the reference itself
    total = len(calls) * num_inference_steps

    def as_candidate(value):
        is_data = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1  # no timesteps
        return value.to(student.dtype) if is_data else value

    def watch(module, args, kwargs, output) -> None:
        nonlocal count, done, asking
        if asking:
            return
        timestep = timestep_of(timestep_position(module), args, kwargs)
        asking = True
        args, kwargs = tree_map(as_candidate, (args, kwargs))
        expected, came = model_output(output).double(), model_output(student(*args, **kwargs)).double()
        asking = False
        if expected.shape != came.shape:
            raise ConfigError(
                f"Both denoisers must give the same shape, but {tuple(expected.shape)} and {tuple(came.shape)} came: "
                f"the candidate is not a quantized version of the reference."
            )
        expected, came = (used_part(reference, each, args, kwargs) for each in (expected, came))
        key = float(torch.as_tensor(timestep).flatten()[0])
        error[key] += (came - expected).square().sum().item()
        energy[key] += expected.square().sum().item()
        count += expected.numel()
        done += 1
        if on_step is not None:
            on_step(done, max(done, total))

    ratios = []
    with quiet(reference), quiet(candidate), torch.no_grad():
        for call, same in zip(calls, again, strict=True):
            handle = denoiser_of(reference).register_forward_hook(watch, with_kwargs=True)
            try:
                expected = pictures_tensor(call.run(reference).images)
            finally:
                handle.remove()
            came = pictures_tensor(same.run(candidate).images)
            ratios.append(psnr_db(expected, came))
            if on_pictures is not None:
                on_pictures(expected, came)
    by_timestep = {f"{t:g}": math.sqrt(error[t] / energy[t]) for t in sorted(error, reverse=True)}
    return {
        "eps_mse": sum(error.values()) / count,
        "eps_rel_l2": math.sqrt(sum(error.values()) / sum(energy.values())),
        "eps_rel_l2_by_timestep": by_timestep,
        "image_psnr_db": torch.cat(ratios).mean().item(),
    }

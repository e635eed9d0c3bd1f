"""A quantized pipeline against its full-precision original.

Both see the same noise. The denoiser's error is taken on the *reference's* trajectory: whatever the reference denoiser
is called with, the candidate is called with too, in every stock pipeline. Pictures come from each pipeline's own run.
"""

import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..compat.torch import tree_map
from ..compat.wrappers import sees_through
from ..errors import ConfigError
from ..sampling.calls import batched_calls, call_arguments, quiet, require_positive
from ..sampling.denoisers import denoisers_of, is_quantized, model_output
from ..sampling.solvers import with_ddim
from ..sampling.timestep import first_timestep, timestep_argument
from ..sampling.trial import describe
from ..sampling.used_output import used_part
from .images.samples import pictures_tensor

MAX_PSNR_DB = 100.0


def psnr_db(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, at most 100; images `(N, …)` in [0, 1] → `(N,)`."""
    error = (a.double() - b.double()).flatten(1).square().mean(1)
    return (-10 * torch.log10(error)).clamp_max(MAX_PSNR_DB)


@sees_through(changes=False)
def compare_pipelines(
    reference: DiffusionPipeline,
    candidate: DiffusionPipeline,
    *,
    num_samples: int = 16,
    num_inference_steps: int = 20,
    seed: int = 0,
    eta: float = 0.0,
    prompts: list[str] | None = None,
    on_step: Callable[[int, int], None] | None = None,
    on_pictures: Callable[[Tensor, Tensor], None] | None = None,
    **arguments: Any,
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
        pooled over samples, timesteps and denoisers; `eps_rel_l2_by_timestep` (timestep → value); `image_psnr_db`
        (mean over images of [0, 1]); and where there are several denoisers, `denoisers` (name → the first three and
        `quantized`).

    Raises:
        ConfigError: other denoisers, outputs of different shapes, numbers below 1, or an `eta` for a pipeline that DDIM
            cannot sample.
    """
    require_positive(num_samples=num_samples, num_inference_steps=num_inference_steps)
    reference, candidate = with_ddim(reference, eta), with_ddim(candidate, eta)
    originals, students = paired_denoisers(reference, candidate)
    make_arguments = call_arguments(reference, prompts, num_inference_steps, {"output_type": "pt"} | arguments)
    models = list(students.values())
    calls, again = (batched_calls(make_arguments, models, num_samples, seed) for _ in range(2))  # generators advance
    figures = {name: _Figures() for name in originals}
    done = 0
    asking = False  # the candidate may be the reference itself
    total = len(calls) * num_inference_steps

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, name: str) -> None:
        nonlocal done, asking
        if asking:
            return
        student = students[name]

        def as_candidate(value: Any) -> Any:
            is_data = isinstance(value, Tensor) and value.is_floating_point() and value.ndim > 1  # no timesteps
            return value.to(student.dtype) if is_data else value

        asking = True
        timestep = timestep_argument(module).of(args, kwargs)
        args, kwargs = tree_map(as_candidate, (args, kwargs))
        try:
            expected, actual = model_output(output).double(), model_output(student(*args, **kwargs)).double()
        except (RuntimeError, TypeError) as error:
            raise ConfigError(
                f"Both denoisers must take the same inputs, but {type(student).__name__} fails on what "
                f"{type(module).__name__} was called with: {describe(error)} The candidate is not a quantized version "
                f"of the reference."
            ) from error
        asking = False
        if expected.shape != actual.shape:
            raise ConfigError(
                f"Both denoisers must give the same shape, but got {tuple(expected.shape)} and {tuple(actual.shape)}: "
                f"the candidate is not a quantized version of the reference."
            )
        expected, actual = (used_part(reference, each, args, kwargs) for each in (expected, actual))
        figures[name].add(first_timestep(timestep), expected, actual)
        done += 1
        if on_step is not None:
            on_step(done, max(done, total))

    ratios = []
    with quiet(reference), quiet(candidate), torch.no_grad():
        for call, same in zip(calls, again, strict=True):
            handles = [
                model.register_forward_hook(partial(watch, name=name), with_kwargs=True)
                for name, model in originals.items()
            ]
            try:
                expected = pictures_tensor(call.run(reference))
            finally:
                for handle in handles:
                    handle.remove()
            actual = pictures_tensor(same.run(candidate))
            ratios.append(psnr_db(expected, actual))
            if on_pictures is not None:
                on_pictures(expected, actual)
    pooled = sum(figures.values(), _Figures()).result()
    own = {name: figures[name].result() | {"quantized": is_quantized(model)} for name, model in students.items()}
    return pooled | ({"denoisers": own} if len(own) > 1 else {}) | {"image_psnr_db": torch.cat(ratios).mean().item()}


def paired_denoisers(
    reference: DiffusionPipeline, candidate: DiffusionPipeline
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The denoisers of two pipelines under the reference's names; one each are a pair whatever they are called.

    Raises:
        ConfigError: the candidate has others.
    """
    originals, students = denoisers_of(reference), denoisers_of(candidate)
    if len(originals) == len(students) == 1:
        return originals, dict(zip(originals, students.values(), strict=True))
    if originals.keys() != students.keys():
        raise ConfigError(
            f"Both pipelines must have the same denoisers, but got {', '.join(originals)} and {', '.join(students)}: "
            f"the candidate is not a quantized version of the reference."
        )
    return originals, students


class _Figures:
    """Error of a denoiser's outputs by timestep."""

    def __init__(self) -> None:
        self.error: dict[float, float] = defaultdict(float)
        self.energy: dict[float, float] = defaultdict(float)
        self.count = 0

    def add(self, timestep: float, expected: Tensor, actual: Tensor) -> None:
        """Take the outputs of one call into account, float64."""
        self.error[timestep] += (actual - expected).square().sum().item()
        self.energy[timestep] += expected.square().sum().item()
        self.count += expected.numel()

    def __add__(self, other: "_Figures") -> "_Figures":
        both = _Figures()
        for part in (self, other):
            both.count += part.count
            for timestep in part.error:
                both.error[timestep] += part.error[timestep]
                both.energy[timestep] += part.energy[timestep]
        return both

    def result(self) -> dict:
        """`eps_mse`, `eps_rel_l2` and `eps_rel_l2_by_timestep`; None for a denoiser that was never called."""
        error, energy = sum(self.error.values()), sum(self.energy.values())
        by_timestep = {f"{t:g}": _relative(self.error[t], self.energy[t]) for t in sorted(self.error, reverse=True)}
        return {
            "eps_mse": error / self.count if self.count else None,
            "eps_rel_l2": _relative(error, energy) if self.count else None,
            "eps_rel_l2_by_timestep": by_timestep,
        }


def _relative(error: float, energy: float) -> float:
    return math.sqrt(error / energy) if energy else math.inf if error else 0.0

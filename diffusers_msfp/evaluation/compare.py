"""A quantized pipeline against its full-precision original.

Both see the same noise, and both are led by the *reference's* schedulers. The denoiser's error is taken on the
reference's trajectory: whatever the reference denoiser is called with, the candidate is called with too, in every stock
pipeline; a cache of keys that an earlier step has filled is a part of that. Pictures come from each pipeline's own run.
"""

import copy
import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import Tensor, nn

from ..compat.diffusers import labels_by_name
from ..compat.wrappers import sees_through
from ..errors import ConfigError
from ..results import OPTIONAL, OnProgress
from ..sampling.calls import batched_calls, call_arguments, quiet, require_positive, unseen
from ..sampling.denoisers import (
    denoiser_name,
    denoiser_of,
    denoisers_of,
    focus,
    is_quantized,
    labelled,
    model_output,
    scheduler_of,
)
from ..sampling.denoising_factor import RunFactors
from ..sampling.solvers import with_parts, with_sampler
from ..sampling.timestep import first_timestep, timestep_argument
from ..sampling.trial import describe
from ..sampling.used_output import after_calls, fresh, place_of, sample_of, used_part, watching_samples
from .images.distances import mean_of
from .images.samples import pictures_of, require_one_a_prompt, settings_of
from .output_errors import ComparedDenoiser, DenoiserError, OutputErrors

logger = logging.getLogger(__name__)

MAX_PSNR_DB = 100.0


def psnr_db(a: Tensor, b: Tensor) -> Tensor:
    """Peak signal-to-noise ratio of each image in decibels, at most 100; images `(N, …)` in [0, 1] → `(N,)`."""
    error = (a.double() - b.double()).flatten(1).square().mean(1)
    return (-10 * torch.log10(error)).clamp_max(MAX_PSNR_DB)


@dataclass(frozen=True, kw_only=True)
class Comparison(DenoiserError):
    """What `compare_pipelines` found; the errors are pooled over denoisers.

    Args:
        denoisers (`Mapping[str, ComparedDenoiser]`, *optional*): by name where there are several.
        image_psnr_db (`float`): mean over pictures of [0, 1], each at most 100.
        image_psnr_db_interval (`tuple[float, float]`, *optional*): of the mean over pictures, 95 %; None for a single
            picture, which has none.
        sampler (`str`): class of the scheduler that both used.
    """

    denoisers: Mapping[str, ComparedDenoiser] | None = field(default=None, metadata=OPTIONAL)
    image_psnr_db: float
    image_psnr_db_interval: tuple[float, float] | None
    sampler: str


@sees_through(changes=False)
def compare_pipelines(
    reference: DiffusionPipeline,
    candidate: DiffusionPipeline | ModelMixin,
    *,
    num_samples: int = 16,
    num_inference_steps: int = 20,
    seed: int = 0,
    eta: float = 0.0,
    sampler: str | None = None,
    prompts: list[str] | None = None,
    on_progress: OnProgress | None = None,
    on_pictures: Callable[[Tensor, Tensor, Mapping[str, Any]], None] | None = None,
    **arguments: Any,
) -> Comparison:
    """Error of the denoiser and of the pictures for equal noise, on DDIM where it can take the scheduler's place.

    Variances that a model puts out beside its prediction are not counted, nor what it puts out in the place of a
    picture that is to be edited.

    Args:
        reference (`DiffusionPipeline`): full precision; not changed. Its schedulers lead both, as the figures would
            else be those of two samplers.
        candidate (`DiffusionPipeline` or `ModelMixin`): of the same architecture, not changed; a denoiser alone takes
            the place of the reference's.
        num_samples, num_inference_steps, eta: of both runs.
        seed: of their noise, which is none that `calibrate` or a method draws with this or a near seed.
        sampler (`str`, *optional*): see `with_sampler`.
        prompts (`list[str]`, *optional*): taken in turn where the pipeline takes prompts.
        on_progress (`OnProgress`, *optional*): called with (done, total) after each step of the reference.
        on_pictures (`Callable[[Tensor, Tensor, Mapping[str, Any]], None]`, *optional*): called with each batch of the
            reference's and the candidate's pictures, `(N, channels, H, W)` in [0, 1], and the arguments of the call.
        **arguments: passed on to both pipelines.

    Raises:
        ConfigError: a reference that is no pipeline, other denoisers, outputs of different shapes, numbers below 1,
            other numbers of pictures than asked for, or a sampler or an `eta` that the pipeline cannot be sampled with.
    """
    require_positive(num_samples=num_samples, num_inference_steps=num_inference_steps)
    require_one_a_prompt(arguments)
    quantized = with_sampler(in_place_of(reference, candidate), sampler, eta, arguments)
    reference = with_sampler(reference, sampler, eta, arguments)
    originals, students = paired_denoisers(reference, quantized)
    make_arguments = call_arguments(reference, prompts, num_inference_steps, {"output_type": "pt"} | arguments)
    models = list(students.values())
    noise = unseen(seed)
    calls, again = (batched_calls(make_arguments, models, num_samples, noise) for _ in range(2))  # generators advance
    schedulers = {name: scheduler_of(focus(reference, name)) for name in originals}
    errors = {name: OutputErrors(RunFactors(each, num_inference_steps)) for name, each in schedulers.items()}
    done = 0
    asking = False  # the candidate may be the reference itself
    waiting: list[tuple[OutputErrors, float, Tensor, Tensor, Tensor]] = []  # for the step that says what counts
    total = len(calls) * num_inference_steps

    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any, *, name: str) -> None:
        nonlocal done, asking
        if asking:
            return
        student = students[name]

        told, rows = timestep_argument(module).given(args, kwargs), len(sample_of(args, kwargs))
        listed = any(isinstance(each, list) for each in (*args, *kwargs.values()))  # a tensor for each sample

        def as_candidate(value: Any) -> Any:
            is_data = isinstance(value, Tensor) and value.dtype == module.dtype and value.ndim > 1 and value is not told
            is_table = is_data and value.ndim == 2 and len(value) != rows and not listed  # such as positions
            return value.to(student.dtype) if is_data and not is_table else value

        asking = True
        errors[name].sampler.look()
        timestep = timestep_argument(module).of(args, kwargs)
        if waiting and (waiting[-1][0], waiting[-1][1]) != (errors[name], first_timestep(timestep)):
            count()  # what is stepped is another scheduler, such as a copy
        args, kwargs = fresh((args, kwargs), as_candidate)
        read = sample_of(args, kwargs)
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
        waiting.append((errors[name], first_timestep(timestep), expected, actual, read))
        done += 1
        if on_progress is not None:
            on_progress(done, max(done, total))

    def count(sample: Tensor | None = None) -> None:
        for own, timestep, expected, actual, read in waiting:
            place = () if sample is None else place_of(sample, read, expected)
            own.add(timestep, expected[place], actual[place])
        waiting.clear()

    several = not any("label" in name or "embeds" in name for name in arguments)  # as of Marigold's kinds of pictures
    ratios = []
    with quiet(reference), quiet(quantized), torch.no_grad():
        for call, same in zip(calls, again, strict=True):
            with ExitStack() as watching:
                for name, model in originals.items():
                    watching.enter_context(after_calls(model, partial(watch, name=name)))
                for scheduler in {id(each): each for each in schedulers.values()}.values():
                    watching.enter_context(watching_samples(scheduler, count))
                expected = pictures_of(reference, call, several=several)
            count()
            actual = pictures_of(quantized, same, several=several)
            ratios.append(psnr_db(expected, actual))
            if on_pictures is not None:
                on_pictures(expected, actual, call.arguments)
    own = {
        name: ComparedDenoiser(**errors[name].result(), quantized=is_quantized(model))
        for name, model in students.items()
    }
    psnr = mean_of(torch.cat(ratios))
    return Comparison(
        **OutputErrors.pooled(errors.values()),
        denoisers=own if len(own) > 1 else None,
        image_psnr_db=psnr.value,
        image_psnr_db_interval=(psnr.low, psnr.high) if sum(map(len, ratios)) > 1 else None,
        sampler=type(scheduler_of(reference)).__name__,
    )


def in_place_of(reference: DiffusionPipeline, candidate: DiffusionPipeline | ModelMixin) -> DiffusionPipeline:
    """The candidate as a pipeline led by the reference's schedulers: itself, or the reference with another denoiser.

    Args:
        reference (`DiffusionPipeline`): whose pictures are the measure.
        candidate (`DiffusionPipeline` or `ModelMixin`): pipeline, or denoiser alone.

    Raises:
        ConfigError: the reference is no pipeline, or the candidate no denoiser of its class.
    """
    if isinstance(reference, nn.Module):
        raise ConfigError(
            f"A reference must be a pipeline, since a {type(reference).__name__} alone draws no pictures. Pass the "
            f"pipeline that it belongs to; the candidate may be a model alone."
        )
    if not isinstance(candidate, nn.Module):
        return labelled(_led_alike(reference, candidate), labels_by_name(reference))  # asked for the same classes
    original = denoiser_of(reference)
    if type(candidate) is not type(original):
        raise ConfigError(
            f"A denoiser alone must be of the class of the reference's, {type(original).__name__}, but got "
            f"{type(candidate).__name__}. Name the pipeline that it was made from."
        )
    return with_parts(reference, **{denoiser_name(reference): candidate})


def _led_alike(reference: DiffusionPipeline, candidate: DiffusionPipeline) -> DiffusionPipeline:
    """A pipeline with the schedulers of another: itself where its own are set alike."""
    own = candidate.components
    others = {
        name: copy.deepcopy(scheduler)
        for name, scheduler in reference.components.items()
        if isinstance(scheduler, SchedulerMixin)
        and own.get(name) is not None
        and settings_of(own[name]) != settings_of(scheduler)
    }
    for name, scheduler in others.items():
        logger.warning(
            "The candidate's `%s`, a %s, is set otherwise than the reference's %s, by which both are sampled here.",
            name,
            type(own[name]).__name__,
            type(scheduler).__name__,
        )
    return with_parts(candidate, **others) if others else candidate


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

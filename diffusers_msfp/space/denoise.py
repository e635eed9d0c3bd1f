"""Stock pipelines, step by step: what the page shows while they run.

A pipeline's call cannot be paused, so each runs in a thread of its own that hands over after every step of its
scheduler and waits to be asked for the next. So two pipelines take turns: equal noise, equal step, and neither is timed
while the other computes. Visitors share the models; pipeline object, scheduler and generator are each request's own.
"""

import functools
import inspect
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from queue import SimpleQueue
from threading import Semaphore
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ..compat.diffusers import Scheduler
from ..sampling.solvers import solver_from, with_parts

DECODED_PREVIEWS = 5  # of one run of a latent model; each costs a pass of the decoder


@dataclass(frozen=True)
class Step:
    """Where a run stands after one more step.

    Args:
        index, total (`int`): steps done, steps in all.
        timestep (`float`): of the step.
        seconds (`float`): that it took; the first includes what the pipeline does before it, such as reading a prompt.
        picture (`np.ndarray`, `(H, W, 1 or 3)`, float in [0, 1], *optional*): what the result would be if the denoiser
            were right now; None where that is not worth a pass of the decoder.
        finished (`bool`): the picture is the result.
    """

    index: int
    total: int
    timestep: float
    seconds: float
    picture: np.ndarray | None
    finished: bool = False


class _Stopped(Exception):
    """Ends a pipeline's thread when nobody asks for more steps."""


def side_by_side(pipes: Sequence, scheduler: type, make_call: Callable[[], dict]) -> Iterator[tuple[Step, ...]]:
    """Run several pipelines in turns.

    Args:
        pipes (`Sequence[DiffusionPipeline]`): not changed.
        scheduler (`type`): a diffusers scheduler's class, made from each pipeline's own scheduler's config.
        make_call (`Callable[[], dict]`): arguments for a pipeline's call; called once for each, as generators advance.

    Yields:
        `tuple[Step, ...]`: of each pipeline one step; in the last tuple all are finished.
    """
    with ExitStack() as stack:
        runs = [stack.enter_context(closing(denoise(pipe, scheduler, make_call()))) for pipe in pipes]
        yield from zip(*runs, strict=True)


def denoise(pipe: DiffusionPipeline, scheduler: type, call: dict) -> Generator[Step, None, None]:
    """Run one pipeline; closing the iterator stops it after the step at hand."""
    events: SimpleQueue[Any] = SimpleQueue()
    permission, stopped = Semaphore(0), False
    step: Step | None = None

    def hand_over(event: tuple) -> None:
        events.put(event)
        permission.acquire()
        if stopped:
            raise _Stopped

    own = with_parts(pipe, scheduler=_watched(solver_from(scheduler, pipe.scheduler), hand_over))
    own.set_progress_bar_config(disable=True)
    with ThreadPoolExecutor(1) as thread:
        run: Future[Any] = thread.submit(cast(Callable, own), **call)
        run.add_done_callback(events.put)
        try:
            while True:
                start = perf_counter()
                event = events.get()
                seconds = perf_counter() - start
                if event is run:
                    yield replace(cast(Step, step), picture=event.result().images[0], finished=True)
                    return
                index, total, timestep, estimate = event
                step = Step(index, total, timestep, seconds, _preview(pipe, estimate, index, total))
                if index < total:
                    yield step
                permission.release()
        finally:
            stopped = True
            permission.release()


def _watched(scheduler: Scheduler, hand_over: Callable[[tuple], None]) -> Scheduler:
    """Let a scheduler report (steps done, steps in all, timestep, estimate of the result) after each step."""
    step = scheduler.step
    accepted = inspect.signature(step).parameters
    done = 0

    @functools.wraps(step)  # pipelines look at the signature
    def watched(*args: Any, return_dict: bool = True, **kwargs: Any) -> Any:
        nonlocal done
        known = {name: value for name, value in kwargs.items() if name in accepted}
        result = step(*args, return_dict=True, **known)
        done += 1
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        estimate = _estimate(scheduler, result)[:1].detach().cpu()
        hand_over((done, max(done, len(scheduler.timesteps)), float(timestep), estimate))
        return result if return_dict else result.to_tuple()

    scheduler.step = watched
    return scheduler


def _estimate(scheduler: Scheduler, result: Any) -> Tensor:
    """The denoised sample as the step predicts it; where a scheduler keeps that to itself, the sample as it is.

    Multistep solvers keep their predictions: of the sample in the forms that solve for it, of the noise in others.
    """
    predicted = getattr(result, "pred_original_sample", None)
    if predicted is not None:
        return predicted
    config, history = scheduler.config, getattr(scheduler, "model_outputs", None)
    if not (config.get("predict_x0") or "dpmsolver++" in str(config.get("algorithm_type"))):
        history = None
    return result.prev_sample if not history or history[-1] is None else history[-1]


def decoder_of(pipe: DiffusionPipeline) -> Any:
    """What turns a latent pipeline's samples into pictures; None where they are pictures already."""
    return getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)


@torch.no_grad()
def _preview(pipe: DiffusionPipeline, sample: Tensor, index: int, total: int) -> np.ndarray | None:
    """A sample as a picture; latents are decoded a few times in a run."""
    decoder = decoder_of(pipe)
    if decoder is not None:
        if sample.ndim != 4 or index % -(-total // DECODED_PREVIEWS) or index == total:
            return None
        sample = sample.to(decoder.device, decoder.dtype) / decoder.config.scaling_factor
        sample = decoder.decode(sample + (getattr(decoder.config, "shift_factor", None) or 0)).sample
    return (sample[0].float().cpu() / 2 + 0.5).clamp(0, 1).permute(1, 2, 0).numpy()

"""What happens when a visitor presses the button; knows nothing of Gradio's components."""

import importlib
import os
from collections.abc import Iterator, Sequence
from statistics import median
from textwrap import shorten
from time import perf_counter
from typing import NamedTuple, cast

import numpy as np
import torch
from PIL import Image

from ..errors import ConfigError
from ..evaluation.compare import psnr_db
from ..sampling.calls import DEFAULT_PROMPTS
from ..sampling.denoisers import asked_for
from .candidate import Candidate
from .denoise import Step, side_by_side
from .markup import adapter_at, adapter_strip, beside, enlarge, figures_table, progress_line

# On ZeroGPU this must come before the first use of CUDA; elsewhere there is no need for it.
zero_gpu = importlib.import_module("spaces") if os.environ.get("SPACES_ZERO_GPU") else None

DEFAULT_STEPS = 25
KEPT_RESULTS = 12
CAPTION = 60
SECONDS_BETWEEN_PICTURES = 0.1


class Frame(NamedTuple):
    """What the page shows at one moment; None leaves a part as it is.

    Args:
        pictures (`tuple[Image, Image]` or `Image`, *optional*): enlarged, the reference's first.
        progress, strip, figures (`str`): HTML.
        history (`list[tuple[Image, str]]`): the visitor's results with captions, latest first.
    """

    pictures: tuple[Image.Image, ...] | Image.Image | None
    progress: str
    strip: str
    figures: str | None
    history: list


class Show:
    """Runs of all candidates, as frames of the page.

    Args:
        candidates (`list[Candidate]`): the reference, if there is one, and the quantized pipeline last.
    """

    def __init__(self, candidates: list[Candidate]) -> None:
        self.candidates, self.quantized = candidates, candidates[-1]
        self._run = zero_gpu.GPU(self.steps) if zero_gpu else self.steps

    def first_frame(self) -> Frame:
        """The page before anybody came, after a run that compiles kernels and makes engines ready.

        ZeroGPU has no GPU for such a run, and of a large model one step must do, which is not worth showing.
        """
        frame = Frame(None, progress_line(), self.strip(), self.figures(), [])
        if zero_gpu:
            return frame
        small = self.quantized.draws_small
        wishes = {"seed": 0, "prompt": DEFAULT_PROMPTS[0] if "prompt" in self.quantized.parameters else None}
        wishes |= {"class_label": self.quantized.classes[0][1]} if self.quantized.classes else {}
        *_, end = self.frames([], next(iter(self.quantized.schedulers)), DEFAULT_STEPS if small else 1, wishes)
        return end._replace(history=[]) if small else frame._replace(figures=self.figures())

    def steps(self, scheduler: str, steps: int, wishes: dict) -> Iterator[tuple[Step, ...]]:
        """The run of all candidates; on ZeroGPU this is what gets the GPU."""
        make_call = self.quantized.request(num_inference_steps=steps, **wishes)
        pipes = [candidate.pipe for candidate in self.candidates]
        yield from side_by_side(pipes, self.quantized.schedulers[scheduler], make_call)

    def frames(self, history: list, scheduler: str, steps: int, wishes: dict) -> Iterator[Frame]:
        """A run, some ten frames a second; the last one holds the result.

        Args:
            history (`list`): of the frame before.
            scheduler (`str`): a name in the candidate's `schedulers`.
            steps (`int`): denoising steps.
            wishes (`dict`): the other arguments of `Candidate.request`.

        Raises:
            ConfigError: wishes that cannot be met.
        """
        if scheduler not in self.quantized.schedulers:
            choices = ", ".join(self.quantized.schedulers)
            raise ConfigError(f"The scheduler must be one of {choices}, but got {scheduler!r}.")
        visited: list[float] = []
        seconds: list[list[float]] = [[] for _ in self.candidates]
        shown_at = 0.0
        for turn in self._run(scheduler, steps, wishes):
            now = turn[-1]
            visited.append(now.timestep)
            for own, step in zip(seconds, turn, strict=True):
                own.append(step.seconds)
            if now.finished:
                results = [cast(np.ndarray, step.picture) for step in turn]
                history = [(beside(results), self._caption(scheduler, steps, wishes)), *history][:KEPT_RESULTS]
                progress = progress_line(now, closeness=_closeness(results))
                yield Frame(self.pictures(turn), progress, self.strip(), self.figures(seconds), history)
            elif perf_counter() - shown_at > SECONDS_BETWEEN_PICTURES:
                shown_at = perf_counter()
                adapters = [adapter_at(intervals, now.timestep) for intervals in self.quantized.intervals]
                yield Frame(self.pictures(turn), progress_line(now, adapters), self.strip(visited), None, history)

    def _caption(self, scheduler: str, steps: int, wishes: dict) -> str:
        """What a result was asked to be, where it was, and how it was drawn."""
        arguments = {"prompt": wishes.get("prompt"), "class_labels": wishes.get("class_label")}
        asked = "".join(asked_for(self.quantized.pipe, arguments, 1))
        drawn = f"seed {int(wishes['seed'])} · {scheduler}, {steps} steps"
        return f"{shorten(asked, CAPTION, placeholder=' …')} · {drawn}" if asked else drawn

    def pictures(self, turn: tuple[Step, ...]) -> tuple[Image.Image, ...] | Image.Image | None:
        """For the slider, or for one picture; None where there is no news."""
        images = tuple(enlarge(step.picture) for step in turn if step.picture is not None)
        if len(images) < len(turn):
            return None
        return images if len(images) > 1 else images[0]

    def strip(self, visited: Sequence[float] = ()) -> str:
        """Adapters over timesteps; nothing where there are none."""
        return adapter_strip(self.quantized.intervals, visited) if self.quantized.intervals else ""

    def figures(self, seconds: Sequence[list[float]] = ()) -> str:
        """The table; the first step's time is left out, as it includes reading the prompt."""
        times: list[float | None] = [median(own[1:] or own) for own in seconds] or [None] * len(self.candidates)
        columns = zip(self.candidates, times, strict=True)
        return figures_table([(each.name, each.weight_bytes, each.memory_bytes, time) for each, time in columns])


def _closeness(results: list) -> float | None:
    """PSNR of two pictures; None for one."""
    if len(results) < 2:
        return None
    first, second = (torch.from_numpy(picture)[None] for picture in results)
    return psnr_db(first, second).item()

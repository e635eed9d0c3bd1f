"""A whole model with the layers of a choice: its pictures beside the reference's, and the time of its step."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from statistics import median
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..engines.choose import set_engine
from ..evaluation.compare import psnr_db
from ..evaluation.images.samples import draw_pictures
from ..results import OnProgress, in_stage
from ..sampling.denoisers import denoiser_of
from .palette import Palette, scheme_for
from .sensitivity import Samples, replaced

ROUNDS = 7
"""Steps of which a time is the median."""


@contextmanager
def quantized(model: nn.Module, palette: Palette, choice: Mapping[str, str]) -> Iterator[None]:
    """While this lasts, a float model has the layers of a choice, run by the fastest engines.

    Args:
        choice (`Mapping[str, str]`): layer → scheme.
    """
    with replaced(model, {name: palette.layers[name][scheme] for name, scheme in choice.items()}):
        set_engine(model, "auto")
        try:
            yield
        finally:
            set_engine(model, "reference")


class Pictures:
    """Pictures of a pipeline on fixed noise, float and with choices.

    Args:
        pipe (`DiffusionPipeline`): float, on the sampler that is to be used.
        palette (`Palette`): its layers.
        on_progress (`OnProgress`, *optional*): called with (done, total, stage=…).
        **sampling: arguments of `draw_pictures`.
    """

    def __init__(
        self, pipe: DiffusionPipeline, palette: Palette, *, on_progress: OnProgress | None = None, **sampling: Any
    ) -> None:
        self.pipe, self.palette = pipe, palette
        self._draw: Callable[[], Tensor] = partial(
            draw_pictures, pipe, sampler="own", on_progress=in_stage(on_progress, "pictures"), **sampling
        )
        self._expected: Tensor | None = None

    def psnr(self, choice: Mapping[str, str]) -> float:
        """Mean over pictures of a choice's PSNR against the float model's, decibels."""
        if self._expected is None:
            self._expected = self._draw()
        with quantized(denoiser_of(self.pipe), self.palette, choice):
            actual = self._draw()
        return psnr_db(self._expected, actual).mean().item()


@torch.no_grad()
def step_seconds(
    samples: Samples, palette: Palette, on_progress: OnProgress | None = None
) -> tuple[float, dict[str, dict[str, float]]]:
    """Times of a step: of what is around the layers, and of each layer in each form, on this machine.

    A step runs with all layers in one form, so that norms that hand on codes are there; a layer's time is what passes
    between its call and its return. Sums of both predict a step of any mix.

    Args:
        samples (`Samples`): of its calls the first is timed.
        palette (`Palette`): of the same pipeline.
        on_progress (`OnProgress`, *optional*): called with (done, total).

    Returns:
        `tuple[float, dict[str, dict[str, float]]]`: seconds around the layers, the median over forms; layer → scheme →
        seconds.
    """
    model, first = denoiser_of(samples.pipe), samples.steps[0]
    around: list[float] = []
    layers: dict[str, dict[str, float]] = {name: {} for name in palette.layers}
    for done, form in enumerate(palette.choices, start=1):
        choice = {name: scheme_for(name, form) for name in palette.layers}
        with quantized(model, palette, choice):
            whole, own = _timed(model, list(choice), lambda: first.run(model))
        around.append(whole - sum(own.values()))
        for name, seconds in own.items():
            layers[name][choice[name]] = seconds
        if on_progress is not None:
            on_progress(done, len(palette.choices))
    return max(0.0, median(around)), layers


def _timed(model: nn.Module, names: list[str], step: Callable[[], object]) -> tuple[float, dict[str, float]]:
    """Median seconds of a step and of the calls of some of its modules."""
    started: dict[str, float] = {}
    spent: dict[str, list[float]] = defaultdict(list)
    now: dict[str, float] = {}

    def begin(name: str, *_: object) -> None:
        started[name] = time.perf_counter()

    def end(name: str, *_: object) -> None:
        now[name] = now.get(name, 0.0) + time.perf_counter() - started[name]

    handles = []
    for name in names:
        module = model.get_submodule(name)
        handles.append(module.register_forward_pre_hook(partial(begin, name)))
        handles.append(module.register_forward_hook(partial(end, name)))
    whole = []
    try:
        step()  # engines make their weights ready
        for _ in range(ROUNDS):
            now.clear()
            start = time.perf_counter()
            step()
            whole.append(time.perf_counter() - start)
            for name in names:
                spent[name].append(now.get(name, 0.0))
    finally:
        for handle in handles:
            handle.remove()
    return median(whole), {name: median(values) for name, values in spent.items()}

"""Choices that follow the timestep of a model's call: one for the whole batch, or one for each sample.

The choice of the running call is kept per thread, so several threads may use one model at once; layers read it through
the object that they share.
"""

import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from ..compat.torch import backward_pass
from ..errors import UnsupportedError

Timestep = int | float | Tensor


@dataclass(frozen=True)
class Route:
    """The choice for each sample of a call, such as its adapter.

    Args:
        index (`Tensor`, `()` or `(B,)`, int64): the choice for all samples, or for each.
        uniform (`int`, *optional*): the one choice, where it is known without looking into a tensor; None where the
            samples differ, or while compiling.
    """

    index: Tensor
    uniform: int | None = None

    def apply(self, function: Callable[[Tensor, int | Tensor], Tensor], x: Tensor, num_choices: int) -> Tensor:
        """`function(x, adapter)` for every sample with its own choice.

        Args:
            function (`Callable[[Tensor, int | Tensor], Tensor]`): keeps the order of the samples.
            x (`Tensor`, `(B * m, …)`): each sample stands `m` times in a row.
            num_choices (`int`): how many there are.

        Raises:
            UnsupportedError: the rows of `x` are no whole multiple of the samples.
        """
        if self.uniform is not None:
            return function(x, self.uniform)
        if self.index.ndim == 0:
            return function(x, self.index)
        index = self.rows(self.index, x.shape[0])
        if torch.compiler.is_compiling():  # no shapes that depend on values: compute all, keep one
            kept = function(x, 0)
            for adapter in range(1, num_choices):
                chosen = (index == adapter).view(-1, *[1] * (kept.ndim - 1))
                kept = torch.where(chosen, function(x, adapter), kept)
            return kept
        result: Tensor | None = None
        for adapter in index.unique().tolist():
            rows = (index == adapter).nonzero().flatten()
            part = function(x[rows], adapter)
            result = part.new_empty(x.shape[0], *part.shape[1:]) if result is None else result
            result[rows] = part
        return cast(Tensor, result)

    @staticmethod
    def rows(each: Tensor, number: int) -> Tensor:
        """What holds for the samples, `()` or `(B,)`, for `number` rows of which every sample has several in a row.

        Raises:
            UnsupportedError: the rows are no whole multiple of the samples.
        """
        if each.ndim == 0:
            return each
        if number % each.shape[0]:
            raise UnsupportedError(
                f"With a timestep of its own for each of {each.shape[0]} samples, a layer must see a multiple of "
                f"as many rows, but got {number}. Use one timestep per call for this model."
            )
        return each.repeat_interleave(number // each.shape[0])


class ByTimestep:
    """Abstract base of what looks up the choices of a call; a model has it as the attribute `module_name`."""

    module_name: str

    @abstractmethod
    def lookup(self, timestep: Timestep) -> Sequence[Route]:
        """The choice of each layer group at a timestep, `()` or `(B,)`."""

    def forget(self) -> None:
        """Know of no call."""
        self._running = threading.local()
        self._latest: Sequence[Route] | None = None
        self._learning: Sequence[Route] | None = None  # of the latest call with gradients

    def enter(self, timestep: Timestep) -> None:
        """Choose by this timestep from now on, in this thread."""
        self._running.routes = routes = self.lookup(timestep)
        if not torch.compiler.is_compiling():
            self._latest, self._running.backward = routes, backward_pass()

    @contextmanager
    def at(self, timestep: Timestep) -> Iterator[None]:
        """Choose by this timestep for layers that are called alone."""
        before, latest = getattr(self._running, "routes", None), self._latest
        self.enter(timestep)
        try:
            yield
        finally:
            self._running.routes, self._latest = before, latest

    def keep(self) -> Callable[[], AbstractContextManager[None]]:
        """What chooses again, in any thread, as this thread's latest call did: for what is computed anew."""
        kept = getattr(self._running, "routes", None) or self._latest

        @contextmanager
        def again() -> Iterator[None]:
            before = getattr(self._running, "routes", None), getattr(self._running, "again", False)
            self._running.routes, self._running.again = kept, True
            try:
                yield
            finally:
                self._running.routes, self._running.again = before

        return again

    def route(self, group: int = 0) -> Route:
        """The choice of this thread's latest call for a layer group.

        A thread that has made none uses the latest of all; what the backward pass computes anew, where nothing `keep`s
        the choice, that of the latest call with gradients.

        Raises:
            UnsupportedError: the model was never called.
        """
        routes = getattr(self._running, "routes", None) or self._latest
        if torch.is_grad_enabled() and not torch.compiler.is_compiling() and not getattr(self._running, "again", False):
            now = backward_pass()
            if now == -1:
                self._learning = routes
            elif getattr(self._running, "backward", -1) != now:  # else the whole model is called anew
                routes = self._learning or routes
        if routes is None:
            raise UnsupportedError(
                f"A layer that follows the timestep must know it. Call the whole model, or the layer within `with "
                f"model.{self.module_name}.at(timestep):`."
            )
        return routes[group]

    def __getstate__(self) -> dict:
        return {key: value for key, value in self.__dict__.items() if key not in ("_running", "_latest", "_learning")}

    def __setstate__(self, state: dict) -> None:
        cast(Any, super()).__setstate__(state)  # of the module that it is mixed into
        self.forget()

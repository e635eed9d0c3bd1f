"""The timestep of a model's call, wherever the model takes it and whatever it calls it."""

import functools
import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, NamedTuple, cast

import torch
from torch import nn

from ..compat.diffusers import Scheduler
from ..errors import ConfigError, UnsupportedError

NAMES = ("timestep", "timesteps", "timestep_ratio", "t", "r")
"""What models call it; the first that a model has counts."""

NEAR_THE_END, FALLEN = 0.1, 0.75
"""Shares of its highest timestep: below the one any run ends, below the other one that was stopped may."""

Timestep = int | float | torch.Tensor


class TimestepArgument(NamedTuple):
    """Where a model takes its timestep.

    Args:
        name (`str`, *optional*): of the argument; None where the model takes none.
        position (`int`): among the arguments of its forward.
    """

    name: str | None
    position: int

    def of(self, args: tuple, kwargs: dict) -> Timestep | None:
        """The timestep of a call, or that of each sample; None where there is none.

        Of models that take one for each token it is a sample's highest: tokens of a given picture are told 0.
        """
        timestep = self.given(args, kwargs)
        several = isinstance(timestep, torch.Tensor) and timestep.ndim > 1
        return timestep.flatten(1).amax(1) if several else timestep  # type: ignore[union-attr]

    def given(self, args: tuple, kwargs: dict) -> Timestep | None:
        """What a call has in this argument, if that is a timestep."""
        timestep = kwargs.get(self.name)
        if timestep is None and 0 <= self.position < len(args):
            timestep = args[self.position]
        return cast(Timestep, timestep) if isinstance(timestep, (Real, torch.Tensor)) else None

    def put(self, args: tuple, kwargs: dict, timestep: Timestep) -> tuple[tuple, dict]:
        """The arguments of the same call at another timestep."""
        if kwargs.get(self.name) is not None:
            return args, kwargs | {self.name: timestep}
        return (*args[: self.position], timestep, *args[self.position + 1 :]), kwargs


def timestep_argument(model: nn.Module | type[nn.Module]) -> TimestepArgument:
    """Where a model, or a class of models, takes its timestep."""
    cls: Any = model if isinstance(model, type) else type(model)
    return _argument_of(cls)


@functools.cache
def _argument_of(cls: type[nn.Module]) -> TimestepArgument:
    names = list(inspect.signature(cls.forward).parameters)[1:]
    name = next((name for name in NAMES if name in names), None)
    return TimestepArgument(name, -1 if name is None else names.index(name))


def require_timesteps(model: nn.Module) -> TimestepArgument:
    """Where the model takes its timestep.

    Raises:
        UnsupportedError: it takes none.
    """
    argument = timestep_argument(model)
    if argument.name is None:
        raise UnsupportedError(
            f"What follows the timestep needs a model that takes a `timestep`, but {type(model).__name__} takes none."
        )
    return argument


class Telling(NamedTuple):
    """A way in which models are told a scheduler's timestep t: `start + scale * told = t`.

    Args:
        scale, start (`float`): of the equation.
        lost (`float`): how far off t may be, where an integer is made of what is told, or bfloat16.
    """

    scale: float
    start: float
    lost: float


def tellings(trained: float) -> Sequence[Telling]:
    """As it is; its share of the training's timesteps, as Flux is told; what is missing to all, as Z-Image and Lumina.

    Args:
        trained (`float`): timesteps of the training; 0 where the scheduler says none.
    """
    share = 2**-8 * trained
    return (
        Telling(1.0, 0.0, min(1.0, share) if trained else 1.0),
        Telling(trained, 0.0, share),
        Telling(-trained, trained, share),
    )


def telling_of(scheduler: Scheduler, given: float, trained: float) -> Telling | None:
    """How a pipeline tells its denoiser the timestep, by what it gives in its first call; None for no known way.

    Args:
        scheduler (`SchedulerMixin`): as the pipeline has set it.
        given (`float`): to the denoiser.
        trained (`float`): timesteps of the training.
    """
    own = torch.as_tensor(scheduler.timesteps, device="cpu").double().flatten()
    first = own[getattr(scheduler, "begin_index", None) or 0 :][:1]
    for telling in tellings(trained):
        meant = telling.start + telling.scale * given
        if bool(((first - meant).abs() <= telling.lost + 0.01 * abs(meant)).any()):
            return telling
    later = bool(((own - given).abs() <= 0.01 * abs(given)).any())  # a pipeline may begin there
    return tellings(trained)[0] if later else None


def first_timestep(timestep: Timestep | None) -> float:
    """Of a call with one for all its samples; NaN where it has none."""
    return math.nan if timestep is None else float(torch.as_tensor(timestep, device="cpu").flatten()[0])


@dataclass
class Run:
    """A denoising run as far as it has come, by the timesteps of its calls."""

    last: float | None = None
    falls: int = 0
    first: float | None = None
    highest: float | None = None
    repeated: int = 0

    def go_on(self, now: float) -> None:
        """Take the timestep of its next call."""
        if self.last is None or self.first is None:
            self.first = now
        else:
            self.falls += now < self.last
            self.repeated = self.repeated + 1 if now == self.last else 0
        self.last, self.highest = now, max(now, now if self.highest is None else self.highest)

    def is_over(self, now: float, *, stopped: bool = True) -> bool:
        """Whether a call at this timestep begins another run: it rises near the end, or before that most of the way.

        Samplers rise on the way, too: by less than one where they have midpoints, by a few steps in RePaint. None comes
        back to its highest, as a model does that serves only the beginning of runs.

        Args:
            stopped (`bool`): whether it may also have been stopped before its end.
        """
        last, first, highest = self.last, self.first, self.highest
        if last is None or first is None or highest is None:
            return False
        if self.has_risen and now <= first:
            return stopped
        if not self.falls:
            return False
        rise = now - last
        if stopped and rise > 0 and now >= highest and self.falls > 1:
            return True
        if last <= NEAR_THE_END * highest:
            return rise > highest / 500
        return stopped and last <= FALLEN * highest and rise > (highest - last) / 2

    @property
    def has_risen(self) -> bool:
        """Whether it counts upwards."""
        return self.first is not None and self.last is not None and not self.falls and self.last > self.first


def check_timesteps(timesteps: list[float], num_timesteps: int) -> None:
    """Refuse a sampler whose timesteps a table over 0 … T - 1 cannot tell apart.

    Raises:
        ConfigError: a timestep outside the table, or two in one entry.
    """
    outside = [t for t in timesteps if not -1 <= t <= num_timesteps]
    if outside or len({round(t) for t in timesteps}) < len(set(timesteps)):
        raise ConfigError(
            f"The router's table has one entry for each of {num_timesteps} training timesteps, but this sampler calls "
            f"the model with {timesteps[0]:g} … {timesteps[-1]:g}, which it cannot tell apart. Use fewer steps, a "
            f"scheduler with discrete timesteps, or `num_adapters=1`, which needs no table."
        )

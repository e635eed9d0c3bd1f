"""The timestep of a model's call, wherever the model takes it."""

import inspect
from numbers import Real

import torch
from torch import nn

UNKNOWN = -1


def timestep_position(model: nn.Module) -> int:
    """Position of `timestep` among the arguments of the model's forward; `UNKNOWN` where it has none."""
    names = list(inspect.signature(type(model).forward).parameters)[1:]
    return names.index("timestep") if "timestep" in names else UNKNOWN


def timestep_of(position: int, args: tuple, kwargs: dict) -> int | float | torch.Tensor | None:
    """The timestep of a call; None where there is none."""
    timestep = kwargs.get("timestep")
    if timestep is None and 0 <= position < len(args):
        timestep = args[position]
    return timestep if isinstance(timestep, (Real, torch.Tensor)) else None

"""What stands on a model and follows the timestep, by name, and the hook that tells it the timestep of a call."""

import functools
from collections.abc import Callable
from contextlib import ExitStack
from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..compat.accelerate import onloaded
from ..compat.diffusers import checkpointing, set_checkpointing
from ..compat.torch import pre_hooks, remove_hooks
from ..compat.wrappers import forget_compiled
from ..errors import ConfigError, StateError
from ..numerics.route import Timestep
from ..sampling.timestep import TimestepArgument

if TYPE_CHECKING:
    from .talora import RoutingTable
    from .temporal import FiniteSet

ROUTER = "timestep_router"
"""Where a model has `methods.talora.RoutingTable`."""
FINITE_SET = "temporal_set"
"""Where a model has `methods.temporal.FiniteSet`."""


class RouteHook:
    """Forward pre-hook that looks up the choices of the coming call.

    Args:
        argument (`TimestepArgument`): where the model takes its timestep.
        module_name (`str`): where the model has what knows them.
    """

    def __init__(self, argument: TimestepArgument, module_name: str) -> None:
        self.argument, self.module_name = argument, module_name

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        """Enter the call's timestep."""
        timestep = self.argument.of(args, kwargs)
        if timestep is None:
            raise ConfigError(
                f"{type(model).__name__} has layers that follow the timestep, so each call must have a `timestep`, but "
                f"got none."
            )
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            _keep_choices(model)
        self.enter(model, timestep)

    def enter(self, model: nn.Module, timestep: Timestep) -> None:
        """Choose by a timestep from now on."""
        known = getattr(model, self.module_name)
        with onloaded(known):
            known.enter(timestep)


class KeepingChoices:
    """Gradient checkpointing that computes each part of a model anew with the choices of its call.

    Args:
        function (`Callable`): that checkpoints a part, `(part, *args)`.
        model (`nn.Module`): that the part is in.
    """

    def __init__(self, function: Callable, model: nn.Module) -> None:
        self.function, self.model = function, model

    def __call__(self, part: Callable, *args: Any, **kwargs: Any) -> Any:
        """As the function."""
        tables = [table for table in (routing_of(self.model), finite_set_of(self.model)) if table is not None]
        if not tables or torch.compiler.is_compiling():
            return self.function(part, *args, **kwargs)
        kept = [table.keep() for table in tables]

        @functools.wraps(part if isinstance(part, FunctionType) else type(part).__call__)
        def again(*args: Any, **kwargs: Any) -> Any:
            with ExitStack() as stack:
                for each in kept:
                    stack.enter_context(each())
                return part(*args, **kwargs)

        return self.function(again, *args, **kwargs)


def _keep_choices(model: nn.Module) -> None:
    """Nobody tells parts that are computed anew the timestep of their call."""
    for module in model.modules():
        function = checkpointing(module)
        if function is not None and not isinstance(function, KeepingChoices):
            set_checkpointing(module, KeepingChoices(function, model))


def enter_timestep(model: nn.Module, timestep: Timestep) -> None:
    """Let a model's layers, which are called alone, choose by this timestep as in a call of the whole model."""
    for hook in pre_hooks(model):
        if isinstance(hook, RouteHook):
            hook.enter(model, timestep)


def remove_route_hooks(model: nn.Module, module_name: str) -> None:
    """Look up nothing at this place any more."""
    if remove_hooks(model, lambda hook: isinstance(hook, RouteHook) and hook.module_name == module_name):
        forget_compiled()


def routing_of(model: nn.Module) -> "RoutingTable | None":
    """The model's `RoutingTable`; None without adapters."""
    return getattr(model, ROUTER, None)


def distinct_timesteps(model: nn.Module) -> list[float]:
    """Timesteps of which each chooses other weights or parameters, or computes what others have stored."""
    routing, finite_set = routing_of(model), finite_set_of(model)
    found: list[float] = []
    if routing is not None:
        chosen = dict(zip(map(tuple, routing.table.T.tolist()), range(routing.num_timesteps), strict=False))
        found += [float(timestep) for timestep in chosen.values()]
    if finite_set is not None:
        known = finite_set.timesteps.tolist()
        found += [known[0], known[0] + 0.5]  # in the set, and beside it
    return found


def require_full_strength(model: nn.Module, what: str) -> None:
    """Refuse what would be wrong for a model whose adapters are disabled or scaled.

    Args:
        what (`str`): is not possible then, with its first letter in upper case.

    Raises:
        StateError: they are.
    """
    routing = routing_of(model)
    if routing is None or routing.strength == 1:
        return
    state = f"scaled by {routing.scale:g}" if routing.enabled else "disabled"
    raise StateError(
        f"{what} needs adapters as they were trained, but those of this {type(model).__name__} are {state}. Call "
        f"`pipe.enable_talora()` and `pipe.set_talora_scale(1)`, or take them off with `pipe.unload_talora()`."
    )


def finite_set_of(model: nn.Module) -> "FiniteSet | None":
    """The model's `FiniteSet`; None without temporal maintenance."""
    return getattr(model, FINITE_SET, None)


def maintained_layers(model: nn.Module) -> set[str]:
    """Names of the layers that temporal maintenance has rounded or given parameters for each timestep."""
    finite_set = finite_set_of(model)
    return set() if finite_set is None else {*finite_set.plan.block, *finite_set.plan.sets}

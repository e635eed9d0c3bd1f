"""Put a finite set of timesteps on a quantized model, and take it off.

The model gets a submodule `temporal_set` with the timesteps and a forward pre-hook; layers get parameter sets of their
input or features of their own, and ask the set's running route.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ...compat.wrappers import forget_compiled
from ...errors import CheckpointError
from ...formats import FPFormat
from ...layers import QuantLayer
from ...layers.convert import layers_by_name, prepare_layers
from ...numerics.route import Timestep
from ...sampling.timestep import TimestepArgument, require_timesteps
from ..routes import RouteHook, finite_set_of, remove_route_hooks
from . import FeatureTable, FiniteSet, TemporalPlan


class SetHook(RouteHook):
    """`RouteHook` that leaves out cached features where users' adapters on the block would change them."""

    def __init__(self, argument: TimestepArgument, block: tuple[str, ...]) -> None:
        super().__init__(argument, FiniteSet.module_name)
        self.block = block

    def enter(self, model: nn.Module, timestep: Timestep) -> None:
        """Choose by a timestep from now on."""
        finite_set = cast(FiniteSet, finite_set_of(model))
        finite_set.cached = all(isinstance(model.get_submodule(name), QuantLayer) for name in self.block)
        super().enter(model, timestep)


def attach_sets(model: nn.Module, plan: TemporalPlan, timesteps: Tensor, features: Mapping[str, Tensor]) -> None:
    """Put the set on the model and point the plan's layers to it, which have their parameter sets already.

    Args:
        timesteps (`Tensor`, `(S,)`, float32): ascending.
        features (`Mapping[str, Tensor]`): `(S, C)` of each layer that is cached.
    """
    argument = require_timesteps(model)
    finite_set, layers = FiniteSet(timesteps), layers_by_name(model)
    finite_set.plan = plan
    for name, table in features.items():
        layers[name].recall = FeatureTable(table)
    for name in plan.layers:
        layers[name].route_by(finite_set)
    setattr(model, FiniteSet.module_name, finite_set)
    model.register_forward_pre_hook(SetHook(argument, plan.block if plan.cached_layers() else ()), with_kwargs=True)
    forget_compiled()
    prepare_layers(model)


def plan_of(model: nn.Module) -> TemporalPlan | None:
    """The layers that a model's finite set serves; None without one."""
    finite_set = finite_set_of(model)
    return None if finite_set is None else finite_set.plan


def temporal_skeleton(model: nn.Module, plan: TemporalPlan) -> None:
    """Make room for a checkpoint's parameter sets, features and timesteps in a model without weights.

    Raises:
        CheckpointError: a layer that is not quantized, or has adapters.
    """
    layers = layers_by_name(model)
    for name in plan.layers:
        layer = layers.get(name)
        if layer is None or (name in plan.sets and layer.input_format is None):
            raise CheckpointError(
                f"config.json says that `{name}` follows a set of timesteps, but {type(model).__name__} has no "
                f"quantized {'layer' if layer is None else 'input'} there: not its checkpoint."
            )
        if layer.routing is not None:
            raise CheckpointError(f"In config.json `{name}` has adapters and follows a set of timesteps: damaged file.")
        if name in plan.sets:
            layer.expect_input(cast(FPFormat, layer.input_format), num_sets=plan.num_timesteps)
    size = plan.num_timesteps
    features = {
        name: torch.empty(size, layers[name].logical_shape[0], dtype=getattr(torch, dtype), device="meta")
        for name, dtype in plan.cached_layers().items()
    }
    attach_sets(model, plan, torch.empty(size, device="meta"), features)


def detach_sets(model: nn.Module) -> None:
    """Take the set and the features off; layers with parameter sets must be calibrated or decoded afterwards."""
    finite_set = finite_set_of(model)
    if finite_set is None:
        return
    for layer in layers_by_name(model).values():
        layer.recall = None
        if layer.routing is finite_set:
            layer.route_by(None)
    delattr(model, FiniteSet.module_name)
    remove_route_hooks(model, FiniteSet.module_name)

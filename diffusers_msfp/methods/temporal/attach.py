"""Put a finite set of timesteps on a quantized model, and take it off.

The model gets a submodule `temporal_set` with the timesteps and a forward pre-hook; layers get parameter sets of their
input or features of their own, and ask the set's running route.
"""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor, nn

from ...compat.hooks import has_global_hooks, is_changed
from ...compat.torch import tensors_of
from ...compat.wrappers import forget_compiled
from ...errors import CheckpointError, StateError
from ...formats import FPFormat
from ...layers import QuantLayer
from ...layers.convert import layers_by_name, prepare_layers
from ...numerics.route import Timestep
from ...sampling.timestep import TimestepArgument, require_timesteps
from ..routes import RouteHook, finite_set_of, remove_route_hooks
from . import FeatureTable, FiniteSet, TemporalPlan


class SetHook(RouteHook):
    """`RouteHook` that leaves out cached features where what they were computed with has changed, or is to learn."""

    def __init__(self, argument: TimestepArgument) -> None:
        super().__init__(argument, FiniteSet.module_name)

    def enter(self, model: nn.Module, timestep: Timestep) -> None:
        """Choose by a timestep from now on."""
        finite_set = cast(FiniteSet, finite_set_of(model))
        finite_set.cached = not _is_disturbed(model, finite_set.plan) and features_hold(model, finite_set)
        super().enter(model, timestep)


def _is_disturbed(model: nn.Module, plan: TemporalPlan) -> bool:
    """Whether somebody's hook or own `forward` stands where stored features come from: they are without it.

    What this package hangs there to look, and what moves tensors, changes nothing.
    """
    if not plan.cached or torch.compiler.is_compiling():
        return False
    found = {"": model}
    for name in plan.surroundings:
        outer, _, own = name.rpartition(".")
        found[name] = getattr(found[outer], own)
    between = [child for each in found.values() for child in each.children() if not tensors_of(child)]  # activations
    around = [module for module in found.values() if module is not model]
    return has_global_hooks() or any(is_changed(module, "diffusers_msfp") for module in (*around, *between))


def basis_of(model: nn.Module, plan: TemporalPlan) -> dict[str, Tensor]:
    """Tensors that stored features were computed with and that others than methods change, by name."""
    if not plan.cached:
        return {}
    biases = {f"{name}.bias": cast(QuantLayer, model.get_submodule(name)).bias for name in plan.block}
    found = {name: bias for name, bias in biases.items() if bias is not None}
    for name in plan.upstream:
        module = model.get_submodule(name)
        found |= {f"{name}.{own}": each for own, each in (*module.named_parameters(), *module.named_buffers())}
    return found


def keep_basis(model: nn.Module) -> None:
    """From now on, stored features serve as long as what they were computed with stays as it is."""
    finite_set = finite_set_of(model)
    if finite_set is not None:
        basis = basis_of(model, finite_set.plan)
        known = not any(tensor.is_meta for tensor in basis.values())
        finite_set.basis = {name: tensor.detach().clone() for name, tensor in basis.items()} if known else None


def features_hold(model: nn.Module, finite_set: FiniteSet) -> bool | Tensor:
    """Whether stored features are what the model would compute; a tensor `()` where that needs a look at values."""
    plan = finite_set.plan
    if plan.cached and not all(isinstance(model.get_submodule(name), QuantLayer) for name in plan.block):
        return False  # users' adapters
    basis = basis_of(model, plan)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in basis.values()):
        return False
    if finite_set.basis is None and not torch.compiler.is_compiling():
        keep_basis(model)
    before = finite_set.basis
    if before is None:
        return True
    if before.keys() != basis.keys() or any(basis[name].shape != each.shape for name, each in before.items()):
        return False
    same = [
        (basis[name] == each.to(basis[name].device)).all() for name, each in before.items() if not basis[name].is_meta
    ]
    return torch.stack([each.to(finite_set.timesteps.device) for each in same]).all() if same else True


def require_features(model: nn.Module) -> None:
    """Refuse to save features that are not those of the model, which would be taken for them after loading.

    Raises:
        StateError: what they were computed with has changed.
    """
    finite_set = finite_set_of(model)
    with torch.no_grad():
        holds = finite_set is None or bool(features_hold(model, finite_set))
    if not holds:
        raise StateError(
            f"The temporal features that are stored must be those of the model, but biases of this "
            f"{type(model).__name__}, or float modules before them, were changed since. Put these back, or take the "
            f"features off with `calibrate(pipe)` and maintain them anew."
        )


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
    model.register_forward_pre_hook(SetHook(argument), with_kwargs=True)
    keep_basis(model)
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

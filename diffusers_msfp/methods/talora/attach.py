"""Put timestep-aware adapters on a quantized model, and take them off.

The model gets a submodule `timestep_router` with the table, and a forward pre-hook, the only place that looks at the
timestep; its layers get banks or adapters and ask the table's running route.
"""

import torch
from torch import Tensor, nn

from ...compat.wrappers import forget_compiled
from ...errors import CheckpointError, UnsupportedError
from ...layers import QuantLayer
from ...layers.convert import layers_by_name, plain_name, prepare_layers
from ...sampling.timestep import require_timesteps
from ..correction.table import CORRECTION
from ..routes import ROUTER, RouteHook, remove_route_hooks, routing_of
from . import AdapterBank, AdapterPlan, RoutingTable


def connect(model: nn.Module, plan: AdapterPlan, table: Tensor) -> None:
    """Put the table on the model and point every layer with adapters to it.

    Args:
        table (`Tensor`, `(groups, T)`, uint8): see `RoutingTable`.
    """
    argument = require_timesteps(model)
    routing = RoutingTable(table, plan.num_adapters)
    routing.plan = plan
    layers = layers_by_name(model)
    for name in plan.rank_of():
        layers[name].route_by(routing, plan.group_of(name))
    setattr(model, ROUTER, routing)
    model.register_forward_pre_hook(RouteHook(argument, ROUTER), with_kwargs=True)
    forget_compiled()
    prepare_layers(model)


def plan_of(model: nn.Module) -> AdapterPlan | None:
    """A model's timestep-aware adapters; None without."""
    routing = routing_of(model)
    return None if routing is None else routing.plan


def prepare_skeleton(model: nn.Module, plan: AdapterPlan, dtype: torch.dtype = torch.float16) -> None:
    """Make room for a checkpoint's banks, adapters and table in a model without weights.

    Raises:
        CheckpointError: a layer that is not quantized.
    """
    layers = layers_by_name(model)
    for name, rank in plan.rank_of().items():
        layer = layers.get(name)
        if layer is None:
            raise CheckpointError(
                f"config.json says that `{name}` has adapters, but {type(model).__name__} has no quantized layer "
                f"there: not its checkpoint."
            )
        if plan.placement == "merged":
            layer.make_room(plan.num_adapters)
            if layer.input_format is not None:
                layer.expect_input(layer.input_format)
        else:
            size = layer.logical_shape, plan.num_adapters, rank, layer.input_format is not None
            layer.adapters = AdapterBank(*size, dtype, reads=plan.reads)
    connect(model, plan, torch.empty(plan.groups, plan.num_timesteps, dtype=torch.uint8, device="meta"))


def disconnect(model: nn.Module) -> None:
    """Take adapters beside the weights off; the model is what it was without them.

    Raises:
        UnsupportedError: they are merged into the weights.
    """
    refuse_merged(model, "Unloading")
    for layer in model.modules():
        if isinstance(layer, QuantLayer) and layer.adapters is not None:
            layer.route_by(None)
            layer.adapters = None
    if routing_of(model) is not None:
        delattr(model, ROUTER)
    remove_route_hooks(model, ROUTER)
    prepare_layers(model)


def refuse_merged(model: nn.Module, what: str) -> None:
    """Refuse what needs a base to fall back to.

    Raises:
        UnsupportedError: the adapters are merged into the weights.
    """
    if any(layer.num_banks > 1 for layer in layers_by_name(model).values()) or (
        routing_of(model) is not None and all(layer.adapters is None for layer in layers_by_name(model).values())
    ):
        raise UnsupportedError(
            f"{what} is not possible for merged adapters: each is a packed weight of its own, and there is no base "
            f"without them. Use a checkpoint that was fine-tuned with `placement='side'`."
        )


def adapter_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Adapters beside the weights and what goes with them, by the names they have in the model's state dict."""
    own = {plain_name(key): value for key, value in model.state_dict().items()}
    return {key: value for key, value in own.items() if goes_with_adapters(key)}


def goes_with_adapters(key: str) -> bool:
    """Whether a tensor of a model is one of its adapters, the router's table, or a correction fitted with them."""
    return key == f"{ROUTER}.table" or ".adapters." in key or key.startswith(f"{CORRECTION}.")

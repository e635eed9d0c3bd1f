"""Attaching users' adapters: completely, or not at all.

PEFT replaces layers one by one and marks the model before it knows whether all of them fit; an error in the middle
leaves a model of any kind half changed. The methods of a quantized model (`add_adapter`, `load_lora_adapter`,
`load_adapter`) put everything back. PEFT's own functions (`inject_adapter_in_model`, `get_peft_model`) never ask the
model's methods, so for them PEFT's behaviour stays: nothing is changed where the first layer is refused.
"""

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import INCLUDE_LINEAR_LAYERS_SHORTHAND
from torch import nn

from ...compat.diffusers import forget_widened_weights, widened_weights
from ...errors import UnsupportedError
from ...layers import QuantLayer, SplitLayer
from ...layers.convert import plain_name
from ...layers.logical import LogicalWeight

_CONTAINERS = (dict, OrderedDict, list, set)


@contextmanager
def all_or_nothing(model: nn.Module, changed_in_place: str | None = None, *, only_try: bool = False) -> Iterator[None]:
    """Put the modules, flags, `requires_grad` and config of a model back as they were if the body raises.

    Tensors are not copied: what is attached stands beside the model's own, which nobody can write.

    Args:
        changed_in_place (`str`, *optional*): an adapter whose tensors the body may write; these are copied.
        only_try (`bool`): put them back in any case.
    """
    modules = [(module, dict(vars(module)), _contents(vars(module))) for module in model.modules()]
    trained = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = vars(model.config) if hasattr(getattr(model, "config", None), "__dict__") else {}
    said = dict(config)
    written = [
        (tensor, tensor.detach().clone())
        for name, tensor in model.named_parameters()
        if changed_in_place is not None and f".{changed_in_place}." in name
    ]

    def put_back() -> None:
        for module, attributes, contents in modules:
            vars(module).clear()
            vars(module).update(attributes)
            for key, content in contents.items():
                _refill(attributes[key], content)
        for parameter, requires_grad in trained:
            parameter.requires_grad_(requires_grad)
        _refill(config, said)
        with torch.no_grad():
            for tensor, value in written:
                tensor.data = value

    try:
        yield
    except BaseException:
        put_back()
        raise
    if only_try:
        put_back()


def _contents(attributes: dict) -> dict:
    return {key: type(value)(value) for key, value in attributes.items() if type(value) in _CONTAINERS}


def _refill(container: Any, content: Any) -> None:
    """The same object with other contents: hooks and views hold on to it."""
    container.clear()
    container.extend(content) if isinstance(container, list) else container.update(content)


def leave_out_parts(model: nn.Module, config: Any) -> None:
    """Let `target_modules="all-linear"` mean whole layers, not also the parts of split ones.

    Args:
        config (`PeftConfig`): gets the names, as PEFT itself writes them there.
    """
    inner = {
        f"{name}.{child}"
        for name, module in model.named_modules()
        if isinstance(module, (SplitLayer, BaseTunerLayer))
        for child, _ in cast(nn.Module, module).named_modules()
        if child
    }
    split = any(isinstance(module, SplitLayer) for module in model.modules())
    if split and str(getattr(config, "target_modules", None)).lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND:
        wholes = {name: getattr(module, "base_layer", module) for name, module in model.named_modules()}
        linears = {name for name, layer in wholes.items() if isinstance(layer, nn.Linear)}
        config.target_modules = linears - inner


def refuse_widened(model: nn.Module) -> None:
    """Refuse a control LoRA of Flux for which the pipeline has just put a wider float layer in a quantized one's place.

    Raises:
        UnsupportedError: the quantized layer is back in its place then.
    """
    layers = [
        cast(QuantLayer, weight.layer)
        for weight in widened_weights(model).values()
        if isinstance(weight, LogicalWeight)
    ]
    if not layers:
        return
    names = {plain_name(name): name for name, module in model.named_modules() if type(module) is nn.Linear}
    for layer in layers:
        model.set_submodule(names[layer.module_name], layer)
    config = cast(Any, model).config
    for key, value in config.items():
        if getattr(config, key, value) is not value:
            setattr(config, key, value)
    forget_widened_weights(model)
    module_names = ", ".join(f"`{layer.module_name}`" for layer in layers)
    raise UnsupportedError(
        f"A LoRA must fit the layers that it adapts, but this one reads more channels than {module_names} of the "
        f"quantized "
        f"{type(model).__name__} has: a control LoRA, or one for another model. To use a control LoRA leave that "
        f"layer float, with `modules_to_not_convert={[layer.module_name for layer in layers]}`."
    )

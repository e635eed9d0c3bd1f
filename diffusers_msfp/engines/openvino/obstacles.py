"""What no graph can hold, in words. Such calls run in torch, layer by layer, and later ones come back to the graph."""

import torch
from torch import nn

from ...compat.hooks import has_dispatch_modes, has_global_hooks
from ...compat.torch import is_hooked
from ...layers import QuantLayer
from ...layers.convert import plain_name
from .call import GraphCall
from .layers import why_not

_OWN = "diffusers_msfp."
KNOWN = ("torch.", "diffusers.", _OWN, "transformers.")
"""Beginnings of modules whose classes and functions are what their names say."""
_IMAGE_PROMPTS = "IPAdapter"


def of_model(model: nn.Module, dtype: torch.dtype) -> str | None:
    """Why a model cannot be a graph now; None if it can.

    Args:
        model (`nn.Module`): with quantized layers.
        dtype (`torch.dtype`): that it computes in.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return f"it computes in {dtype}, a graph in float32 or bfloat16"
    for name, module in model.named_modules():
        place = f"`{plain_name(name)}`"
        if type(module).__module__.startswith("peft."):
            return f"{place} has adapters"
        if not f"{type(module).__module__}.".startswith(KNOWN):
            return f"{place} is a {type(module).__name__}, which is neither torch's nor diffusers'"
        if module is not model and (is_hooked(module) or "forward" in vars(module)):
            return f"somebody has put a hook, or another forward, on {place}"
        if module.training and not type(module).__module__.startswith(_OWN):  # which behave the same
            return f"{place if name else 'it'} is in training mode"
        if (obstacle := _of_processor(module)) is not None:
            return f"{place} {obstacle}"
        if isinstance(module, QuantLayer) and (obstacle := _of_layer(module, dtype)) is not None:
            return obstacle
    elsewhere = {tensor.device.type for tensor in (*model.parameters(), *model.buffers())} - {"cpu"}
    if elsewhere:
        return f"parts of it are on {', '.join(sorted(elsewhere))}, not on the CPU"
    floats = ((name, each) for name, each in model.named_parameters() if each.is_floating_point())
    bad = next((plain_name(name) for name, each in floats if not bool(torch.isfinite(each).all())), None)
    return None if bad is None else f"`{bad}` holds NaN or infinity"


def _of_processor(module: nn.Module) -> str | None:
    processor = getattr(module, "processor", None)
    if processor is None:
        return None
    cls = type(processor)
    if _IMAGE_PROMPTS in cls.__name__:
        return "attends to image prompts (IP-Adapter)"
    return (
        None if f"{cls.__module__}.".startswith(KNOWN) else f"has an attention processor of one's own, {cls.__name__}"
    )


def _of_layer(layer: QuantLayer, dtype: torch.dtype) -> str | None:
    if layer.observing:
        return f"`{layer.module_name}` is still being calibrated"
    if layer.adapters is not None and layer.routing is not None and layer.routing.strength:
        return f"`{layer.module_name}` has timestep-aware adapters beside its weight"
    return why_not(layer, dtype)


def of_call(model: nn.Module, call: GraphCall, dtype: torch.dtype) -> str | None:
    """Why a call cannot run in a graph that could hold the model; None if it can."""
    if call.obstacle is not None:
        return call.obstacle
    if torch.is_grad_enabled() and any(each.requires_grad for each in (*call.tensors, *model.parameters())):
        return "gradients are asked for (use `torch.no_grad()` to sample)"
    if torch.is_autocast_enabled("cpu"):
        return "autocast is on"
    if has_dispatch_modes() or has_global_hooks():
        return "somebody watches each operation"
    first = next((each for each in call.tensors if each.is_floating_point()), None)
    if first is None or first.dtype != dtype:
        return f"its first argument is not {dtype}, as the model"
    if not all(bool(torch.isfinite(each).all()) for each in call.tensors if each.is_floating_point()):
        return "an argument holds NaN or infinity"
    return None

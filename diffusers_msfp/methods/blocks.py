"""Parts of a model that can be trained one after the other, where the whole does not fit.

A block's inputs are those of the quantized model up to it, its targets the full-precision model's (BRECQ, arXiv
2102.05426). Only the block's own activations are kept for the backward pass.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.watch import watching_calls
from ..compat.torch import tree_leaves
from ..layers import QuantLayer
from ..layers.convert import quant_layers
from ..layers.split import whole_name
from ..sampling.trajectory import DenoisingStep


def trainable_blocks(
    model: nn.Module, kind: type[nn.Module], original: nn.Module, step: DenoisingStep
) -> dict[str, int]:
    """Names of a model's blocks with the number of trainable layers, of a kind, in each.

    In the order in which the full-precision model runs them in a call (UNets have their middle registered last); what
    does not run then is left out.
    """
    found = {name: sum(isinstance(module, kind) for module in block.modules()) for name, block in _children(model)}
    return {name: found[name] for name in _order_of_running(original, [name for name in found if found[name]], step)}


def _order_of_running(model: nn.Module, parts: Iterable[str], step: DenoisingStep) -> list[str]:
    """Those of a model's parts that run in a call, in the order in which they do."""
    order: dict[str, None] = {}
    watched = {name: model.get_submodule(name) for name in parts}
    with torch.no_grad(), watching_calls(watched, lambda name, _: order.setdefault(name)):
        step.run(model)
    return list(order)


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{key}", part) for key, part in child.named_children())
        else:
            yield name, child


class _Reached(Exception):
    """The block's call is known; the rest of the model need not run."""


def block_call(model: nn.Module, block: str, step: DenoisingStep) -> tuple[tuple, dict] | None:
    """What one block is called with, first, in a call of the model; nothing behind it is computed.

    Args:
        model (`nn.Module`): teacher or student.
        block (`str`): name of the block.
        step (`DenoisingStep`): the call.

    Returns:
        `tuple[tuple, dict]`, *optional*: its arguments; None where this call does not use the block.
    """
    seen = []

    def stop(_module: nn.Module, args: tuple, kwargs: dict) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = model.get_submodule(block).register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            step.run(model)
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0] if seen else None


def block_outputs(model: nn.Module, block: str, step: DenoisingStep, *, gradients: bool) -> list[Tensor]:
    """What one block puts out in a call of the model; nothing behind it is computed.

    Args:
        model (`nn.Module`), block (`str`), step (`DenoisingStep`): see `block_call`.
        gradients (`bool`): whether the block, and only the block, records gradients.

    Returns:
        `list[Tensor]`: its floating-point outputs.
    """
    call = block_call(model, block, step)
    if call is None:
        return []
    with torch.set_grad_enabled(gradients):
        return float_outputs(model.get_submodule(block)(*call[0], **call[1]))


def float_outputs(output: Any) -> list[Tensor]:
    """The floating-point tensors in what a module returns."""
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]


def reconstruction_units(model: nn.Module, step: DenoisingStep, *, layerwise: bool) -> dict[str, list[str]]:
    """The parts whose weights are rounded together, in the order in which the model runs them.

    Blocks are the smallest parts with a residual of their own: resnets, attentions, transformer blocks; a layer outside
    of them is a part by itself.

    Args:
        model (`nn.Module`): quantized.
        step (`DenoisingStep`): a call that shows the order.
        layerwise (`bool`): every quantized layer by itself.

    Returns:
        `dict[str, list[str]]`: name of the part → names of its quantized layers; parts that do not run are missing.
    """
    layers = dict.fromkeys(whole_name(name, layer) for name, layer in quant_layers(model))
    found = {}
    for name in _order_of_running(model, layers if layerwise else _smallest(model, ""), step):
        inner = quant_layers(model.get_submodule(name))
        found[name] = [f"{name}.{layer}" if layer else name for layer, _ in inner]
    return found


def _smallest(module: nn.Module, prefix: str) -> Iterator[str]:
    """Blocks below a module: lists of composite modules are opened, and what holds such a list."""
    for name, child in module.named_children():
        if not any(isinstance(inner, QuantLayer) for inner in child.modules()):
            continue
        lists = [part for part in child.children() if isinstance(part, nn.ModuleList)]
        if isinstance(child, nn.ModuleList) or any(
            len(list(part.children())) for each in lists for part in each if part is not None
        ):
            yield from _smallest(child, f"{prefix}{name}.")
        else:
            yield prefix + name

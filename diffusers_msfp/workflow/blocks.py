"""Parts of a model that can be trained one after the other, where the whole does not fit.

A block's inputs are those of the quantized model up to it, its targets the full-precision model's (BRECQ, arXiv
2102.05426). Only the block's own activations are kept for the backward pass.
"""

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from ..talora import Trainee
from .trajectory import DenoisingStep


def trainable_blocks(model: nn.Module) -> dict[str, int]:
    """Names of the blocks in the model's order, with the number of trainable layers in each."""
    found = {}
    for name, block in _children(model):
        trainees = sum(isinstance(module, Trainee) for module in block.modules())
        if trainees:
            found[name] = trainees
    return found


def _children(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.{key}", part) for key, part in child.named_children())
        else:
            yield name, child


class _Reached(Exception):
    """The block's call is known; the rest of the model need not run."""


def block_outputs(model: nn.Module, block: str, step: DenoisingStep, *, gradients: bool) -> list[Tensor]:
    """What one block puts out in a call of the model; nothing behind it is computed.

    Args:
        model (`nn.Module`): teacher or student.
        block (`str`): name of the block.
        step (`DenoisingStep`): the call.
        gradients (`bool`): whether the block, and only the block, records gradients.

    Returns:
        `list[Tensor]`: its floating-point outputs.
    """
    module, seen = model.get_submodule(block), []

    def stop(_module, args, kwargs) -> None:
        seen.append((args, kwargs))
        raise _Reached

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        with torch.no_grad():
            model(*step.args, **step.kwargs)
    except _Reached:
        pass
    finally:
        handle.remove()
    if not seen:
        return []  # this model does not use the block
    args, kwargs = seen[0]
    with torch.set_grad_enabled(gradients):
        output = module(*args, **kwargs)
    return [leaf for leaf in tree_leaves(output) if isinstance(leaf, Tensor) and leaf.is_floating_point()]

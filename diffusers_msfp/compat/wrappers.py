"""See through what others put around a model: `torch.compile`, data parallelism, DeepSpeed's engine, PEFT's model.

Every verb of the package begins with `sees_through`: its models come without wrappers, whole pipelines as copies whose
components have none, and nothing that is compiled runs compiled while hooks watch it.
"""

import copy
import functools
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import UnsupportedError

LEVELS = {"torch": ("_orig_mod", "module"), "deepspeed": ("module",), "peft": ("base_model", "model")}
"""Package → names under which its wrappers, modules without anything else, keep the wrapped module."""

COMPILED = "_orig_mod"


def _inside(module: object) -> nn.Module | None:
    """What a wrapper wraps; None for any other object."""
    levels = LEVELS.get(type(module).__module__.partition(".")[0])
    if levels is None or not isinstance(module, nn.Module):
        return None
    if "_fsdp_wrapped_module" in module._modules:
        raise UnsupportedError(
            f"Quantized weights cannot be cut into shards, but got {type(module).__name__}. Hand over the model "
            f"itself, or distribute it with DistributedDataParallel."
        )
    (name, child), *rest = module._modules.items() or [("", None)]
    return child if name in levels and not rest else None


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside `torch.compile`'s, `DistributedDataParallel`'s or PEFT's; any other as it is.

    Raises:
        UnsupportedError: a model in shards.
    """
    while (inner := _inside(model)) is not None:
        model = inner
    return model


def own_name(name: str) -> str:
    """A module's or tensor's name without the levels of compiled parts."""
    return name.replace(f"{COMPILED}.", "").removesuffix(f".{COMPILED}")


def without_wrappers(owner: object) -> object:
    """A model without its wrappers; a pipeline as a shallow copy whose models have none, itself if they have none."""
    if isinstance(owner, nn.Module):
        return unwrap(owner)
    if not isinstance(getattr(owner, "components", None), dict):
        return owner
    instead = {
        name: inner
        for name, part in vars(owner).items()
        if isinstance(part, nn.Module) and (inner := unwrap(part)) is not part
    }
    if not instead:
        return owner
    bare = copy.copy(owner)
    vars(bare).update(instead)
    return bare


def _models(owner: object) -> list[nn.Module]:
    components = getattr(owner, "components", None)
    parts = components.values() if isinstance(components, dict) else [owner]
    return [part for part in parts if isinstance(part, nn.Module)]


def _is_compiled(owner: object) -> bool:
    """Whether a model, or one of a pipeline's, or a part of one, runs compiled."""
    modules = (module for model in _models(owner) for module in model.modules())
    return any(COMPILED in module._modules or module._compiled_call_impl is not None for module in modules)


def forget_compiled() -> None:
    """Drop all compiled code: it does not notice that a model's hooks have changed."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()


@contextmanager
def _parts_without_wrappers(models: list[nn.Module]) -> Iterator[None]:
    """Within the block, compiled parts of a model stand in it without their wrappers."""
    found = [
        (parent, name, child)
        for model in models
        for parent in model.modules()
        for name, child in parent._modules.items()
        if child is not None and COMPILED in child._modules and _inside(child) is not None
    ]
    for parent, name, wrapper in found:
        parent._modules[name] = wrapper._modules[COMPILED]
    try:
        yield
    finally:
        for parent, name, wrapper in found:
            wrapper._modules[COMPILED] = parent._modules[name]
            parent._modules[name] = wrapper


@contextmanager
def seen_through(*owners: object, changes: bool = True) -> Iterator[tuple]:
    """Models and pipelines without wrappers, which run eagerly within the block.

    Args:
        *owners: models, pipelines and anything else, which is handed on.
        changes (`bool`): whether the block changes a model, so that compiled code must go.

    Yields:
        `tuple`: them, see `without_wrappers`.
    """
    bare = tuple(without_wrappers(owner) for owner in owners)
    if not any(_is_compiled(owner) for owner in owners):
        yield bare
        return
    try:
        models = [model for owner in bare for model in _models(owner)]
        with _parts_without_wrappers(models), torch.compiler.set_stance("force_eager"):
            yield bare
    finally:
        if changes:
            forget_compiled()


def sees_through(verb: Callable | None = None, *, changes: bool = True) -> Callable:
    """Decorate a function so that models and pipelines among its arguments come without wrappers.

    Args:
        changes (`bool`): see `seen_through`.
    """
    if verb is None:
        return functools.partial(sees_through, changes=changes)

    @functools.wraps(verb)
    def through(*args: Any, **kwargs: Any) -> Any:
        with seen_through(*args, *kwargs.values(), changes=changes) as bare:
            named = dict(zip(kwargs, bare[len(args) :], strict=True))
            return verb(*bare[: len(args)], **named)

    return through

"""Internals of accelerate (all since 1.0) and of `torch.distributed` beneath it."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from torch import nn

SET_BY_HOOKS = ("_hf_hook", "_old_forward", "forward")
"""Attributes that accelerate's hooks set on a module and bind to it."""


def only_moves(forward: Callable, module: nn.Module) -> bool:
    """Whether a module's `forward` is its class's with one of accelerate's own hooks around, which move tensors."""
    if not isinstance(forward, partial):
        return False
    below, hook = getattr(vars(module).get("_old_forward"), "__func__", None), type(vars(module).get("_hf_hook"))
    return forward.func.__module__ == hook.__module__ == "accelerate.hooks" and below is type(module).forward


def device_of_calls(module: nn.Module) -> torch.device:
    """Where a module computes: where its hook of accelerate's moves it before a call, or where it is."""
    hooks = (vars(each).get("_hf_hook") for each in module.modules())
    found = (getattr(hook, "execution_device", None) for hook in hooks)
    where = next((each for each in found if each is not None), None)
    return next(module.parameters()).device if where is None else torch.device(where)


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """While this lasts, a module that is offloaded has its tensors, though it is read and not called."""
    hook: Any = vars(module).get("_hf_hook")
    away = hook is not None and any(each.is_meta for each in (*module.parameters(False), *module.buffers(False)))
    if away:
        hook.pre_forward(module)
    try:
        yield
    finally:
        if away:
            hook.post_forward(module, None)


@contextmanager
def own_states(accelerator: Accelerator | None = None) -> Iterator[None]:
    """What makes an `Accelerator`, or asks one to prepare something, and leaves those that others have as they are.

    All accelerators of a process share a precision and the steps that they accumulate. One that is made in here keeps
    its own; what it prepares must be prepared in here too.

    Args:
        accelerator (`Accelerator`, *optional*): one that was made in here; None to make one.
    """
    kinds = AcceleratorState, GradientState
    own = ({}, {}) if accelerator is None else (vars(accelerator.state), vars(accelerator.gradient_state))
    shared = [vars(kind)["_shared_state"] for kind in kinds]
    try:
        for kind, state in zip(kinds, own, strict=True):
            kind._shared_state = state
        yield
    finally:
        for kind, state in zip(kinds, shared, strict=True):
            kind._shared_state = state


def leave_process_group(accelerator: Accelerator | None = None) -> None:
    """End trackers and the process group, if there is one; every process of it must call this.

    A process group of gloo joins its threads when it is freed, and holds the interpreter's lock while it does. A
    thread that is just about to free a reduced tensor needs that lock, and the process never ends (torch 2.13: in one
    of ten runs whose last step was a reduction). So all wait for each other, then the threads get the lock.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(0.1)  # what the threads hold cannot be asked for
    if accelerator is not None:
        accelerator.end_training()
    elif torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

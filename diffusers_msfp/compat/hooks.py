"""What others hang around modules and functions: hooks, forwards of their own, patches, modes."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._device import DeviceContext

from .accelerate import only_moves
from .diffusers import only_offloads
from .torch import is_hooked

__all__ = [
    "HOOKS",
    "has_dispatch_modes",
    "has_global_hooks",
    "home_of",
    "hooks_around",
    "is_changed",
    "is_watched",
    "share_hooks",
]

HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_AROUND = (
    *(*HOOKS, *(f"{name}_with_kwargs" for name in HOOKS), "_forward_hooks_always_called"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)


def has_global_hooks() -> bool:
    """Whether somebody watches all modules there are."""
    module: Any = nn.modules.module
    return bool(module._global_forward_hooks or module._global_forward_pre_hooks)


def is_watched(module: nn.Module) -> bool:
    """Whether anybody looks at what a module reads or gives, or runs something else in its place.

    Then it must be called as torch calls it, with what its class reads: a hook may exchange that.
    """
    return is_hooked(module) or "forward" in vars(module) or has_global_hooks()


def has_dispatch_modes() -> bool:
    """Whether somebody watches all operators, as counters and fake tensors do; a default device does not."""
    if torch._C._len_torch_dispatch_stack():
        return True
    modes = _get_current_function_mode_stack() if torch._C._len_torch_function_stack() else ()
    return not all(isinstance(mode, DeviceContext) for mode in modes)  # `torch.set_default_device`


def home_of(function: Callable) -> str:
    """The module whose code a function runs, also where it is made to look like another one (`functools.wraps`)."""
    return getattr(function, "__globals__", {}).get("__name__", "")


def hooks_around(module: nn.Module) -> Iterator[Callable]:
    """The hooks that run before and after a module."""
    for name in HOOKS:
        yield from getattr(module, name).values()


def is_changed(module: nn.Module, package: str) -> bool:
    """Whether others than a package, and than what moves tensors, may change what a module reads or gives."""
    attributes = vars(module)
    if "forward" not in attributes and not any(attributes[name] for name in HOOKS):
        return False  # as nearly always, and asked of many modules in each call
    own = all(home_of(hook).partition(".")[0] == package for hook in hooks_around(module))
    forward = attributes.get("forward")
    left = getattr(forward, "__func__", None) is type(module).forward  # by a hook that was taken off
    return not own or not (forward is None or left or only_moves(forward, module) or only_offloads(module))


def share_hooks(source: nn.Module, module: nn.Module) -> None:
    """Let the hooks around a module run around another one; their handles take them off both."""
    vars(module).update({name: vars(source)[name] for name in _AROUND})

"""Modules as torch keeps them: copies without tensors of their own, and whether anything about them has changed."""

import sys
import zlib
from collections.abc import Callable, Collection, Iterator, Sequence
from inspect import CO_OPTIMIZED
from types import FrameType
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack, _pop_mode, _push_mode

from .accelerate import SET_BY_HOOKS
from .hooks import HOOKS
from .torch import ConvNd

__all__ = [
    "BOUND",
    "TEMPLATE",
    "KeptState",
    "Snapshot",
    "bare_copy",
    "caller_of_module",
    "exchanged_methods",
    "leave_function_mode",
    "padding_ends",
    "run_without_values",
    "shadow_copy",
    "tensors_state",
    "version_of",
]

Module = TypeVar("Module", bound=nn.Module)
TEMPLATE = vars(nn.Module())
"""Attributes that every module has."""
BOUND = (*SET_BY_HOOKS, "_diffusers_hook", "_compiled_call_impl")
"""Attributes that are bound to the one module they are on: a copy of another class must not have them."""
_START = 8192
_CALLS = (nn.Module._call_impl.__code__, nn.Module._wrapped_call_impl.__code__)


def exchanged_methods(module: nn.Module) -> list[str]:
    """Methods that compute, in whose place the module itself has others: offloading, casting, patches."""
    own: Any = type(module)
    return [
        name
        for name in ("forward", "_conv_forward")
        if name in vars(module) and getattr(vars(module)[name], "__func__", None) is not getattr(own, name, None)
    ]


def run_without_values(module: nn.Module, tensors: Sequence[Tensor]) -> None:
    """Run a module on tensors that have shapes, but no values: one that looks at values raises something."""
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        module(*(mode.from_tensor(each) for each in tensors))


def bare_copy(module: nn.Module, cls: type[Module], left_out: Collection[str] = ()) -> Module:
    """A module of another class with the same plain attributes, without children, tensors and hooks."""
    made = object.__new__(cls)
    own = {name: value for name, value in vars(module).items() if name not in TEMPLATE and name not in left_out}
    vars(made).update(vars(nn.Module()) | own | {"training": module.training})
    return made


def shadow_copy(
    module: nn.Module,
    instead: Callable[[nn.Module], nn.Module | None],
    change: Callable[[Tensor], Tensor],
    left_out: Collection[str] = (),
) -> nn.Module:
    """A copy of a model that shares what is not changed, without hooks; a module that stands twice does so in the copy.

    Args:
        instead (`Callable[[nn.Module], nn.Module | None]`): another module for one of the model's; None copies it.
        change (`Callable[[Tensor], Tensor]`): applied to parameters and buffers.
        left_out (`Collection[str]`): attributes that are not copied.
    """
    made: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            other = instead(module)
            made[id(module)] = bare_copy(module, type(module), left_out) if other is None else other
            if other is None:
                new: Any = made[id(module)]
                for name, parameter in module._parameters.items():
                    own = None if parameter is None else nn.Parameter(change(parameter.detach()), requires_grad=False)
                    new._parameters[name] = own
                for name, buffer in module._buffers.items():
                    new._buffers[name] = None if buffer is None else change(buffer.detach())
                for name, child in module._modules.items():
                    new._modules[name] = None if child is None else copied(child)
        return made[id(module)]

    return copied(module)


class Snapshot:
    """A model as it is now. `holds` tells in about a microsecond for each module whether it still is the same.

    Seen are other modules, classes, attributes, hooks on parts of it, tensors, and tensors that were written into.
    Writes through `tensor.data`, as averages of weights do, are not counted by torch: floats are read whole for that,
    about 6 GB in a second, of integers (packed weights) the first bytes. Not seen is what changes within plain objects,
    but helpers, lists, dictionaries and sets.

    Args:
        model (`nn.Module`).
        transient (`Collection[str]`): attributes that may change.
        own (`Collection[str]`): attributes of the model itself, not of its parts, that may change.
        helpers (`Collection[str]`): attributes that are objects with attributes of their own, which are looked at too.
    """

    def __init__(
        self,
        model: nn.Module,
        transient: Collection[str] = (),
        own: Collection[str] = (),
        helpers: Collection[str] = (),
    ) -> None:
        self._transient = frozenset(transient)
        self._model, self._own = model, frozenset(own)
        self._modules, self._parts, tensors = [], [], []
        for module in model.modules():
            attributes: Any = vars(module)
            lasting = self._lasting(module)
            self._modules.append((module, type(module), lasting))
            held: Any = module
            plain = [value for name, value in lasting.items() if name not in TEMPLATE]
            for part in (held._modules, held._parameters, held._buffers):
                if part:
                    self._parts.append((part, dict(part)))
            if module is not model:
                self._parts += [(getattr(held, name), dict(getattr(held, name))) for name in HOOKS]
            for name in helpers:
                if hasattr(attributes.get(name), "__dict__"):
                    self._parts.append((vars(attributes[name]), dict(vars(attributes[name]))))
                    plain += vars(attributes[name]).values()
            self._parts += [(each, type(each)(each)) for each in plain if type(each) in (list, dict, set)]
            tensors += [each for value in plain for each in _tensors_in(value)]
            tensors += [
                each for part in (held._parameters, held._buffers) for each in part.values() if each is not None
            ]
        self._tensors = [(each, version_of(each), each.data_ptr()) for each in tensors if each.device.type == "cpu"]
        self._memory = [(array, zlib.crc32(array.data)) for array in map(_memory, (each for each, *_ in self._tensors))]

    def _lasting(self, module: nn.Module) -> dict:
        attributes: Any = vars(module)
        left_out = self._transient | self._own if module is self._model else self._transient
        if left_out.isdisjoint(attributes):
            return attributes.copy()
        return {name: value for name, value in attributes.items() if name not in left_out}

    def holds(self) -> bool:
        """Whether the model is as it was."""
        try:
            for module, cls, attributes in self._modules:
                now: Any = vars(module)
                if type(module) is not cls or (now != attributes and self._lasting(module) != attributes):
                    return False
            if not all(part == before for part, before in self._parts):
                return False
        except (RuntimeError, TypeError, ValueError):  # tensors and arrays that are compared are others
            return False
        if not all(version_of(each) == version and each.data_ptr() == at for each, version, at in self._tensors):
            return False
        return all(zlib.crc32(array.data) == before for array, before in self._memory)


def _tensors_in(value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple, dict)):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _tensors_in(each)


def _memory(tensor: Tensor) -> np.ndarray:
    """The bytes that a snapshot reads of a tensor: of floats all from the first to the last, of others the start."""
    if not tensor.is_floating_point() or not tensor.numel():
        return _start(tensor)
    length = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.detach().as_strided((length,), (1,)).view(torch.uint8).numpy()


def _start(tensor: Tensor) -> np.ndarray:
    """The first bytes of a tensor's own memory: all of a bias or norm."""
    flat = tensor.detach().as_strided((min(tensor.numel(), _START // tensor.element_size()),), (1,))
    return flat.view(torch.uint8).numpy()


def state_of(tensor: Tensor) -> tuple:
    """Unequal where another tensor is meant, or this one was written to; through `.data`, what its first bytes show."""
    start = _start(tensor).tobytes() if tensor.device.type == "cpu" else b""
    return version_of(tensor), tensor.data_ptr(), start


def version_of(tensor: Tensor) -> int:
    """How often a tensor was changed in place; 0 for those made under `inference_mode`, which do not count."""
    return 0 if tensor.is_inference() else tensor._version


class KeptState:
    """A module as it is, with copies of its tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self._attributes = module, dict(vars(module))
        self._held = {name: dict(vars(module)[name]) for name in ("_parameters", "_buffers", "_modules")}
        self._tensors = [(tensor, tensor.detach().clone()) for tensor in (*module.parameters(), *module.buffers())]

    def put_back(self) -> None:
        """Let the module be as it was."""
        vars(self.module).clear()
        vars(self.module).update(self._attributes)
        for name, held in self._held.items():
            vars(self.module)[name].clear()
            vars(self.module)[name].update(held)
        for tensor, before in self._tensors:
            tensor.data.copy_(before)


def tensors_state(module: nn.Module) -> list[tuple[int, int | str]]:
    """Unequal where one of its own tensors was exchanged, as offloading does, or written to, but through `.data`.

    Of accelerators the device alone counts, since what is offloaded has another address there each time.
    """
    state: list[tuple[int, int | str]] = []
    for own in (module._parameters, module._buffers):  # asked in every call of every layer
        for each in own.values():
            if each is not None:
                place = each.data_ptr() if each.is_cpu else str(each.device)
                state.append((0 if each.is_inference() else each._version, place))
    return state


def caller_of_module() -> tuple[object, str]:
    """`self` and package of whoever called the module whose `forward` asks for it, two calls from here."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code in _CALLS:
        frame = frame.f_back
    if frame is None:
        return None, ""
    known = frame.f_locals
    owner = known.get("self")
    if sys.version_info < (3, 13) and frame.f_code.co_flags & CO_OPTIMIZED:
        known.clear()  # a copy, which would hold the caller's tensors until it returns
    return owner, frame.f_globals.get("__name__") or ""


def leave_function_mode(mode: TorchFunctionMode) -> None:
    """Take a mode off this thread's stack, wherever it is; those that were entered after it stay."""
    later = []
    while mode in _get_current_function_mode_stack():
        if (last := _pop_mode()) is not mode:
            later.append(last)
    for each in reversed(later):
        _push_mode(each)


def padding_ends(layer: ConvNd) -> list[int]:
    """A convolution's padding as `F.pad` takes it: `(left, right, top, bottom)`.

    Zeros follow what `padding` and `dilation` are now; other modes what they were when the layer was made, as in torch.
    """
    if layer.padding_mode != "zeros":
        return list(layer._reversed_padding_repeated_twice)
    if not isinstance(layer.padding, str):
        return [end for end in reversed(layer.padding) for _ in range(2)]
    sizes = zip(reversed(layer.dilation), reversed(layer.kernel_size), strict=True)
    whole = [dilation * (size - 1) if layer.padding == "same" else 0 for dilation, size in sizes]
    return [end for size in whole for end in (size // 2, size - size // 2)]

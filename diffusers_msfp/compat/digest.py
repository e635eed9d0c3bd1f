"""A name for all that a model computes with."""

import functools
import hashlib
import types
from collections.abc import Collection
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UnsupportedError
from .modules import TEMPLATE

__all__ = ["digest_of"]

_SIMPLE = (bool, int, float, complex, str, bytes, range, slice, type(None), torch.dtype, torch.device, PurePath)


def digest_of(
    model: nn.Module, known: Collection[str], left_out: Collection[str] = (), helpers: Collection[str] = ()
) -> str:
    """SHA-256 of all that a model computes with: classes, plain attributes and tensors, equal in every process.

    Args:
        model (`nn.Module`).
        known (`Collection[str]`): beginnings of modules whose classes and functions their names say all about.
        left_out (`Collection[str]`): attributes that do not count.
        helpers (`Collection[str]`): attributes that are objects with attributes of their own, which count too.

    Raises:
        UnsupportedError: it holds an object or function of another module, of which nothing can be said.
    """
    digest = hashlib.sha256()
    described = _Description(frozenset(model.modules()), tuple(known), frozenset(left_out), tuple(helpers))
    for name, module in model.named_modules(remove_duplicate=False):
        digest.update(f"{name}:{_class_name(type(module))}".encode())
        digest.update(repr(described.of_module(name, module)).encode())
        own: Any = module
        for key, tensor in (*own._parameters.items(), *own._buffers.items()):
            if tensor is not None:
                digest.update(f"{key}:{_of_tensor(tensor)}".encode())
    return digest.hexdigest()


def _class_name(value: Any) -> str:
    return f"{value.__module__}.{value.__qualname__}"


def _of_tensor(tensor: Tensor) -> str:
    plain = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return f"{tensor.dtype}{tuple(tensor.shape)}{hashlib.sha256(plain.numpy().data).hexdigest()}"


@dataclass(frozen=True)
class _Description:
    """Plain attributes in words, equal in every process.

    Args:
        modules (`frozenset[nn.Module]`): of the model, which describes them elsewhere.
        known (`tuple[str, ...]`), left_out (`frozenset[str]`), helpers (`tuple[str, ...]`): see `digest_of`.
    """

    modules: frozenset[nn.Module]
    known: tuple[str, ...]
    left_out: frozenset[str]
    helpers: tuple[str, ...]

    def of_module(self, name: str, module: nn.Module) -> dict[str, str]:
        """A module's attributes; of helpers theirs too.

        Raises:
            UnsupportedError: see `digest_of`.
        """
        own: Any = vars(module)
        found = {key: value for key, value in own.items() if key not in TEMPLATE and key not in self.left_out}
        for helper in self.helpers:
            if hasattr(own.get(helper), "__dict__"):
                found |= {f"{helper}.{key}": value for key, value in vars(own[helper]).items()}
        described = {"training": repr(own["training"])}
        for key in sorted(found):
            try:
                described[key] = self.of(found[key])
            except UnsupportedError as error:
                raise UnsupportedError(f"`{f'{name}.{key}'.lstrip('.')}` holds {error}") from None
        return described

    def of(self, value: Any) -> str:
        """Any value.

        Raises:
            UnsupportedError: see `digest_of`; the message names the value alone.
        """
        if isinstance(value, _SIMPLE):
            return repr(value)
        if isinstance(value, Tensor):
            return _of_tensor(value)
        if isinstance(value, (list, tuple)):
            return f"[{', '.join(map(self.of, value))}]"
        if isinstance(value, (set, frozenset)):
            return f"[{', '.join(sorted(map(self.of, value)))}]"
        if isinstance(value, dict):  # such as a config, whose own names and origin begin with `_`
            kept = sorted((str(key), each) for key, each in value.items() if key not in self.left_out)
            return repr([(key, self.of(each)) for key, each in kept if not key.startswith("_")])
        if isinstance(value, functools.partial):
            return f"{self.of(value.func)}({self.of(value.args)}, {self.of(value.keywords)})"
        if isinstance(value, types.MethodType):
            return f"{self.of(value.__func__)}({self.of(value.__self__)})"
        return self._of_object(value)

    def _of_object(self, value: Any) -> str:
        named = value if isinstance(value, (type, types.FunctionType, types.BuiltinFunctionType)) else type(value)
        is_known = f"{named.__module__ or 'torch'}.".startswith(("builtins.", *self.known))  # torch's in C have none
        if not is_known or (isinstance(value, nn.Module) and value not in self.modules):
            raise UnsupportedError(f"{_class_name(named)}, of which nothing is known")
        if isinstance(value, types.FunctionType):
            return f"{_class_name(value)}{self.of([each.cell_contents for each in value.__closure__ or ()])}"
        if isinstance(value, Enum):
            return f"{_class_name(named)}.{value.name}"
        if is_dataclass(value) and not isinstance(value, type):
            return f"{_class_name(named)}{self.of([getattr(value, each.name) for each in fields(value)])}"
        return _class_name(named)

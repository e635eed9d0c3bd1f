"""A model's call as a graph sees it: tensors in a fixed order, and what they are arguments of; its output likewise."""

import functools
import importlib
import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiTTransformer2DModel, UNet2DConditionModel, UNet2DModel
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from ...compat.torch import tree_flatten_with_path, tree_unflatten
from ...sampling.timestep import timestep_argument


@functools.cache
def _signature(cls: Any) -> inspect.Signature:
    return inspect.signature(cls.forward)


_FLOAT_TIMES = (UNet2DModel, UNet2DConditionModel, DiTTransformer2DModel)
"""Models that make floats of their timestep before all else."""


@dataclass(frozen=True)
class GraphCall:
    """The arguments of one call.

    Args:
        tensors (`list[Tensor]`): in the order of the model's signature.
        names (`list[str]`): of the tensors; of one in a dictionary its own, in a sequence with its number.
        arguments (`Callable[[Sequence[Tensor]], dict]`): the keyword arguments with other tensors in their places.
        key (`str`): all of it but the values of tensors.
        obstacle (`str`, *optional*): why no graph can have such arguments.
        as_tuple (`bool`): the output is asked for as a tuple, `return_dict=False`, of what is otherwise its fields.
    """

    tensors: list[Tensor]
    names: list[str]
    leaves: tuple[Any, ...]
    spec: Any
    key: str
    obstacle: str | None
    as_tuple: bool = False

    def arguments(self, tensors: Sequence[Tensor]) -> dict:
        """The keyword arguments with other tensors in the places of these."""
        rest = iter(tensors)
        return tree_unflatten([next(rest) if isinstance(each, Tensor) else each for each in self.leaves], self.spec)

    @classmethod
    def of(cls, model: nn.Module, args: tuple, kwargs: dict, *, float_times: bool = False) -> "GraphCall":
        """Of the arguments as the model got them.

        Args:
            float_times (`bool`): timesteps as float32, where the model begins with that: one graph, whatever a
                scheduler has.

        Raises:
            TypeError: the model has no such arguments.
        """
        kind: Any = type(model)
        bound = _signature(kind).bind(model, *args, **kwargs)
        usual = {name: each.default for name, each in bound.signature.parameters.items()}
        items = list(bound.arguments.items())[1:]
        given = {name: value for name, value in items if value is not None or usual[name] is not None}
        given |= given.pop("kwargs", {})
        as_tuple = usual.get("return_dict") is True and not given.pop("return_dict", True)
        when = timestep_argument(model).name
        if isinstance(given.get(when), (int, float)):  # type: ignore[arg-type]
            given[when] = torch.tensor(given[when], device="cpu")  # type: ignore[index]
        told = given.get(when)  # type: ignore[arg-type]
        if float_times and isinstance(told, Tensor) and isinstance(model, _FLOAT_TIMES):
            given[when] = told.to(torch.float32)  # type: ignore[index]
        found, spec = tree_flatten_with_path(given)
        leaves, names, obstacle, parts = [], [], None, []
        for path, value in found:
            name = given_name(path)
            leaves.append(value)
            if isinstance(value, Tensor):
                names.append(_own_name(path))
                parts.append(f"{value.dtype}{list(value.shape)}")
                if value.device.type != "cpu" or value.is_complex() or type(value) not in (Tensor, nn.Parameter):
                    obstacle = obstacle or f"`{name}` is no plain tensor on the CPU"
            elif isinstance(value, bool) or value is None:
                parts.append(repr(value))
            else:
                obstacle = obstacle or f"`{name}` holds {type(value).__name__}, not tensors alone"
        tensors = [each for each in leaves if isinstance(each, Tensor)]
        return cls(tensors, names, tuple(leaves), spec, f"{spec} {parts}", obstacle, as_tuple)


def given_name(path: Sequence[Any]) -> str:
    """The argument that a leaf belongs to."""
    return str(getattr(path[0], "key", path[0]))


def _own_name(path: Sequence[Any]) -> str:
    keys = [getattr(step, "key", getattr(step, "idx", step)) for step in path]
    last = max(place for place, key in enumerate(keys) if isinstance(key, str))
    return "_".join(map(str, keys[last:]))


@dataclass(frozen=True)
class OutputForm:
    """What a model returns, apart from the tensors.

    Args:
        kind (`str`): `tensor`, `tuple`, or the class of an output of diffusers, with its module.
        fields (`list[str]`): of the class: those that hold a tensor.
        number (`int`): of the tensors.
    """

    kind: str
    fields: list[str]
    number: int

    @classmethod
    def of(cls, output: Any) -> "OutputForm":
        """Of an output.

        Raises:
            TypeError: it holds something else than tensors.
        """
        if isinstance(output, Tensor):
            return cls("tensor", [], 1)
        if isinstance(output, BaseOutput):
            form = cls(
                f"{type(output).__module__}:{type(output).__qualname__}", list(output.keys()), len(output.keys())
            )
        elif isinstance(output, tuple):
            form = cls("tuple", [], len(output))
        else:
            raise TypeError(f"it returns {type(output).__name__}")
        if not all(isinstance(each, Tensor) for each in form.tensors(output)):
            raise TypeError("it returns something else than tensors")
        return form

    def tensors(self, output: Any) -> list[Tensor]:
        """Those of an output of this form."""
        if self.kind == "tensor":
            return [output]
        return [output[name] for name in self.fields] if self.fields else list(output)

    def filled(self, tensors: Sequence[Tensor]) -> Any:
        """An output of this form."""
        if self.kind == "tensor":
            return tensors[0]
        if self.kind == "tuple":
            return tuple(tensors)
        module, _, name = self.kind.partition(":")
        return getattr(importlib.import_module(module), name)(**dict(zip(self.fields, tensors, strict=True)))

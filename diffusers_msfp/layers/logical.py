"""What others read as a quantized layer's `weight`: shape and dtype of the float weight, decoded when computed with.

Foreign code asks a layer's weight for its dtype to cast inputs (attention processors, adapters), for its shape (LoRA
loaders), and for its numbers (DoRA's norms, LoHa's and OFT's products). A packed tensor would mislead it in all three,
without an error. So the packed codes are the parameter `packed_weight`, and `weight` answers for the float weight.

A wrapper subclass as the parameter itself (as torchao has it) was weighed and left: every library that moves, offloads,
counts or saves parameters would have to go through it, while plain bytes pass through all of them unchanged.
"""

import copy
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, SupportsIndex, cast

import numpy as np
import torch
from torch import Tensor, nn

from ..compat.peft import asked_by_peft, asked_to_average
from ..compat.torch import bias_of, empty_shell, shares_memory, tree_map, written_arguments
from ..errors import UnsupportedError

_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class LogicalWeight(Tensor):
    """The float weight that a quantized layer stands for; read-only.

    Shape, dtype and device cost nothing; every operation decodes it anew. Made by the layer at each access of `weight`.
    What shows a part of it (`weight[0]`, `weight.view(-1)`) is as little to be written.

    Args:
        decode (`Callable[[], Tensor]`): the float32 weight of this shape.
        shape (`tuple[int, ...]`): of the float weight.
        dtype (`torch.dtype`): that the layer computes in.
        device (`torch.device`): of the codes.
        module_name (`str`): the layer's name, for messages.
        strides (`tuple[int, ...]`, *optional*): contiguous if not given.
    """

    _is_hf_initialized = True  # transformers fills other weights with noise after it has loaded them

    @staticmethod
    def __new__(
        cls,
        decode: Callable[[], Tensor],
        shape: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        module_name: str,
        strides: Sequence[int] | None = None,
    ) -> Any:
        """An empty shell; nothing is decoded."""
        return empty_shell(cls, shape, dtype, device, strides)

    def __init__(
        self,
        decode: Callable[[], Tensor],
        shape: Sequence[int],  # noqa: ARG002
        dtype: torch.dtype,  # noqa: ARG002
        device: torch.device,  # noqa: ARG002
        module_name: str,
        strides: Sequence[int] | None = None,  # noqa: ARG002
    ) -> None:
        self._decode, self._module_name = decode, module_name

    @property
    def layer(self) -> nn.Module | None:
        """The layer whose weight it is; None if it was made without one."""
        return getattr(self._decode, "__self__", None)

    def decoded(self) -> Tensor:
        """A float tensor of one's own."""
        return self._decode().to(self.dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares the bound form
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:  # noqa: ARG003
        """Compute with the decoded weight; refuse to write into it."""
        kwargs = kwargs or {}
        if func in _ALIASES:
            weight = args[0]
            kind = weight.shape, weight.dtype, weight.device
            return cls(weight._decode, *kind, weight._module_name, weight.stride())
        for written in written_arguments(func, args, kwargs):
            if isinstance(written, cls):
                written.refuse()
        plain = tree_map(_plain, args)
        result = func(*plain, **tree_map(_plain, kwargs))
        if args and isinstance(args[0], cls):
            return tree_map(lambda part: args[0]._part(part) if shares_memory(part, plain[0]) else part, result)
        return result

    def _part(self, part: Tensor) -> Tensor:
        """What shows a part of it."""
        name = self._module_name
        return type(self)(lambda: part, part.shape, part.dtype, part.device, name, part.stride())

    def refuse(self) -> None:
        """Say that it cannot be written."""
        raise UnsupportedError(
            f"The weight of `{self._module_name}` is packed and cannot be written, but something tried to. To change "
            f"or fuse weights call `model.dequantize()` first; adapters can stay beside them."
        )

    def requires_grad_(self, requires_grad: bool = True) -> Tensor:
        """As of any tensor, with True refused: the next access of the weight would know nothing of it."""
        if requires_grad:
            self._refuse_training()
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "requires_grad" and value:
            self._refuse_training()
        super().__setattr__(name, value)

    def _refuse_training(self) -> None:
        raise UnsupportedError(
            f"The weight of `{self._module_name}` is packed, so it cannot be trained. Train adapters: "
            f"`diffusers_msfp.finetune(pipe, teacher)`, or PEFT's by `model.add_adapter(LoraConfig(…))`."
        )

    @property
    def data(self) -> Tensor:
        """The same weight; assigning to it is refused."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:  # noqa: ARG002
        self.refuse()

    def numpy(self, *, force: bool = False) -> np.ndarray:
        """The decoded weight as an array."""
        return self.decoded().numpy(force=force)

    def tolist(self) -> list:
        """The decoded weight as lists."""
        return self.decoded().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.decoded()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.decoded().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch's own has no annotations
        return f"LogicalWeight of `{self._module_name}`: {self.decoded()}"


class PackedLayer(nn.Module, ABC):
    """Abstract base of layers that have a float weight only to be read.

    PEFT trains copies of layers (`modules_to_save`, `LNTuningConfig`), and builds a convolution's LoRA as two layers of
    its class, `type(base_layer)(…)`. Codes cannot be trained, so what PEFT makes either way is a float layer. All other
    copies are packed, and nobody else can call the constructor.
    """

    float_class: type[nn.Module]
    module_name: str
    if TYPE_CHECKING:  # attributes of some layers and properties of others

        @property
        def packed_weight(self) -> Tensor:
            """The codes."""

        @property
        def weight_dtype(self) -> torch.dtype:
            """Of the float weight."""

        @property
        def logical_shape(self) -> tuple[int, ...]:
            """Of the float weight; output channels first."""

    def __new__(cls, *sizes: Any, **more: Any) -> Any:
        """An empty object, for `copy` and `pickle`; for PEFT a float layer.

        Raises:
            UnsupportedError: somebody else calls the constructor.
        """
        if not sizes and not more:
            return super().__new__(cls)
        if not asked_by_peft():
            raise UnsupportedError(
                f"A {cls.__name__} must be made of a float layer, which has the weights, but its constructor was "
                f"called with sizes. Quantize a model, or use `{cls.float_class.__name__}` for a float layer."
            )
        return cls.float_class(*sizes, **more)

    @abstractmethod
    def decode_whole(self) -> Tensor:
        """The float weight, float32, `logical_shape`."""

    @property
    def weight(self) -> Tensor:
        """The float weight, `logical_shape`, in the model's dtype."""
        return self._logical()

    @weight.setter
    def weight(self, value: Tensor) -> None:
        if not isinstance(value, LogicalWeight) or value.layer is not self:  # PEFT gives it back when it unloads
            self._logical().refuse()

    def _logical(self) -> LogicalWeight:
        bias = bias_of(self)
        dtype = self.weight_dtype if bias is None else bias.dtype
        return LogicalWeight(self.decode_whole, self.logical_shape, dtype, self.packed_weight.device, self.module_name)

    @abstractmethod
    def float_copy(self) -> nn.Module:
        """A float layer with the decoded weight, of the model's dtype, and a bias of its own.

        Raises:
            UnsupportedError: it has no single weight, or more than a weight.
        """

    def __getstate__(self) -> dict:
        return cast(dict, super().__getstate__())  # without what `torch.compile` has bound to it

    def __deepcopy__(self, memo: dict) -> nn.Module:
        if asked_by_peft():
            return self.float_copy()
        if asked_to_average():
            raise UnsupportedError(
                f"An `AveragedModel` averages all parameters, but the packed weight of `{self.module_name}` is codes, "
                f"averages of which are others. Average what is trained alone: `EMAModel(parameters)` of diffusers."
            )
        layer = memo[id(self)] = type(self).__new__(type(self))
        layer.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return layer

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module; `weight` is refused."""
        if name == "weight":
            self._logical().refuse()
        super().register_parameter(name, param)


def _plain(value: Any) -> Any:
    return value.decoded() if isinstance(value, LogicalWeight) else value


class ReadableState(OrderedDict[str, Any]):
    """A state dict that also answers to the float weights' names, for loaders of LoRA files that look up shapes.

    Only `state["layer.weight"]` does; iteration, length and `in` know the tensors that are there. Copies and pickles
    are plain state dicts.

    Args:
        state (`Mapping[str, Tensor]`): of the model.
        model (`nn.Module`, *optional*): whose weights are read while it lives; None for what others make of such a
            state dict.
    """

    def __init__(
        self, state: Mapping[str, Any] | Iterable[tuple[str, Any]] = (), model: nn.Module | None = None
    ) -> None:
        super().__init__(state)
        self._metadata = getattr(state, "_metadata", OrderedDict())
        self._model = None if model is None else weakref.ref(model)  # a state dict keeps no model

    def __missing__(self, key: str) -> Tensor:
        module_name, _, tensor = key.rpartition(".")
        try:
            asked = self._model() if tensor == "weight" and self._model is not None else None
            weight = None if asked is None else asked.get_submodule(module_name).weight
        except AttributeError:
            weight = None
        if isinstance(weight, LogicalWeight):
            return weight
        raise KeyError(key)

    def copy(self) -> Any:
        """A plain state dict."""
        state = OrderedDict(self)
        vars(state).update(_metadata=self._metadata)
        return state

    def __copy__(self) -> OrderedDict:
        return self.copy()

    def __reduce__(self) -> tuple:
        return OrderedDict, (), {"_metadata": self._metadata}, None, iter(self.items())

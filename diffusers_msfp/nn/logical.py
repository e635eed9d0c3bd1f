"""What others read as a quantized layer's `weight`: shape and dtype of the float weight, decoded when computed with.

Foreign code asks a layer's weight for its dtype to cast inputs (attention processors, adapters), for its shape (LoRA
loaders), and for its numbers (DoRA's norms, LoHa's and OFT's products). A packed tensor would mislead it in all three,
without an error. So the packed codes are the parameter `packed_weight`, and `weight` answers for the float weight.

A wrapper subclass as the parameter itself (as torchao has it) was weighed and left: every library that moves, offloads,
counts or saves parameters would have to go through it, while plain bytes pass through all of them unchanged.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..compat.torch import tree_map
from ..errors import UnsupportedError

_ALIASES = (torch.ops.aten.detach.default, torch.ops.aten.alias.default)


class LogicalWeight(Tensor):
    """The float weight that a quantized layer stands for; read-only.

    Shape, dtype and device cost nothing; every operation decodes it anew. Made by the layer at each access of `weight`.

    Args:
        decode (`Callable[[], Tensor]`): the float32 weight of this shape.
        shape (`tuple[int, ...]`): of the float weight.
        dtype (`torch.dtype`): that the layer computes in.
        device (`torch.device`): of the codes.
        place (`str`): the layer's name, for messages.
    """

    _is_hf_initialized = True  # transformers fills other weights with noise after it has loaded them

    @staticmethod
    def __new__(cls, decode: Callable[[], Tensor], shape, dtype: torch.dtype, device: torch.device, place: str):
        """An empty shell; nothing is decoded."""
        return Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device, requires_grad=False)

    def __init__(self, decode: Callable[[], Tensor], shape, dtype: torch.dtype, device, place: str) -> None:  # noqa: ARG002
        self._decode, self._place = decode, place

    def decoded(self) -> Tensor:
        """A float tensor of one's own."""
        return self._decode().to(self.dtype)

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):  # noqa: ARG003
        """Compute with the decoded weight; refuse to write into it."""
        kwargs = kwargs or {}
        if func in _ALIASES:
            weight = args[0]
            return cls(weight._decode, weight.shape, weight.dtype, weight.device, weight._place)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            written = argument.alias_info is not None and argument.alias_info.is_write
            if written and isinstance(value, cls):
                value.refuse()
        return func(*tree_map(_plain, args), **tree_map(_plain, kwargs))

    def refuse(self) -> None:
        """Say that it cannot be written."""
        raise UnsupportedError(
            f"The weight of `{self._place}` is packed and cannot be written, but something tried to. To change or fuse "
            f"weights call `model.dequantize()` first; adapters can stay beside them."
        )

    @property
    def data(self) -> Tensor:
        """The same weight; assigning to it is refused."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:  # noqa: ARG002
        self.refuse()

    def numpy(self, *, force: bool = False):
        """The decoded weight as an array."""
        return self.decoded().numpy(force=force)

    def tolist(self) -> list:
        """The decoded weight as lists."""
        return self.decoded().tolist()

    def __deepcopy__(self, memo) -> Tensor:
        return self.decoded()

    def __reduce_ex__(self, protocol):
        return self.decoded().__reduce_ex__(protocol)

    def __repr__(self, **_) -> str:
        return f"LogicalWeight of `{self._place}`: {self.decoded()}"


class PackedLayer(nn.Module):
    """Abstract base of layers that have a float weight only to be read."""

    place: str
    packed_weight: Tensor
    weight_dtype: torch.dtype
    logical_shape: tuple[int, ...]

    def decode_whole(self) -> Tensor:
        """The float weight, float32, `logical_shape`."""
        raise NotImplementedError

    @property
    def weight(self) -> LogicalWeight:
        """The float weight, `logical_shape`, in the model's dtype."""
        dtype = self.weight_dtype if self.bias is None else self.bias.dtype
        return LogicalWeight(self.decode_whole, self.logical_shape, dtype, self.packed_weight.device, self.place)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As of any module; `weight` is refused."""
        if name == "weight":
            self.weight.refuse()
        super().register_parameter(name, param)


def _plain(value):
    return value.decoded() if isinstance(value, LogicalWeight) else value

"""Codes on their way from the module that made them to the layer that they were made for."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from ..compat.torch import tree_map, without_functions


class Codes(Tensor):
    """An input that is quantized already: bytes, `x ≈ (byte - zero) * unit`.

    Only the layer that they were made for takes the bytes. To everybody else – a hook, a module that somebody put in
    between, an active dropout – they are the quantized floats that they stand for: any operation, `dtype` among them,
    decodes them first. Quantizing these again gives the same codes. Whether a tensor holds codes is told by its type;
    a tensor of integers from elsewhere is never taken for codes.

    Attributes:
        reader (`object`): the layer that they were made for.
        adapter (`int`): whose grid they are on, see `QuantLayer.input_qparams`.
        float_dtype (`torch.dtype`): of the floats that they stand for.
        unit (`float`), zero (`int`): the grid.
    """

    reader: object
    adapter: int
    float_dtype: torch.dtype
    unit: float
    zero: int

    @classmethod
    def wrap(cls, values: Tensor, reader: object, adapter: int, dtype: torch.dtype, unit: float, zero: int) -> "Codes":
        """Bytes, uint8 of any shape, with what they mean."""
        codes = values.as_subclass(cls)
        codes.__dict__.update(reader=reader, adapter=adapter, float_dtype=dtype, unit=unit, zero=zero)
        return codes

    def bytes(self) -> Tensor:
        """The plain tensor, uint8."""
        with without_functions():
            return self.as_subclass(Tensor)

    def decoded(self) -> Tensor:
        """The floats that they stand for."""
        return ((self.bytes().to(torch.float32) - self.zero) * self.unit).to(self.float_dtype)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ARG003
        """Any operation sees floats; a dropout that does nothing lets codes pass."""
        kwargs = kwargs or {}
        if getattr(func, "__name__", "") == "dropout" and kwargs.get("training") is False:
            return args[0]
        return func(*tree_map(_floats, args), **tree_map(_floats, kwargs))

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return self.decoded()

    def __reduce_ex__(self, protocol: SupportsIndex) -> Any:
        return self.decoded().__reduce_ex__(protocol)


def _floats(value: Any) -> Any:
    return value.decoded() if isinstance(value, Codes) else value

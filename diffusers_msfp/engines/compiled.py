"""A layer made ready as one operator of a compiled model, `diffusers_msfp::run_layer`.

The compiler does not look into the operator, and what the operator needs, such as oneDNN's packed weights, no graph can
hold. So a `LayerReference` is one of the graph's inputs: compiled code reads it off the layer at each call, as it reads
a weight. Nothing is kept in a table: a copy of a layer has a reference of its own, blocks of one kind share one graph,
and a layer that was made ready anew, or freed, leaves nothing behind that could run in its place.
"""

import weakref
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from ..compat.torch import Opaque, opaque_inside, register_opaque
from ..errors import UnsupportedError
from ..numerics.route import Route

if TYPE_CHECKING:
    from .engine import PreparedLayer


class LayerReference(Opaque):
    """A prepared layer as an operator's argument. It does not keep the layer, for compiled graphs keep their arguments.

    A copy or a pickle refers to no layer; compilers make them to look for a graph of the same `sizes` on disk.

    Args:
        prepared: a `PreparedLayer`, which makes one reference for itself.

    Attributes:
        sizes (`str`): all that a graph takes from the layer: what the shape of its output goes by.
    """

    sizes: str
    _prepared: "weakref.ref[PreparedLayer] | None" = None

    def __init__(self, prepared: "PreparedLayer") -> None:
        layer = prepared.layer
        self.refer(prepared)
        self.sizes = f"{type(layer).__name__}({layer.float_class.extra_repr(layer)})"

    def refer(self, prepared: "PreparedLayer") -> None:
        """Stand for a layer, which may be another one made of the same `QuantLayer`."""
        self._prepared = weakref.ref(prepared)

    def prepared(self) -> "PreparedLayer":
        """The layer.

        Raises:
            UnsupportedError: it has changed or gone since, or this is a copy.
        """
        prepared = None if self._prepared is None else self._prepared()
        if prepared is None:
            raise UnsupportedError(
                f"A compiled graph must be given layers that an engine has made ready, but the one of {self.sizes} has "
                f"been changed or freed since. Call the model instead of a graph of it."
            )
        return prepared

    def __getstate__(self) -> dict:
        return {"sizes": self.sizes}


register_opaque(LayerReference, lambda reference: [reference.sizes])


def call_layer(x: Tensor, reference: LayerReference, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
    """What a compiled model does for `PreparedLayer.run`; a tensor `(B,)` has the bank or adapter of each row."""
    index = next((each for each in (bank, adapter) if isinstance(each, Tensor)), None)
    numbers = [each if isinstance(each, int) else -1 for each in (bank, adapter)]
    return torch.ops.diffusers_msfp.run_layer(x, reference, *numbers, index)


@torch.library.custom_op("diffusers_msfp::run_layer", mutates_args=())
def run_layer(x: Tensor, reference: LayerReference, bank: int, adapter: int, index: Tensor | None) -> Tensor:
    """A prepared layer as an operator; where `bank` or `adapter` is -1, `index` says it; `(B,)` for rows."""
    prepared = reference.prepared().current()

    def run(rows: Tensor, index: Tensor | int | None) -> Tensor:
        choice = (cast("int | Tensor", index) if each < 0 else each for each in (bank, adapter))
        return prepared.run_without_autocast(rows, *choice)

    y = Route(index).apply(run, x, 0) if index is not None and index.ndim else run(x, index)
    return y.contiguous(memory_format=_memory_format(x))


@run_layer.register_fake
def _(x: Tensor, reference: LayerReference, bank: int, adapter: int, index: Tensor | None) -> Tensor:  # noqa: ARG001
    prepared = opaque_inside(reference).prepared()
    return torch.empty_like(prepared.nothing(x), memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format

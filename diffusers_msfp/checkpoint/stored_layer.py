"""A layer as far as a checkpoint's files say it, without its weights."""

from dataclasses import dataclass

import torch

from ..formats import INT8_MAX, FPFormat, largest_integer
from ..layers.skeleton import LayerGroup


@dataclass(frozen=True)
class StoredLayer:
    """What engines ask of a layer before they take it, on the CPU, as far as its files say it.

    A `Conv1d` is stored as a linear is, and passes for one.

    Args:
        has_sums (`bool`): adapters that read codes add to its weight.
    """

    weight_format: FPFormat
    input_format: FPFormat | None
    logical_shape: tuple[int, ...]
    group_size: int | None = None
    has_sums: bool = False
    packed_weight = torch.empty(0, dtype=torch.uint8)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """See `QuantLayer.matrix_shape`."""
        rows, length, *_ = self.logical_shape
        return rows, length

    @property
    def largest_weight(self) -> int:
        """See `QuantLayer.largest_weight`."""
        own = largest_integer(self.weight_format, grouped=self.group_size is not None)
        return max(own, INT8_MAX) if self.has_sums else own

    @classmethod
    def of(cls, shape: list[int], rows: int, group: LayerGroup, has_sums: bool = False) -> "StoredLayer":
        """From the shape of the packed weight, the number of output channels and what the record says."""
        length = shape[-1] * 8 // group.weight_format.bits
        logical_shape = (rows, length, 1, 1) if len(shape) == 4 else (rows, length)
        return cls(group.weight_format, group.input_format, logical_shape, group.group_size, has_sums)

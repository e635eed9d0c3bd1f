"""Quantized layers as graphs other than OpenVINO's have them: codes, a table, and products of whole numbers.

4-bit floating-point numbers are not evenly spaced, and evenly spaced ones are all that runtimes know of 4 bits. So a
graph holds a weight's codes as they are packed, and looks their lattice integers up in a table. Inputs are rounded as
in OpenVINO's graph (`engines.openvino.rounding`), products and sums are those of whole numbers, scales come behind.
"""

from abc import ABC
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.modules import bare_copy
from ..engines.engine import weight_integers, weight_unit
from ..engines.grid import are_bytes, pairs_fit_16_bits
from ..engines.openvino.layers import LEFT_OUT, GraphConv1d, GraphConv2d, GraphLayer, GraphLinear, Inputs, Quantize
from ..engines.openvino.rounding import Grid, lattice_integers
from ..formats import INT8_MAX
from ..layers import QuantLayer
from ..numerics import packed_size, unpack

PACKED_BITS = 4
"""Codes of so many bits stay packed; others take a byte each."""


def centred(x: Tensor, grid: Grid) -> Tensor:
    """`q - zero` of an input, float32: whole numbers."""
    return lattice_integers(x, grid.format, grid.inverse, float(grid.zero))


class PackedGraphLayer(GraphLayer, ABC):
    """Abstract base: a quantized layer with one bank, in float32.

    Attributes:
        stored (`Tensor`): codes, uint8, packed `(C, bytes)` or of `shape`; without a table integers, int8, of `shape`.
        table (`Tensor`, `(2**bits,)`, *optional*): the lattice integer of each code.
        factors (`Tensor`, `(C,)`, float32): of the sums of products.
        packed (`bool`): two codes in a byte; `four_bits`, whether they could be.
        shape (`tuple[int, ...]`): of the weight.
    """

    stored: Tensor
    table: Tensor | None
    factors: Tensor
    packed: bool
    four_bits: bool
    shape: tuple[int, ...]

    def forward(self, x: Tensor) -> Tensor:
        """As the quantized layer."""
        return self.scaled(self.compute(x, self.integers().to(torch.float32), None, self._rounded))

    def _rounded(self, x: Tensor) -> Tensor:
        return x if self.grid is None else self.inputs.quantize(x, self.grid, centred)

    def codes(self) -> Tensor:
        """Of the weight, uint8, one by one."""
        return unpack(self.stored, PACKED_BITS, prod(self.shape[1:])) if self.packed else self.stored

    def integers(self) -> Tensor:
        """The weight in lattice steps of its channels, `shape`, in the table's dtype."""
        if self.table is None:
            return self.stored
        return self.table.index_select(0, self.codes().to(torch.int32).reshape(-1)).view(self.shape)

    def scaled(self, sums: Tensor) -> Tensor:
        """The layer's output, float32, of sums of products of whole numbers."""
        rest = [1] * (len(self.shape) - 2)
        y = sums * self.factors.view(-1, *rest)
        return y if self.bias is None else y + self.bias.view(-1, *rest)


class PackedLinear(PackedGraphLayer, GraphLinear):  # type: ignore[misc]
    """Of a `QuantLinear`."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: Quantize) -> Tensor:
        """See `GraphLayer`; a single vector too."""
        return F.linear(quantize(x), weight, bias)


class PackedConv2d(PackedGraphLayer, GraphConv2d):  # type: ignore[misc]
    """Of a `QuantConv2d`."""


class PackedConv1d(PackedGraphLayer, GraphConv1d):  # type: ignore[misc]
    """Of a `QuantConv1d`."""


Kinds = dict[type[nn.Module], type[PackedGraphLayer]]
KINDS: Kinds = {nn.Linear: PackedLinear, nn.Conv2d: PackedConv2d, nn.Conv1d: PackedConv1d}


def keeps_packed(layer: QuantLayer) -> bool:
    """Whether a layer's codes stay packed; integers of group scales need a byte."""
    return layer.weight_format.bits == PACKED_BITS and layer.group_size is None


def stored_bytes(layer: QuantLayer) -> int:
    """What a layer's weight takes in a graph that keeps packed what can be, without its scales."""
    rows, length = layer.matrix_shape
    return rows * (packed_size(length, PACKED_BITS) if keeps_packed(layer) else length)


def packed_layer(layer: QuantLayer, inputs: Inputs, kinds: Kinds = KINDS) -> Any:
    """A quantized layer for a graph.

    Args:
        layer (`QuantLayer`): frozen, with one bank; not changed.
        inputs (`Inputs`): of the recording.
        kinds (`Kinds`): classes to make it of.
    """
    fmt, shape = layer.weight_format, tuple(layer.logical_shape)
    made = bare_copy(layer, kinds[layer.float_class], LEFT_OUT)
    grid = None if layer.input_format is None else Grid.of(layer.input_qparams())
    packed, in_bytes = keeps_packed(layer), layer.largest_weight <= INT8_MAX
    vars(made).update(
        weight=torch.empty(shape, device="meta"),  # for those who ask its dtype or shape
        inputs=inputs,
        reader=None,
        grid=grid,
        packed=packed,
        four_bits=packed,
        shape=shape,
    )
    bias = None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    table: Tensor | None = torch.tensor(fmt.code_values, dtype=torch.float32, device="cpu")
    if packed:
        stored = layer.packed_bank(0).detach().clone()
    elif in_bytes:
        stored, table = weight_integers(layer, 0, torch.tensor(fmt.code_values, dtype=torch.int8, device="cpu")), None
    else:
        stored = unpack(layer.packed_bank(0), fmt.bits, layer.matrix_shape[1]).view(shape)
    made.register_buffer("stored", stored)
    made.register_buffer("table", table)
    unit = weight_unit(layer)
    made.register_buffer("factors", unit.clone() if grid is None else unit * grid.unit)
    return made


def in_integers(layer: QuantLayer) -> bool:
    """Whether a layer's products are those of bytes, with sums that are exact on every processor."""
    read, largest = layer.input_format, layer.largest_weight
    return read is not None and are_bytes(read, largest) and pairs_fit_16_bits(read, largest)

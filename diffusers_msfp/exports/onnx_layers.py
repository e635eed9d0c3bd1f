"""Quantized layers in operators of ONNX: `ConvInteger` and `MatMulInteger`, which add products of bytes in 32 bits.

Where a processor has no instructions for it, onnxruntime adds pairs of such products in 16 bits. Layers in which a pair
may not fit (8-bit weights, group scales with 8-bit inputs) multiply in float32, in which whole numbers are exact too.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.modules import padding_ends
from ..compat.torch import ConvNd
from ..engines.openvino.layers import Inputs
from ..engines.openvino.rounding import Grid
from ..layers import QuantLayer
from .layers import (
    Kinds,
    PackedConv1d,
    PackedConv2d,
    PackedGraphLayer,
    PackedLinear,
    centred,
    in_integers,
    packed_layer,
)

_OPSET = 10  # in which both operators came


def as_bytes(x: Tensor, grid: Grid) -> Tensor:
    """Lattice integers of an input, made ≥ 0, uint8."""
    return (centred(x, grid) + float(grid.zero + grid.offset)).to(torch.uint8)


class OnnxLayer(PackedGraphLayer):
    """Abstract base: as `PackedGraphLayer`, with codes one by one, since ONNX has a 4-bit type to put them in.

    Attributes:
        in_integers (`bool`): multiplied as bytes.
        zero (`Tensor`, `()`, uint8): the byte of the real 0.
    """

    in_integers: bool
    zero: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """As the quantized layer."""
        if not self.in_integers:
            return super().forward(x)
        return self.scaled(self.multiply(x, self.integers()).to(torch.float32))

    @abstractmethod
    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """Sums of products of integers, int32, of a float input."""

    def quantize(self, x: Tensor) -> Tensor:
        """See `as_bytes`; once for layers that read one tensor with equal grids."""
        return self.inputs.quantize(x, cast(Grid, self.grid), as_bytes)


class OnnxLinear(OnnxLayer, PackedLinear):  # type: ignore[misc]
    """Of a `QuantLinear`."""

    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `OnnxLayer`."""
        return _integer_operator("MatMulInteger", self.quantize(x), weight.t(), self.zero, (*x.shape[:-1], len(weight)))


class _OnnxConvNd(OnnxLayer):
    def multiply(self, x: Tensor, weight: Tensor) -> Tensor:
        """See `OnnxLayer`; padding that is not zeros stands before the rounding."""
        layer = cast(ConvNd, self)
        single, ends = x.ndim < weight.ndim, padding_ends(layer)
        if single:
            x = x.unsqueeze(0)
        if layer.padding_mode != "zeros":
            x, ends = F.pad(x, ends, mode=layer.padding_mode), [0] * len(ends)
        starts, stops = ends[::2][::-1], ends[1::2][::-1]
        sizes = zip(x.shape[2:], starts, stops, layer.dilation, layer.kernel_size, layer.stride, strict=True)
        size = [(n + before + after - d * (k - 1) - 1) // step + 1 for n, before, after, d, k, step in sizes]
        y = _integer_operator(
            "ConvInteger",
            self.quantize(x),
            weight,
            self.zero,
            (x.shape[0], weight.shape[0], *size),
            pads=[*starts, *stops],
            strides=list(layer.stride),
            dilations=list(layer.dilation),
            group=layer.groups,
        )
        return y.squeeze(0) if single else y


class OnnxConv2d(_OnnxConvNd, PackedConv2d):  # type: ignore[misc]
    """Of a `QuantConv2d`."""


class OnnxConv1d(_OnnxConvNd, PackedConv1d):  # type: ignore[misc]
    """Of a `QuantConv1d`."""


_KINDS: Kinds = {nn.Linear: OnnxLinear, nn.Conv2d: OnnxConv2d, nn.Conv1d: OnnxConv1d}


def _integer_operator(
    name: str, x: Tensor, weight: Tensor, zero: Tensor, shape: Sequence[int], **attributes: Any
) -> Tensor:
    return torch.onnx.ops.symbolic(
        name, (x, weight, zero), attributes, dtype=torch.int32, shape=list(shape), version=_OPSET
    )


def onnx_layer(layer: QuantLayer, inputs: Inputs) -> OnnxLayer:
    """A quantized layer for a graph of ONNX; see `packed_layer`."""
    made: OnnxLayer = packed_layer(layer, inputs, _KINDS)
    made.in_integers = in_integers(layer)
    if made.packed:
        made.stored, made.packed = made.codes().view(made.shape), False
    if made.in_integers:
        made.table = None if made.table is None else made.table.to(torch.int8)
        grid = cast(Grid, made.grid)
        made.register_buffer("zero", torch.tensor(grid.zero + grid.offset, dtype=torch.uint8, device="cpu"))
    return made

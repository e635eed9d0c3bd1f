"""Quantized layers as a graph records them: plain operations, and weights as constants of 8 bits.

OpenVINO recognises `FakeQuantize` before a convolution or product whose weight is a constant of bytes times a scale,
and multiplies bytes there. What integers of 8 bits cannot hold runs as floats: an input that is not quantized, formats
whose lattice is larger (`w4a8-wide`, `w8a8-wide`), and layers with a parameter set for each timestep; so does what the
processor's kernels would add with saturation (8-bit weights without VNNI).
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...compat.modules import bare_copy, padding_ends
from ...compat.torch import ConvNd, convolve
from ...errors import UnsupportedError
from ...formats import INT8_MAX, UINT8_MAX, FPFormat
from ...layers import QuantLayer
from ..engine import weight_integers, weight_unit
from ..grid import are_bytes, largest_byte, pairs_fit_16_bits
from .choices import Choice, Reader
from .installed import products_are_exact
from .rounding import Grid, lattice_integers, quantize_as_byte
from .soundness import LARGE, Soundness, key_of_content

LEFT_OUT = ("prepared", "engine", "routing", "observation", "forward")


class Inputs:
    """What one recording of a model shares: the tensor of what the timestep chooses, and inputs quantized already.

    Layers that read the same tensor with equal grids share one rounding. What that would hide is watched.
    """

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, chosen: Tensor | None) -> None:
        """A new recording."""
        self.chosen, self.soundness = chosen, Soundness()
        self._rounded: dict[tuple, tuple[Tensor, Tensor]] = {}

    def quantize(self, x: Tensor, grid: Grid, function: Callable[[Tensor, Grid], Tensor] = quantize_as_byte) -> Tensor:
        """`function(x, grid)`, once for each tensor and grid."""
        key = key_of_content(x), grid, function
        if key not in self._rounded:
            self._rounded[key] = x, function(x, grid)  # `x` is kept, so that its id stays its own
        return self._rounded[key][1]


Quantize = Callable[[Tensor], Tensor]


class GraphLayer(nn.Module, ABC):
    """Abstract base: a quantized layer with one bank, for recording; in float32."""

    inputs: Inputs
    reader: Reader | None
    grid: Grid | None
    in_bytes: bool
    is_bounded: bool
    input_format: FPFormat | None
    weights: Tensor
    units: Tensor
    bias: nn.Parameter | None

    def forward(self, x: Tensor) -> Tensor:
        """As the quantized layer."""
        sound = self.inputs.soundness
        if self.grid is not None or (self.reader is not None and not self.reader.known):
            sound.watch(x)
        y = self._output(x)
        if self.is_bounded and self.reader is None:
            sound.trust(y)
        return y

    def _output(self, x: Tensor) -> Tensor:
        weight = self.weights
        if weight.dtype == torch.int8:  # an integer constant times a scale, as OpenVINO looks for
            weight = weight.to(torch.float32) * self.units.view(-1, *[1] * (weight.ndim - 1))
        if self.reader is not None:
            numbers = cast(Tensor, self.inputs.chosen)[self.reader.place]
            if self.reader.known:
                return numbers.expand(*x.shape[:-1], -1)
            return self._compute_as_floats(x, weight, *numbers.unbind())
        if self.in_bytes:
            return self.compute(x, weight, self.bias, lambda each: self.inputs.quantize(each, cast(Grid, self.grid)))
        if self.grid is None:
            return self.compute(x, weight, self.bias, lambda each: each)
        return self._compute_as_floats(x, weight, self.grid.inverse, float(self.grid.zero), self.grid.unit)

    def _compute_as_floats(
        self, x: Tensor, weight: Tensor, inverse: float | Tensor, zero: float | Tensor, unit: float | Tensor
    ) -> Tensor:
        """With the integers as floats, and the unit behind the product, where it does not round them."""
        fmt = cast(FPFormat, self.input_format)
        y = self.compute(x, weight, None, lambda each: lattice_integers(each, fmt, inverse, zero)) * unit
        if self.bias is None:
            return y
        return y + self.bias.view(-1, *[1] * (self.weights.ndim - 2))

    @abstractmethod
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: Quantize) -> Tensor:
        """The layer's operation."""


class GraphLinear(GraphLayer, nn.Linear):  # type: ignore[misc]  # torch infers that a linear always has a bias
    """Of a `QuantLinear`."""

    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: Quantize) -> Tensor:
        """See `GraphLayer`.

        Raises:
            UnsupportedError: `x` is a vector.
        """
        if x.ndim == 1:
            raise UnsupportedError("a linear reads a single vector, which OpenVINO may round in bfloat16")
        return F.linear(quantize(x), weight, bias)


class _GraphConvNd(GraphLayer, ConvNd):  # type: ignore[misc]
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None, quantize: Quantize) -> Tensor:
        """See `GraphLayer`; padding that is not zeros, or not the same on both sides, stands before the rounding."""
        ends = padding_ends(self)
        if self.padding_mode == "zeros" and ends[::2] == ends[1::2]:
            return convolve(self, quantize(x), weight, bias)
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = quantize(F.pad(x, ends, mode=mode))
        function: Callable[..., Tensor] = F.conv1d if len(self.kernel_size) == 1 else F.conv2d
        return function(padded, weight, bias, self.stride, 0, self.dilation, self.groups)


class GraphConv2d(_GraphConvNd, nn.Conv2d):  # type: ignore[misc]
    """Of a `QuantConv2d`."""


class GraphConv1d(_GraphConvNd, nn.Conv1d):  # type: ignore[misc]
    """Of a `QuantConv1d`."""


_KINDS: dict[type[nn.Module], type[GraphLayer]] = {
    nn.Linear: GraphLinear, nn.Conv2d: GraphConv2d, nn.Conv1d: GraphConv1d,
}  # fmt: skip


def graph_layer(layer: QuantLayer, choice: Choice, inputs: Inputs, *, in_bytes: bool | None = None) -> GraphLayer:
    """A quantized layer for recording, with the bank that was chosen.

    Args:
        layer (`QuantLayer`): frozen; not changed.
        choice (`Choice`): of the call that is recorded.
        inputs (`Inputs`): of the recording.
        in_bytes (`bool`, *optional*): whether 8-bit integers are multiplied; by default where that is exact here.
    """
    bank = choice.banks.get(layer.module_name, 0)
    made = bare_copy(layer, _KINDS[layer.float_class], LEFT_OUT)
    vars(made).update(
        weight=torch.empty(layer.logical_shape, device="meta"),  # for those who ask its dtype or shape
        inputs=inputs,
        reader=choice.readers.get(layer.module_name),
        grid=None if layer.input_format is None or layer.num_sets else Grid.of(layer.input_qparams(bank)),
        in_bytes=runs_in_bytes(layer) if in_bytes is None else in_bytes,
    )
    bias = None if layer.bias is None else layer.bias.detach().to(torch.float32, copy=True)  # see `own_float32`
    made.register_parameter("bias", None if bias is None else nn.Parameter(bias, requires_grad=False))
    made.register_buffer("weights", _integers(layer, bank) if made.in_bytes else layer.dequantize_weight(bank))
    made.register_buffer("units", weight_unit(layer))
    made.is_bounded = _is_bounded(made)
    return made


def _is_bounded(layer: GraphLayer) -> bool:
    """Whether no input can make a layer's output large: 8-bit integers cannot, unless bias or scales are."""
    if not layer.in_bytes or layer.grid is None:
        return False
    largest = layer.weights[0].numel() * UINT8_MAX * INT8_MAX * layer.grid.unit * float(layer.units.max())
    return largest < LARGE and (layer.bias is None or float(layer.bias.abs().max()) < LARGE)


def _integers(layer: QuantLayer, bank: int) -> Tensor:
    """A bank's weight in lattice steps of its channels, `logical_shape`, int8."""
    table = torch.tensor(layer.weight_format.code_values, dtype=torch.int8, device="cpu")
    return weight_integers(layer, bank, table)


def runs_in_bytes(layer: QuantLayer) -> bool:
    """Whether a graph computes a layer in 8-bit integers on this processor."""
    read, largest = layer.input_format, layer.largest_weight
    if read is None or layer.num_sets or not multiplies_bytes(read, largest):
        return False
    return largest_byte(read) * largest * layer.matrix_shape[1] < 2**31  # its sums fit 32 bits


def multiplies_bytes(read: FPFormat | None, largest_weight: int) -> bool:
    """Whether bytes hold what a layer reads (None: floats) and its weight, and this processor adds products exactly."""
    if read is None or not are_bytes(read, largest_weight):
        return False
    return pairs_fit_16_bits(read, largest_weight) or products_are_exact(largest_byte(read), largest_weight)


def why_not(layer: QuantLayer, dtype: torch.dtype) -> str | None:
    """Why a graph in this dtype cannot hold a layer exactly; None if it can."""
    fmt = layer.input_format
    if layer.float_class not in _KINDS:
        return f"no graph is known for `{layer.module_name}`, a {type(layer).__name__}"
    if dtype == torch.bfloat16 and fmt is not None and not runs_in_bytes(layer):
        zeros = {Grid.of(layer.input_qparams(each)).zero for each in range(layer.num_sets or layer.num_banks)}
        values = torch.cat([torch.tensor(fmt.lattice, dtype=torch.float32, device="cpu") - zero for zero in zeros])
        if not torch.equal(values.to(torch.bfloat16).to(torch.float32), values):
            return f"`{layer.module_name}` reads {fmt}, whose integers fit neither a byte nor bfloat16"
    return None

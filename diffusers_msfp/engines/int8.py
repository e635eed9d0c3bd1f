"""int8 (CPU): lattice integers through oneDNN's 8-bit convolution and matrix product, with exact int32 sums.

`y = unit_x * unit_w[c] * sum((q_x - k) * q_w) + bias`: inputs as unsigned bytes with a zero point, weights as signed
bytes. Real 0 is a byte too, so padding is exact.

Which product is the fastest depends on the processor and on the shape, so the ways that give the same sums are timed on
the first inputs of each shape (`tuning`): oneDNN's convolution, a product with patches, and bfloat16 products where
their float32 sums are whole numbers below 2^24, and so exact; these are rounded to bfloat16 before they are scaled.
"""

from torch import nn

from ..compat.torch import has_int8_operators
from ..formats import INT8_MAX
from ..layers import QuantLayer
from .engine import Engine
from .grid import largest_byte, low_bits
from .integers.conv import Int8Conv
from .integers.linear import Int8Linear
from .integers.products import products_are_exact

_MAX_LOW_BITS = 8


class Int8Engine(Engine):
    """8-bit integer arithmetic of a CPU."""

    name = "int8"
    measured_on = frozenset({"cpu x86_64"})

    def refusal(self, layer: QuantLayer) -> str | None:
        """See `Engine.refusal`."""
        if layer.packed_weight.device.type != "cpu":
            return f"its weight is on {layer.packed_weight.device.type}, not on the CPU"
        if not has_int8_operators():
            return "this build of torch has no 8-bit operators of oneDNN"
        if layer.input_format is None:
            return "its input is not quantized"
        if low_bits(layer.input_format) > _MAX_LOW_BITS:
            return f"its input's format {layer.input_format} does not fit two bytes"
        if layer.largest_weight > INT8_MAX:
            return f"its weight's format {layer.weight_format} does not fit 8 bits"
        largest = largest_byte(layer.input_format)
        if largest * layer.largest_weight * layer.matrix_shape[1] >= 2**31:
            return "its sums may exceed 32 bits"
        if not products_are_exact(largest, layer.largest_weight):
            return "this CPU adds pairs of such products in 16 bits"
        return None

    def prepare(self, layer: QuantLayer) -> "Int8Linear | Int8Conv":
        """See `Engine.prepare`."""
        return (Int8Linear if isinstance(layer, nn.Linear) else Int8Conv)(layer, self.memory == "fast")

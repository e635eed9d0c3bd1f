"""int8 (CPU): lattice integers through oneDNN's 8-bit convolution and matrix product, with exact int32 sums.

`y = unit_x * unit_w[c] * sum((q_x - k) * q_w) + bias`: inputs as unsigned bytes with a zero point, weights as signed
bytes. Real 0 is a byte too, so padding is exact.

**The input quantizer**: milliseconds for 1 M values (8 × 128 × 32 × 32) to bytes, float32 / bfloat16, on two cores with
AVX-512 (`tests/benchmarks/bench_quantizer.py`; these are in `model_cards/results/quantizer.json`):

| | ms | first call | needs | upkeep |
|---|---|---|---|---|
| Numba, shipped (extra `cpu`) | 0.10 / 0.13 | 0.3 s, then cached on disk | a wheel, no compiler | Python |
| C, GCC -O3 | 0.08 / 0.09 | a build | a compiler, or wheels for every system | a second language |
| `torch.compile` (Inductor) | 0.25 / 0.71 | 9 s | a C++ compiler where it runs | torch's |
| torch operators, fallback | 1.6 / 1.7 | none | nothing | Python |
| uniform `torch.quantize_per_tensor`, for comparison | 0.28 / 0.38 | none | | cannot do lattices |
| `Tensor.clone`, for comparison | 0.10 / 0.07 | none | | |

C gains a few hundredths of a millisecond in a step of more than a hundred; Numba is at the speed of a copy and needs
no compiler on the user's machine.
"""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..compat.torch import (
    has_bf16_instructions,
    has_int8_operators,
    int8_conv,
    int8_linear,
    pack_int8_conv,
    pack_int8_linear,
)
from ..formats import FPFormat
from ..layers import QuantLayer
from ..numerics import Codes
from . import kernels
from .engine import Engine, PreparedLayer, weight_integers, weight_unit
from .geometry import Geometry
from .grid import byte_offset, low_bits, output_size

_INT8_MAX, _MAX_LOW_BITS = 127, 8
_FEW_POSITIONS = 1024  # of an output, up to which a product with patches is up to twice as fast as a convolution


class Int8Engine(Engine):
    """8-bit integer arithmetic of a CPU."""

    name = "int8"

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
        if layer.largest_weight > _INT8_MAX:
            return f"its weight's format {layer.weight_format} does not fit 8 bits"
        largest = _largest_byte(layer.input_format)
        if largest * layer.largest_weight * layer.matrix_shape[1] >= 2**31:
            return "its sums may exceed 32 bits"
        if not products_are_exact(largest, layer.largest_weight):
            return "this processor adds pairs of such products in 16 bits"
        return None

    def prepare(self, layer: QuantLayer) -> "Int8Linear | Int8Conv":
        """See `Engine.prepare`."""
        return (Int8Linear if isinstance(layer, nn.Linear) else Int8Conv)(layer, self.memory == "fast")


@lru_cache
def writes(dtype: torch.dtype) -> bool:
    """Whether fast kernels write this dtype; AVX2's write bfloat16 a thousand times more slowly than float32."""
    return dtype == torch.float32 or (dtype == torch.bfloat16 and has_bf16_instructions())


def _largest_byte(fmt: FPFormat) -> int:
    bits = low_bits(fmt)
    return max((fmt.lattice_max + byte_offset(fmt)) >> bits, 2**bits - 1)


@lru_cache(maxsize=64)
def products_are_exact(largest_input: int, largest_weight: int) -> bool:
    """Whether the processor's kernels add the largest products without saturation; asked of the kernels themselves.

    Processors without VNNI add pairs of products in 16 bits: exact for 4-bit formats, not for 8-bit ones.
    """
    x = torch.full((2, 64, 3, 3), largest_input, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    ones, geometry = torch.ones(16), ((1, 1), (1, 1), (1, 1), 1)
    for value in (largest_weight, -largest_weight):
        weight = torch.full((16, 64, 1, 1), value, dtype=torch.int8)
        packed = pack_int8_conv(F.pad(weight, (1, 1, 1, 1)), ones, *geometry, x.shape)
        convolved = _conv(x, 1.0, 0, packed, ones, None, *geometry)
        multiplied = _linear(x[:, :, 0, 0].contiguous(), 1.0, 0, pack_int8_linear(weight[:, :, 0, 0]), ones, None)
        expected = float(64 * largest_input * value)
        if not bool((convolved == expected).all() and (multiplied == expected).all()):
            return False
    return True


@lru_cache(maxsize=256)
def _zeros(size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.int64)


def _linear(
    x: Tensor,
    unit: float,
    zero: int,
    packed: Tensor,
    units: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    return int8_linear(x, unit, zero, packed, units, _zeros(len(units)), bias, dtype)


def _conv(
    x: Tensor, unit: float, zero: int, packed: Tensor, units: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int,
    dtype: torch.dtype = torch.float32,
) -> Tensor:  # fmt: skip
    return int8_conv(x, unit, zero, packed, units, _zeros(len(units)), bias, stride, padding, dilation, groups, dtype)


Planes = Callable[[Tensor, int | Tensor], list[Tensor]]
"""Values and an adapter → the bytes that hold their integers."""


def _as_they_are(codes: Tensor, adapter: int | Tensor) -> list[Tensor]:  # noqa: ARG001
    return [codes]


class _Int8Layer(PreparedLayer):
    """What both kinds share: integers of the weight, and bytes of the input."""

    def __init__(self, layer: QuantLayer, keep: bool) -> None:
        super().__init__(layer, keep)
        self.units = weight_unit(layer)
        self.bias = None if layer.bias is None else layer.bias.detach().to(torch.float32)
        self._table = torch.tensor(layer.weight_format.code_values, dtype=torch.int8)

    def integers(self, bank: int) -> Tensor:
        """A bank's lattice integers, `(C, …)` int8."""
        return weight_integers(self.layer, bank, self._table)

    @property
    def reads_codes(self) -> bool:
        """Whether another module may quantize its input: to one byte a value."""
        return not low_bits(cast(FPFormat, self.layer.input_format))

    def hand_over(self, values: Tensor, adapter: int, dtype: torch.dtype) -> Codes:
        """Bytes that another module made with `grid(adapter)` from floats of this dtype, for `from_codes`."""
        return Codes.wrap(values, self.layer, adapter, dtype, *self.grid(adapter).planes[0])

    def takes(self, codes: Codes) -> bool:
        """See `PreparedLayer.takes`."""
        return self.reads_codes and [(codes.unit, codes.zero)] == self.grid(codes.adapter).planes

    def from_codes(self, codes: Codes) -> Tensor:
        """See `PreparedLayer.from_codes`."""
        bank = codes.adapter if self.layer.num_banks > 1 else 0
        return self.multiply(codes.bytes(), _as_they_are, bank, codes.adapter, codes.float_dtype)

    def run(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
        """See `PreparedLayer.run`."""
        return self.multiply(x, self.codes, bank, adapter, x.dtype)

    @abstractmethod
    def multiply(
        self, x: Tensor, planes: Planes, bank: int | Tensor, adapter: int | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """The layer's output in a dtype, for floats or for bytes on the grid of an adapter.

        Args:
            x (`Tensor`): floats, or bytes.
            planes (`Planes`): makes bytes of it, when it is laid out and padded as the kernel wants it.
        """

    def codes(self, x: Tensor, adapter: int | Tensor) -> list[Tensor]:
        """Bytes of a float input, one tensor for each of the grid's planes."""
        planes, finite = kernels.quantize(x, self.grid(adapter))
        if not finite:
            self.refuse_infinite(x)
        return planes

    def sum_of_planes(
        self, multiply: Callable[..., Tensor], codes: list[Tensor], adapter: int | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """`multiply(bytes, unit, zero, bias, dtype)` added up over the bytes that hold an integer."""
        (first, (unit, zero)), *rest = zip(codes, self.grid(adapter).planes, strict=True)
        wide = torch.float32 if rest or not writes(dtype) else dtype
        y = multiply(first, unit, zero, self.bias, wide)
        for more, (unit, zero) in rest:
            y += multiply(more, unit, zero, None, wide)
        return y.to(dtype)


class Int8Linear(_Int8Layer):
    """`nn.Linear` in 8-bit integers."""

    def expand(self, bank: int) -> Tensor:
        """See `PreparedLayer.expand`."""
        return pack_int8_linear(self.integers(bank))

    def multiply(
        self, x: Tensor, planes: Planes, bank: int | Tensor, adapter: int | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """`(*, in)` float or bytes → `(*, out)`."""
        rows = x.reshape(-1, x.shape[-1])
        if not rows.numel():
            return self.nothing(x)
        weight = self.weight(bank)

        def multiply(codes: Tensor, unit: float, zero: int, bias: Tensor | None, out: torch.dtype) -> Tensor:
            return _linear(codes, unit, zero, weight, self.units, bias, out)

        codes = planes(rows.contiguous(), adapter)
        return self.sum_of_planes(multiply, codes, adapter, dtype).view(*x.shape[:-1], -1)


class Int8Conv(_Int8Layer):
    """`nn.Conv2d` and `nn.Conv1d` in 8-bit integers, channels last."""

    def __init__(self, layer: QuantLayer, keep: bool) -> None:
        super().__init__(layer, keep)
        self.geometry = Geometry(layer)
        self._shape: tuple[int, ...] = ()

    @property
    def reads_codes(self) -> bool:
        """As for all, if the padding can be put on codes."""
        return self.geometry.ends is None and super().reads_codes

    def expand(self, bank: int, as_matrix: bool) -> Tensor:
        """See `PreparedLayer.expand`; `as_matrix` for products with patches."""
        weight, at = self.integers(bank), self.geometry
        weight = weight.unsqueeze(2) if at.flat else weight
        if as_matrix:
            return pack_int8_linear(weight.permute(0, 2, 3, 1).flatten(1))
        return pack_int8_conv(weight, self.units, at.stride, at.padding, at.dilation, at.groups, self._shape)

    def multiply(
        self, x: Tensor, planes: Planes, bank: int | Tensor, adapter: int | Tensor, dtype: torch.dtype
    ) -> Tensor:
        """`(B, in, …)` float or bytes → `(B, out, …)`."""
        if not x.numel():
            return self.nothing(x)

        def convolve(images: Tensor) -> Tensor:
            images = images.contiguous(memory_format=torch.channels_last)
            return self._convolve(images, planes, bank, adapter, dtype)

        return self.geometry.apply(convolve, x)

    def _convolve(
        self, x: Tensor, planes: Planes, bank: int | Tensor, adapter: int | Tensor, dtype: torch.dtype
    ) -> Tensor:
        size, groups = self.geometry.kernel_size, self.geometry.groups
        at = self.geometry.stride, self.geometry.padding, self.geometry.dilation
        rows, width = output_size(x.shape[2:], size, *at)
        as_matrix = groups == 1 and size != [1, 1] and len(x) * rows * width <= _FEW_POSITIONS
        self._shape = self._shape or tuple(x.shape)
        weight = self.weight(bank, as_matrix)

        def multiply(codes: Tensor, unit: float, zero: int, bias: Tensor | None, out: torch.dtype) -> Tensor:
            if not as_matrix:
                return _conv(codes, unit, zero, weight, self.units, bias, *at, groups, out)
            patches = kernels.columns(codes, size, *at, zero).flatten(0, 2)
            y = _linear(patches, unit, zero, weight, self.units, bias, out)
            return y.view(len(x), rows, width, -1).permute(0, 3, 1, 2)

        return self.sum_of_planes(multiply, planes(x, adapter), adapter, dtype)

"""What linears and convolutions in 8-bit integers share."""

from abc import abstractmethod
from collections.abc import Callable
from functools import lru_cache, partial
from typing import cast

import torch
from torch import Tensor

from ...compat.torch import has_bf16_instructions
from ...formats import FPFormat
from ...layers import QuantLayer
from ...numerics import Codes
from .. import kernels, tuning
from ..engine import PreparedLayer, used_integers
from ..grid import InputGrid, largest_byte, low_bits
from .products import writes

SHAPES = 8
"""Of inputs, whose fastest ways are remembered."""

_FEW = 2**16  # values that one thread quantizes before another is awake

Planes = Callable[[Tensor, int | Tensor], list[Tensor]]
"""Values and an adapter → the bytes that hold their integers."""
Weight = tuple[Tensor, Tensor]
"""Integers as a product wants them, and their unit for each output channel, `(C,)` float32."""


def _as_they_are(codes: Tensor, adapter: int | Tensor) -> list[Tensor]:  # noqa: ARG001
    return [codes]


def _several_threads(x: Tensor, grid: InputGrid) -> bool | None:
    """Whether several threads quantize faster than one, which they have to be woken for; None where it is not asked."""
    if x.numel() < _FEW or torch.get_num_threads() == 1 or not tuning.allowed():
        return None
    names = ("one thread", "threads") if x.numel() < kernels.SEVERAL_QUANTIZE else ("threads", "one thread")
    ways = {name: partial(kernels.quantize, x, grid, name == "threads") for name in names}
    return tuning.fastest(_question(x.numel(), x.dtype, len(grid.planes)), ways) == "threads"


@lru_cache(maxsize=1024)
def _question(size: int, dtype: torch.dtype, bytes_each: int) -> str:
    return f"quantize {tuning.text_of([size], dtype)} to {bytes_each}"


class Int8Layer(PreparedLayer):
    """What both kinds share: integers of the weight, and bytes of the input."""

    def __init__(self, layer: QuantLayer, keep: bool) -> None:
        super().__init__(layer, keep)
        self._table = torch.tensor(layer.weight_format.code_values, dtype=torch.int8, device="cpu")
        self._chosen: dict[tuple, str] = {}
        about = tuning.about(layer.matrix_shape, layer.weight_format, layer.input_format, layer.group_size)
        sums = "" if self._adapters is None else " sums"
        self._about = f"{about}{'fast' if keep else 'low'}{sums}"

    @property
    def bias(self) -> Tensor | None:
        """The layer's own as it is now, `(C,)` float32: it may be trained."""
        bias = self.layer.bias
        if bias is None:
            return None
        return (bias.detach() if torch.is_grad_enabled() else bias).to(torch.float32)

    def integers(self, bank: int) -> tuple[Tensor, Tensor]:
        """Integers of the weight that a call uses, `(C, …)` int8, and their unit, `(C,)` float32."""
        return used_integers(self.layer, bank, self._table)

    @property
    def reads_codes(self) -> bool:
        """Whether another module may quantize its input: to one byte a value."""
        return not low_bits(cast(FPFormat, self.layer.input_format))

    def quantize(self, x: Tensor, adapter: int) -> Tensor:
        """See `PreparedLayer.quantize`."""
        (codes,) = self.codes(x, adapter)
        return codes

    def hand_over(self, values: Tensor, adapter: int, dtype: torch.dtype) -> Codes:
        """Bytes that another module made with `grid(adapter)` from floats of this dtype, for `from_codes`."""
        return Codes.wrap(values, self.layer, adapter, dtype, *self.grid(adapter).planes[0])

    def takes(self, codes: Codes) -> bool:
        """See `PreparedLayer.takes`."""
        return self.reads_codes and [(codes.unit, codes.zero)] == self.grid(codes.adapter).planes

    def from_codes(self, codes: Codes) -> Tensor:
        """See `PreparedLayer.from_codes`."""
        bank = codes.adapter if self.layer.num_weights > 1 else 0
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
        grid = self.grid(adapter)
        planes, finite = kernels.quantize(x, grid, _several_threads(x, grid))
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

    def by_fastest(self, codes: list[Tensor], dtype: torch.dtype, compute: Callable[[str], Tensor]) -> Tensor:
        """`compute(way)` by what is the fastest of the ways for such codes; by the default where nothing is timed."""
        tuned = tuning.allowed()
        key = (codes[0].shape, dtype, tuning.threads_and_limit() if tuned else None)
        chosen = self._chosen.get(key)
        if chosen is None:
            ways = self.ways(codes, dtype)
            asked = f"{self._about} {tuning.text_of(codes[0].shape, dtype)}"
            chosen = tuning.fastest(asked, {way: partial(compute, way) for way in ways})
            late = [*self._chosen.items()][1 - SHAPES :]  # weights laid out for the ways of others go
            self._chosen = dict(late) | {key: chosen}
            used = set(self._chosen.values())
            self._weights = {key: weight for key, weight in self._weights.items() if key[1] in used}
        return compute(chosen)

    @abstractmethod
    def ways(self, codes: list[Tensor], dtype: torch.dtype) -> tuple[str, ...]:
        """Names of what can multiply such codes and give a dtype; the default first."""

    def in_bfloat16(self, codes: list[Tensor], dtype: torch.dtype) -> bool:
        """Whether bfloat16 products may take part: fast, and with sums that float32 holds exactly."""
        if dtype != torch.bfloat16 or len(codes) > 1 or not has_bf16_instructions():
            return False
        largest = largest_byte(cast(FPFormat, self.layer.input_format)) * self.layer.largest_weight
        return largest * self.layer.matrix_shape[1] < 2**24

    @staticmethod
    def scaled(sums: Tensor, units: Tensor, bias: Tensor | None, axis: int) -> Tensor:
        """Sums of products of integers, `(…, C, …)` with the channels on an axis, as the layer's output, float32."""
        shape = [1] * sums.ndim
        shape[axis] = -1
        y = sums.to(torch.float32).mul_(units.view(shape))
        return y if bias is None else y.add_(bias.view(shape))

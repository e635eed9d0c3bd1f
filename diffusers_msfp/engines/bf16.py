"""bf16: lattice integers through bfloat16 (or, for float32 models, float32) products.

A product of two numbers of up to 8 significant bits is exact in float32, where the sums are kept, so this serves
layers whose formats are too wide for 8-bit integers. It never decodes a weight twice. A quantized input goes in as
bfloat16 where `q - k` has 8 significant bits, else as float32; on a CPU without instructions for bfloat16, where its
products take six times as long, all go in as float32. A weight takes the bytes of what it is multiplied with.
"""

from functools import lru_cache

import torch
from torch import Tensor

from ..compat.torch import has_bf16_instructions
from ..formats import FPFormat
from ..layers import QuantLayer
from ..numerics.rounding import require_finite
from . import kernels
from .engine import Engine, PreparedLayer, used_integers
from .grid import InputGrid
from .kernels import torch_kernels


class BF16Engine(Engine):
    """Floating-point arithmetic on lattice integers."""

    name = "bf16"
    measured_on = frozenset({"cpu x86_64"})

    def refusal(self, layer: QuantLayer) -> str | None:
        """See `Engine.refusal`."""
        return "its weight is on the meta device, where nothing is computed" if layer.packed_weight.is_meta else None

    def prepare(self, layer: QuantLayer) -> "BF16Layer":
        """See `Engine.prepare`."""
        return BF16Layer(layer, self.memory == "fast")


def is_on_cpu(x: Tensor) -> bool:
    """Whether the CPU's kernels can read a tensor; elsewhere torch's operations serve, and nothing is read back."""
    return x.device.type == "cpu"


def multiplies_bfloat16(x: Tensor) -> bool:
    """Whether products of bfloat16 are fast where a tensor is; on other devices than CPUs they are."""
    return not is_on_cpu(x) or has_bf16_instructions()


@lru_cache(maxsize=256)
def _fits_bfloat16(fmt: FPFormat, zero: int) -> bool:
    values = torch.tensor(fmt.lattice, dtype=torch.float32, device="cpu") - zero
    return torch.equal(values.to(torch.bfloat16).to(torch.float32), values)


class BF16Layer(PreparedLayer):
    """A layer of any kind; the layer's own `compute` does the work."""

    def __init__(self, layer: QuantLayer, keep: bool) -> None:
        super().__init__(layer, keep)
        values = layer.weight_format.code_values
        dtype = torch.int32 if max(values) < 2**31 else torch.float32
        self._table = torch.tensor(values, dtype=dtype, device="cpu")

    def expand(self, bank: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Integers as floats, which are exact in either dtype, channels last for images; the unit of each channel."""
        integers, units = used_integers(self.layer, bank, self._table)
        weight = integers.to(dtype)
        return weight.contiguous(memory_format=torch.channels_last) if weight.ndim == 4 else weight, units

    def run(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
        """As the layer."""
        layer, dtype = self.layer, x.dtype
        grid = self.grid(adapter) if layer.input_format is not None and x.numel() else None
        narrow = dtype == torch.bfloat16 and multiplies_bfloat16(x)
        if grid is not None:
            narrow = narrow and _fits_bfloat16(layer.input_format, grid.zero)
            x = self._centred(x, grid, torch.bfloat16 if narrow else torch.float32)
        operands = torch.bfloat16 if narrow else torch.float32
        weight, unit = self.weight(bank, operands)
        y = layer.compute(x.to(operands), weight, None).to(torch.float32)
        y = y * self._per_channel(unit if grid is None else unit * grid.unit)
        return (y if layer.bias is None else y + self._per_channel(layer.bias.to(torch.float32))).to(dtype)

    def _centred(self, x: Tensor, grid: InputGrid, dtype: torch.dtype) -> Tensor:
        dense = x.contiguous(memory_format=torch.channels_last if x.ndim == 4 else torch.contiguous_format)
        if not is_on_cpu(x):
            dense = require_finite(dense, f"The input of layer `{self.layer.module_name}`")
            return torch_kernels.lattice_integers(dense, grid).sub_(grid.zero).to(dtype)
        centred, finite = kernels.centre(dense, grid, dtype)
        if not finite:
            self.refuse_infinite(x)
        return centred

    def _per_channel(self, values: Tensor) -> Tensor:
        """`(C,)` as it broadcasts to the output."""
        return values.view(-1, *[1] * (len(self.layer.logical_shape) - 2))

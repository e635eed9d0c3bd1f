"""The hub's part at one layer: `num_adapters` low-rank pairs.

An adapter's update of the weight, seen as a matrix of output channels by everything else, is `up @ down`. For a
convolution that is a k×k convolution to `rank` channels and a 1×1 convolution back, as in EfficientDM.

Pairs that read the layer's float input are computed beside it. Those that read its codes, as the weight does, add to
the weight: `W x + B A x = (W + B A) x`, one product, of 8-bit integers where the layer's is one (`numerics.sums`).
"""

import math
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...compat.accelerate import onloaded
from ...compat.modules import state_of
from ...compat.torch import StatefulModule
from ...errors import CheckpointError
from ...layers import QuantLayer
from ...layers.protocols import Routing
from ...numerics import select
from ...numerics.sums import rounded_sum, sum_integers, sum_unit

CODES = "codes"
ADAPTER_TENSORS = ("down", "up", "input_scale", "input_zero_point", CODES)


class FullUpdate(nn.Module):
    """In a merged adapter's place, an update of the whole weight: nothing of it is left once it is merged.

    Args:
        weight_shape (`tuple[int, ...]`): of the layer's float weight.
        num_adapters (`int`): h.

    Tensor: `delta` `(h, *weight_shape)`, float32.
    """

    delta: nn.Parameter

    def __init__(self, weight_shape: tuple[int, ...], num_adapters: int, device: torch.device | str) -> None:
        super().__init__()
        self.num_adapters = num_adapters
        self.delta = nn.Parameter(torch.zeros(num_adapters, *weight_shape, dtype=torch.float32, device=device))

    def update(self, gate: Tensor) -> Tensor:
        """See `AdapterBank.update`."""
        return torch.einsum("h,h...->...", gate, self.delta) if self.num_adapters > 1 else gate[0] * self.delta[0]


def adapter_rank(weight_shape: tuple[int, ...], rank: int) -> int:
    """The rank of a layer's adapters: `rank`, but at most half of the smaller channel count, and at least 1.

    Args:
        weight_shape (`tuple[int, ...]`): `(out, in / groups, *kernel)`.
        rank (`int`): what is asked for; 0 for an update of the whole weight, whose rank is that of the weight.
    """
    if not rank:
        return max(1, min(weight_shape[0], math.prod(weight_shape[1:])))
    return max(1, min(rank, min(weight_shape[:2]) // 2))


class AdapterBank(StatefulModule):
    """All low-rank pairs of one layer, stacked; they keep their dtype when the model is cast.

    Args:
        weight_shape (`tuple[int, ...]`): of the layer's float weight, `(out, in / groups, *kernel)`.
        num_adapters (`int`): h.
        rank (`int`): r.
        quantized_input (`bool`): whether the layer's input is quantized; its parameters were trained with the adapters
            and are kept with them, so that the layer without them is what it was.
        reads (`str`): what the pairs read of the layer's input, `"float"` or `"codes"`.

    Attributes:
        reads_codes (`bool`): whether the pairs read the layer's input as its weight does.

    Tensors: `down` `(h, r, in / groups, *kernel)` and `up` `(h, out, r)` of `dtype`; `input_scale` and
    `input_zero_point` `(h,)`, float32; `codes` `()`, uint8, 1, where the pairs read codes, so that no state of the
    other kind can be loaded.
    """

    codes: Tensor

    def __init__(
        self,
        weight_shape: tuple[int, ...],
        num_adapters: int,
        rank: int,
        quantized_input: bool = False,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "meta",
        reads: str = "float",
    ) -> None:
        super().__init__()
        self.weight_shape, self.num_adapters, self.rank = tuple(weight_shape), num_adapters, rank
        out, *rest = weight_shape
        self.down = nn.Parameter(torch.empty(num_adapters, rank, *rest, dtype=dtype, device=device))
        self.up = nn.Parameter(torch.empty(num_adapters, out, rank, dtype=dtype, device=device))
        self.input_scale = self.input_zero_point = None
        if quantized_input:
            ones = torch.ones(num_adapters, dtype=torch.float32, device=device)
            self.keep_input(ones, torch.zeros_like(ones))
        self.reads_codes = reads == "codes"
        if self.reads_codes:
            self.register_buffer(CODES, torch.ones((), dtype=torch.uint8, device=device))
        self.requires_grad_(False)

    def keep_input(self, scale: Tensor, zero_point: Tensor) -> None:
        """Keep the input's parameters, both `(h,)` and float32."""
        for name, value in (("input_scale", scale), ("input_zero_point", zero_point)):
            if name in self.__dict__:
                del self.__dict__[name]
            self.register_buffer(name, value)

    def input_range(self) -> tuple[Tensor, Tensor]:
        """Scales and zero points of the layer's input, both `(h,)` and float32."""
        with onloaded(self):
            return cast(Tensor, self.input_scale), cast(Tensor, self.input_zero_point)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator) -> None:
        """Random `down`, zero `up`: the layer is unchanged at first."""
        bound = 1 / math.sqrt(math.prod(self.weight_shape[1:]))
        drawn = torch.rand(self.down.shape, generator=generator, dtype=torch.float32, device="cpu")
        self.down.copy_((2 * drawn - 1) * bound * math.sqrt(3))
        self.up.zero_()

    def stacked(self) -> tuple[Tensor, Tensor]:
        """All adapters as one pair of rank `h * r`: `(h * r, in / groups, *kernel)` and `(out, h * r)`, float32."""
        return self.down.float().flatten(0, 1), self.up.float().transpose(0, 1).flatten(1)

    def update(self, gate: Tensor) -> Tensor:
        """The weight's update `sum_k gate[k] * up[k] @ down[k]`; gate `(h,)` → `weight_shape`, float32."""
        down, up = self.stacked()
        return ((up * gate.repeat_interleave(self.rank)) @ down.flatten(1)).view(self.weight_shape)

    def pair(self, adapter: int | Tensor) -> tuple[Tensor, Tensor]:
        """`(r, in / groups, *kernel)` and `(out, r)` of one adapter, float32; views where `adapter` is a number."""
        return select(self.down, adapter).float(), select(self.up, adapter).float()

    # ── pairs that read codes ────────────────────────────────────────────────────────────────────────────────

    def summed(self, layer: QuantLayer, adapter: int | Tensor) -> Tensor:
        """The layer's weight with what one adapter adds to it, as engines compute it; `weight_shape`, float32."""
        return rounded_sum(self._total(layer, adapter), *layer.integer_unit())

    def integers(self, layer: QuantLayer, adapter: int | Tensor) -> tuple[Tensor, Tensor]:
        """The same as whole numbers within ±127 and their unit `(C,)`, both float32."""
        total = self._total(layer, adapter)
        unit = sum_unit(total, *layer.integer_unit())
        return sum_integers(total, unit), unit

    def made_from(self, layer: QuantLayer, before: tuple | None) -> tuple:
        """What the sums follow besides the packed weight: unequal once it was exchanged, changed or weighed anew.

        Args:
            layer (`QuantLayer`): whose adapters these are.
            before (`tuple`, *optional*): what this gave when the sums were made; pairs that are offloaded are those.
        """
        if before is not None and self.up.is_meta:
            return _strength(layer), *before[1:]
        return _strength(layer), state_of(self.down), state_of(self.up)

    def _total(self, layer: QuantLayer, adapter: int | Tensor) -> Tensor:
        with onloaded(self):
            down, up = self.pair(adapter)
        update = (up @ down.flatten(1)).view(self.weight_shape)
        return layer.dequantize_weight() + update * _strength(layer)

    # ── pairs that read floats ───────────────────────────────────────────────────────────────────────────────

    def forward(self, layer: QuantLayer, x: Tensor, adapter: int | Tensor) -> Tensor:
        """What one adapter adds to the layer's output; `x` and the result float32.

        Args:
            layer (`nn.Module`): the quantized layer, for stride, padding and the like.
        """
        return self.low_rank(layer, x, *self.pair(adapter))

    def cast(self, dtype: torch.dtype) -> "AdapterBank":
        """Store the pairs in another dtype, for good."""
        for name in ("down", "up"):
            setattr(self, name, nn.Parameter(getattr(self, name).detach().to(dtype), requires_grad=False))
        return self

    @staticmethod
    def low_rank(layer: QuantLayer, x: Tensor, down: Tensor, up: Tensor, gate: Tensor | None = None) -> Tensor:
        """`up(gate * down(x))` with the layer's own geometry.

        Args:
            gate (`Tensor`, `(B, h)`, *optional*): weight of each adapter for each sample, for a stacked pair.
        """
        if gate is not None:
            gate = gate[..., None].expand(-1, -1, down.shape[0] // gate.shape[1]).flatten(1)  # (B, h * r)
        if down.ndim == 2:
            hidden = F.linear(x, down)
            if gate is not None:
                hidden = hidden * gate.view(len(gate), *[1] * (hidden.ndim - 2), -1)
            return F.linear(hidden, up)
        if layer.groups > 1:  # the pair factors the grouped weight as a matrix, not a grouped pair of convolutions
            if gate is None:
                return layer.compute(x, (up @ down.flatten(1)).view(up.shape[0], *down.shape[1:]), None)
            return torch.cat([AdapterBank.low_rank(layer, x[i : i + 1], down, up * row) for i, row in enumerate(gate)])
        hidden = layer.compute(x, down, None)  # (B, r, …)
        if gate is not None:
            hidden = hidden * gate.view(*gate.shape, *[1] * (hidden.ndim - 2))
        return torch.einsum("or,br...->bo...", up, hidden)

    def check_values(self, module_name: str) -> None:
        """Refuse values that no training could have written.

        Raises:
            CheckpointError: NaN or infinity, a scale ≤ 0, a positive zero point, a kind that is not known.
        """
        if self.reads_codes and int(self.codes) != 1:
            raise CheckpointError(f"`{module_name}.adapters.{CODES}` must be 1, but got {self.codes.item()}: damaged.")
        for name, tensor in self.state_dict().items():
            bad = not torch.isfinite(tensor).all() or (name == "input_scale" and (tensor <= 0).any())
            if bad or (name == "input_zero_point" and (tensor > 0).any()):
                raise CheckpointError(
                    f"`{module_name}.adapters.{name}` must be finite (a scale > 0, a zero point ≤ 0), but it is not: "
                    f"damaged file."
                )


def _strength(layer: QuantLayer) -> float:
    return cast(Routing, layer.routing).strength

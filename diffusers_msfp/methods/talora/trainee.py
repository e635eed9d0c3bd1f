"""A quantized layer while its adapters are trained.

It stands in the quantized layer's place and hands its result back to it. Placements:

- `merged`: `Q(W + B_k A_k)` (EfficientDM's QALoRA), or with an update of the whole weight instead of `B_k A_k`;
  deployed as packed weights. `W` is the full-precision weight as far as it rounds to the codes that the layer has, so
  that training begins with the layer as it is, its rounding learned or not. The layer's bias and the scales of its
  output channels learn too, shared by all adapters.
- `side`: `Q(W) x + B_k A_k x`, with the packed weight; deployed as float adapters beside it. Where these read codes, as
  `Q(W)` does, both are one weight, `Q8(Q(W) + B_k A_k)`, with the rounding of `numerics.sums`.
"""

from typing import cast

import torch
from torch import Tensor, nn

from ...engines.training import fake_quantize
from ...formats import FPFormat
from ...layers import QuantLayer
from ...numerics import QParams
from ...numerics.rounding import local_step, zero_point_steps
from ...numerics.sums import rounded_sum
from .adapters import AdapterBank, FullUpdate

PLACEMENTS = ("merged", "side")
NEAR = 0.49
"""Of the grid's local step: what rounds to a value, clear of the border."""
BELOW = 1 - 2**-12
"""Of a code: what lies between it and its neighbour towards zero, in every format."""


class Gate:
    """The choice of the running batch, shared by all layers.

    `value` is `(B, groups, num_adapters)`, one-hot, with the router's gradient; `choices[group][sample]` are the same
    as numbers, looked up on the device once. `entries` `(B,)`, int64, are the samples' timesteps in the model's finite
    set, if it has one.
    """

    value: Tensor
    choices: list[list[int]]
    entries: Tensor | None

    def set(self, value: Tensor, entries: Tensor | None = None) -> None:
        """Take the choice of the coming calls."""
        self.value, self.choices = value, value.detach().argmax(2).T.tolist()
        self.entries = entries


@torch.no_grad()
def rounding_to_codes(layer: QuantLayer, weight: Tensor) -> Tensor:
    """The float weight, each value moved no further than it must be to round to the code that the layer has for it.

    Args:
        layer (`QuantLayer`): of one bank.
        weight (`Tensor`): of its `logical_shape`.

    Returns:
        `Tensor`, float32: `Ŵ + clamp(W - Ŵ, ±0.49 s)` with the grid's step `s` on that side of the code, in the unit of
        the weight: below a power of two it may be half of what it is above.
    """
    qparams = layer.weight_qparams()
    codes = layer.dequantize_weight().reshape(layer.rows_shape)
    apart = weight.to(torch.float32).reshape(layer.rows_shape) - codes
    inwards = codes * apart < 0
    beside = torch.where(inwards, codes * BELOW, codes) / qparams.unit
    reach = NEAR * local_step(beside, layer.weight_format)[0] * qparams.unit
    return (codes + apart.clamp(-reach, reach)).view(layer.logical_shape)


class Trainee(nn.Module):
    """Trainable adapters, each with an activation scale and zero point of its own, around a frozen quantized layer.

    Where the layer has an input scale and zero point for each timestep of a finite set, these learn, beside one merged
    adapter for all.

    Args:
        layer (`QuantLayer`): frozen; not changed until `finish`.
        weight (`Tensor`): the full-precision weight, kept by reference.
        bank (`AdapterBank` or `FullUpdate`): to be trained; the latter with `"merged"` only.
        placement (`str`): one of `PLACEMENTS`.
        gate (`Gate`), group (`int`): where the choice comes from.

    Raises:
        ShapeError: `weight` is not of the layer's shape.
    """

    layer: QuantLayer
    adapters: AdapterBank | FullUpdate
    gate: Gate
    source: Tensor
    bias: nn.Parameter | None
    log_weight_scale: nn.Parameter | None
    log_scale: nn.Parameter | None
    relative_zero_point: nn.Parameter | None

    def __init__(
        self,
        layer: QuantLayer,
        weight: Tensor,
        bank: AdapterBank | FullUpdate,
        placement: str,
        gate: Gate,
        group: int,
    ) -> None:
        super().__init__()
        layer.check_original(weight)
        self.layer, self.adapters = layer, bank.requires_grad_(True)
        self.placement, self.group = placement, group
        self.__dict__.update(gate=gate, source=weight)
        self.bias = self.log_weight_scale = self.log_scale = self.relative_zero_point = None
        if placement == "merged":
            self.__dict__["source"] = rounding_to_codes(layer, weight)
            self.log_weight_scale = nn.Parameter(torch.zeros_like(layer.weight_scale))
            if layer.bias is not None:
                self.bias = nn.Parameter(layer.bias.detach().to(torch.float32).clone())
        if layer.input_format is not None:
            self.log_scale = nn.Parameter(layer.input_scale.log().repeat(bank.num_adapters))
            if not layer.input_format.signed:
                relative = layer.input_zero_point / layer.input_scale
                self.relative_zero_point = nn.Parameter(relative.repeat(bank.num_adapters))

    def weight_step(self) -> float:
        """Mean distance of neighbours on the weight's grid, `maxval / (2 ** (bits - 1) - 1)`, units of the weight."""
        fmt = self.layer.weight_format
        return (self.layer.weight_qparams().scale.mean() * fmt.max / (2 ** (fmt.bits - 1) - 1)).item()

    def input_qparams(self) -> QParams:
        """Scales and zero points as they are now, with gradients; zero points in units of the initial scale.

        `(h,)`, one for each adapter, or `(S,)`, one for each timestep of the finite set.
        """
        scale, fmt = cast(Tensor, self.log_scale).exp(), cast(FPFormat, self.layer.input_format)
        if self.relative_zero_point is None:
            return QParams.unchecked(fmt, scale, torch.zeros_like(scale))
        zero_point = (self.relative_zero_point * self.layer.input_scale).clamp_max(0)
        return QParams.unchecked(fmt, scale, zero_point)

    @property
    def weight(self) -> Tensor:
        """What others read of the quantized layer, see `LogicalWeight`."""
        return self.layer.weight

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 – as the float layer calls it
        """As the deployed layer will compute, with gradients; every sample with its own adapter."""
        x = input
        layer, gate = self.layer, self.gate.value[:, self.group]  # (B, h)
        exact = x.to(torch.float32)
        bias = self.bias if self.bias is not None or layer.bias is None else layer.bias.to(torch.float32)
        repeats = x.shape[0] // gate.shape[0]
        gate = gate[:, None].expand(-1, repeats, -1).flatten(0, 1)  # (rows of x, h)
        qparams = None if self.log_scale is None else self.input_qparams()
        base = layer.dequantize_weight() if self.placement == "side" else None

        def run(rows: Tensor, own: Tensor, adapter: int) -> Tensor:
            quantized = rows
            if qparams is not None and layer.num_sets:
                quantized = _by_sample(rows, qparams, cast(Tensor, self.gate.entries))
            elif qparams is not None:
                one = QParams.unchecked(qparams.format, qparams.scale[adapter], qparams.zero_point[adapter])
                quantized = fake_quantize(rows, one)
            if base is not None and not (bank := cast(AdapterBank, self.adapters)).reads_codes:
                down, up = bank.stacked()
                return layer.compute(quantized, base, bias) + bank.low_rank(layer, rows, down, up, own)
            chosen = own[0].detach()  # of all rows
            if base is None:
                weight = self.merged(chosen)
            else:
                weight = rounded_sum(base + self.adapters.update(chosen), *layer.integer_unit())
            output = layer.compute(quantized, weight, bias)
            routed = own.requires_grad and own.shape[1] > 1
            return output + self._gradient_of_choice(quantized, own) if routed else output

        choice = [adapter for adapter in self.gate.choices[self.group] for _ in range(repeats)]
        used = sorted(set(choice))
        if choice == sorted(choice):  # samples in the adapters' order need no copies
            counts = [choice.count(adapter) for adapter in used]
            pieces = zip(exact.split(counts), gate.split(counts), used, strict=True)
            return torch.cat([run(*piece) for piece in pieces]).to(x.dtype)
        rows = [torch.tensor([i for i, own in enumerate(choice) if own == k], device=x.device) for k in used]
        parts = [run(exact.index_select(0, i), gate[i], adapter) for i, adapter in zip(rows, used, strict=True)]
        return torch.cat(parts).index_select(0, torch.cat(rows).argsort()).to(x.dtype)

    def _gradient_of_choice(self, x: Tensor, gate: Tensor) -> Tensor:
        """Zeros that hand each row's gate `(rows, h)` the gradient of its own error, `⟨∂L_row / ∂W, U_k⟩`.

        The weight that rows of one choice share could hand them the mean of theirs alone.
        """
        with torch.no_grad():
            each = torch.eye(gate.shape[1], dtype=gate.dtype, device=gate.device)
            outputs = [self.layer.compute(x, self.adapters.update(one), None) for one in each]
        moved = (gate - gate.detach()).view(*gate.shape, *[1] * (x.ndim - 1))
        return cast(Tensor, sum(moved[:, k] * output for k, output in enumerate(outputs)))

    def merged(self, gate: Tensor) -> Tensor:
        """The fake-quantized weight that a gate `(h,)` makes; `logical_shape`, float32."""
        weight = self.source.to(torch.float32) + self.adapters.update(gate)
        scale = self.layer.weight_scale * cast(Tensor, self.log_weight_scale).exp()
        qparams = self.layer.weight_qparams(scale=scale)
        quantized = fake_quantize(weight.reshape(self.layer.rows_shape), qparams)
        return quantized.view(self.layer.logical_shape)

    @torch.no_grad()
    def merged_weight(self, adapter: int) -> Tensor:
        """The float weight that one adapter makes of the teacher's; `logical_shape`, float32."""
        gate = self.layer.weight_scale.new_zeros(self.adapters.num_adapters)
        gate[adapter] = 1
        return self.source.to(torch.float32) + self.adapters.update(gate)

    @torch.no_grad()
    def finish(self, dtype: torch.dtype) -> QuantLayer:
        """Write what was learned into the quantized layer and return it.

        Args:
            dtype (`torch.dtype`): of stored `side` adapters.
        """
        layer, kept = self.layer, None
        if self.log_scale is not None:
            qparams = self.input_qparams()
            kept = (qparams.scale, -zero_point_steps(qparams) * qparams.unit)
        if self.placement == "side":
            layer.adapters = bank = cast(AdapterBank, self.adapters).cast(dtype)
            if kept is not None:
                bank.keep_input(*kept)
            return layer
        layer.weight_scale.mul_(cast(Tensor, self.log_weight_scale).exp())
        if self.bias is not None:
            cast(nn.Parameter, layer.bias).copy_(self.bias)
        layer.store_banks([self.merged_weight(k) for k in range(self.adapters.num_adapters)])
        if kept is not None:
            layer.store_input(*(part if layer.num_sets else part.squeeze() for part in kept))  # `()` for one adapter
        return layer


def _by_sample(x: Tensor, qparams: QParams, entries: Tensor) -> Tensor:
    """Fake-quantized `(B, …)` with the parameters `(S,)` of each sample's entry `(B / repeats,)`."""
    entries = entries.repeat_interleave(x.shape[0] // len(entries)).view(-1, *[1] * (x.ndim - 1))
    own = QParams.unchecked(qparams.format, qparams.scale[entries], qparams.zero_point[entries])
    return fake_quantize(x, own)

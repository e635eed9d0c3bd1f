"""How a quantized layer is run: by the engine that was chosen for it, or by the reference, which defines the result."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor, nn

from ..calibration import observe
from ..compat.modules import exchanged_methods, tensors_state
from ..errors import UnsupportedError
from ..formats import INT8_MAX
from ..numerics import Codes, QParams, decode, fake_quantize, select, unpack
from ..numerics.groups import by_weight
from ..numerics.rounding import require_finite
from ..numerics.route import Route
from .incoming import check_incoming, refuse_tangents
from .logical import PackedLayer
from .protocols import Engine, Prepared
from .stored import FORMATS_TENSOR, OBSERVED, PACKED_WEIGHT, StoredTensors
from .transplant import float_layer

if TYPE_CHECKING:
    from .quant_layer import QuantLayer

GEOMETRY = frozenset({"stride", "padding", "padding_mode", "dilation", "groups", "_conv_forward"})
"""Attributes of a convolution that engines read when they make a layer ready."""


class Execution(StoredTensors, PackedLayer):
    """Abstract base of `QuantLayer`: the two quantizers and the forward pass."""

    prepared: Prepared | None = None
    weight_dtype: torch.dtype
    input_is_sum: bool | None

    # ── engines ──────────────────────────────────────────────────────────────────────────────────────────────

    def use_engine(self, engine: Engine | None) -> None:
        """Run by this engine from now on; None for the reference."""
        self.engine = engine
        self.changed()

    def changed(self) -> None:
        """Drop what an engine made ready; the next call makes it anew."""
        self.__dict__.pop("prepared", None)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name in GEOMETRY:  # as tiling does, on a model that has run
            self.changed()

    def prepare(self) -> None:
        """Let the engine make the layer ready now, where it can; a call does it otherwise, but not while compiling.

        No engine knows what an exchanged `_conv_forward` does; the reference calls it.
        """
        self.changed()
        exchanged = "_conv_forward" in exchanged_methods(self)
        if self.engine is not None and not (self.observing or self.packed_weight.is_meta or exchanged):
            self.__dict__["prepared"] = self.engine.prepare(cast("QuantLayer", self))

    def ready(self, x: Tensor) -> Prepared | None:
        """The layer as its engine made it ready; None where the reference must run.

        That is to observe, for gradients, and in exported programs, which run where this layer is not.
        """
        refuse_tangents(x, self.module_name)
        if self.engine is None or self.observing or torch.compiler.is_exporting():
            return None
        if torch.is_grad_enabled() and self._wants_gradients(x):
            return None
        if not torch.compiler.is_compiling() and getattr(self.prepared, "made_of", None) != tensors_state(self):
            self.prepare()
        return self.prepared

    def _wants_gradients(self, x: Tensor) -> bool:
        return x.requires_grad or any(tensor.requires_grad for tensor in self.parameters())

    def before_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What an engine made ready stays behind when the model is moved or cast."""
        self.changed()
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype

    def take_state(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
        """Of a state of the same formats, what is stored as tensors; codes may have the name that they have in files.

        Raises:
            CheckpointError: see `check_incoming`.
        """
        check_incoming(self, state, prefix)
        own = {key: value for key, value in state.items() if key.startswith(prefix)}
        self.take_formats(own.pop(prefix + FORMATS_TENSOR, None))
        for name in OBSERVED:
            if (value := own.pop(prefix + name, None)) is not None:
                self.load_observed(name, value)
        if (codes := own.pop(f"{prefix}weight", None)) is not None:
            own[prefix + PACKED_WEIGHT] = codes
        return own

    def after_state(self) -> None:
        """What an engine made ready of the old state goes."""
        self.changed()

    def __getstate__(self) -> dict:
        """For copies and pickles: without what an engine made ready."""
        return {key: value for key, value in super().__getstate__().items() if key != "prepared"}

    # ── the reference ────────────────────────────────────────────────────────────────────────────────────────

    def weight_qparams(self, part: slice = slice(None), scale: Tensor | None = None) -> QParams:
        """Scale of the weight as a matrix of `rows_shape`: `(rows, 1)`, or one for each weight of a grouped channel.

        Args:
            part (`slice`): of the output channels.
            scale (`Tensor`, *optional*, `(C,)`): instead of `weight_scale`; gradients flow to it.
        """
        scale = (self.weight_scale if scale is None else scale)[part, None]
        if self.group_size is not None:
            scale = scale * self.multipliers(part)
            if self.has_whole_groups:
                scale = scale.reshape(-1, 1)
            else:
                scale = by_weight(scale, self.group_size, self.matrix_shape[1])
        return QParams.unchecked(self.weight_format, scale, torch.zeros_like(scale))

    def input_qparams(self, adapter: int | Tensor = 0) -> QParams:
        """Scale and zero point of shape `()`; those of the adapters while adapters beside the weight are in use.

        Args:
            adapter (`int` or `Tensor`): which adapter's, or which parameter set; a tensor `(B,)` gives shape `(B,)`.
        """
        scale, zero_point = (self.used_adapters or self).input_range()
        if scale.ndim:
            scale, zero_point = select(scale, adapter), select(zero_point, adapter)
        return QParams.unchecked(self.input_format, scale, zero_point)

    def dequantize_weight(self, bank: int | Tensor = 0) -> Tensor:
        """One bank's weight as the layer uses it: float32, `logical_shape`."""
        codes = unpack(self.packed_bank(bank), self.weight_format.bits, self.matrix_shape[1])
        return decode(codes.reshape(self.rows_shape), self.weight_qparams()).view(self.logical_shape)

    def integer_unit(self) -> tuple[Tensor, int]:
        """Real size of an integer of each output channel's weight, `(C,)`, and what none of these exceeds."""
        scale = self.weight_scale
        return QParams.unchecked(self.weight_format, scale, torch.zeros_like(scale)).unit, super().largest_weight

    def used_weight(self, bank: int | Tensor = 0) -> Tensor:
        """The float32 weight that a call uses: a bank's, or with what an adapter that reads codes adds to it."""
        return self.adapters.summed(self, bank) if self.has_sums else self.dequantize_weight(bank)

    @property
    def largest_weight(self) -> int:
        """See `StoredTensors`; also with what adapters that read codes add."""
        own = super().largest_weight
        return max(own, INT8_MAX) if self.adapters is not None and self.adapters.reads_codes else own

    def decode_whole(self) -> Tensor:
        """See `PackedLayer`; of one bank, for several are no single weight."""
        if self.num_banks > 1:
            raise UnsupportedError(
                f"`{self.module_name}` must have one weight, but adapters are merged into {self.num_banks}: there is "
                f"none to read. Fine-tune with `placement='side'` to keep one."
            )
        return self.dequantize_weight()

    def float_copy(self) -> nn.Module:
        """See `PackedLayer`; its input stays float."""
        if self.adapters is not None or self.recall is not None:
            raise UnsupportedError(
                f"`{self.module_name}` cannot be trained as a whole: timestep-aware adapters or stored features belong "
                f"to it. Leave it out of `modules_to_save` and `target_modules`, or unload them first."
            )
        return float_layer(self, self.float_class)

    @property
    def sum_unknown(self) -> bool:
        """Whether the formats to try depend on the input's being a residual sum, and nobody has said yet."""
        return self.observing and bool(self.scheme and self.scheme.residual) and self.input_is_sum is None

    def expect_sum(self, is_sum: bool) -> None:
        """Try the formats that the scheme has for residual sums, or those for all other inputs."""
        if self.observing and self.scheme and self.scheme.residual:
            self.input_is_sum = is_sum
            self.input_candidates = self.scheme.residual if is_sum else self.scheme.activation

    def quantize_input(self, x: Tensor, adapter: int | Tensor = 0) -> Tensor:
        """The input as the layer uses it, float32: observed, fake-quantized, or as it is."""
        if self.observing:
            observe(self.observation, x, self.module_name)
        elif self.input_format is not None:
            x = require_finite(x, f"The input of layer `{self.module_name}`")
            qparams = self.input_qparams(adapter)
            if qparams.scale.ndim:  # a set for each row
                parts = (part.view(-1, *[1] * (x.ndim - 1)) for part in (qparams.scale, qparams.zero_point))
                qparams = QParams.unchecked(qparams.format, *parts)
            return fake_quantize(x.to(torch.float32), qparams)
        return x.to(torch.float32)

    def forward(self, input: Tensor) -> Tensor:
        """Quantize the input, multiply by the weight, return the dtype that the float layer would.

        Args:
            input (`Tensor`): float, or the `Codes` that `takes_codes` said the layer would take.

        Raises:
            UnsupportedError: integers or complex numbers; tracing by `torch.jit`.
        """
        x = input
        if torch.jit.is_tracing():
            raise UnsupportedError(
                f"`torch.jit.trace` cannot record `{self.module_name}`, which is quantized. Use `torch.export.export` "
                f"or `torch.compile`, or trace what `model.dequantize()` gives."
            )
        if isinstance(x, Codes):
            if x.reader is self and self.prepared is not None and self.prepared.takes(x):
                return self.prepared.from_codes(x)
            x = x.decoded()
        if not x.is_floating_point():
            raise UnsupportedError(
                f"Layer `{self.module_name}` reads floating-point inputs, but got {x.dtype}. Cast the input to the "
                f"model's dtype, {self.weight_dtype}, first."
            )
        if self.recall is not None:
            return self.recall.output(self.routing.route(), x, self._forward)
        return self._forward(x)

    def _forward(self, x: Tensor) -> Tensor:
        if self.num_sets:
            route = self.routing.route()
            if torch.compiler.is_compiling():  # a set for each row: no need to compute all
                return self.run(x, 0, Route.rows(route.index, x.shape[0])).to(result_dtype(x))
            return route.apply(lambda rows, index: self.run(rows, 0, index), x, self.num_sets).to(result_dtype(x))
        adapters = self.used_adapters
        if adapters is None and self.num_banks == 1:
            return self.run(x).to(result_dtype(x))

        def run(rows: Tensor, adapter: int | Tensor) -> Tensor:
            if adapters is None or adapters.reads_codes:
                return self.run(rows, adapter, adapter)
            correction = adapters(self, rows.to(torch.float32), adapter)
            return self.run(rows, 0, adapter) + correction * self.routing.strength

        choices = self.num_banks if adapters is None else adapters.num_adapters
        return self.routing.route(self.group).apply(run, x, choices).to(result_dtype(x))

    def run(self, x: Tensor, bank: int | Tensor = 0, adapter: int | Tensor = 0) -> Tensor:
        """The layer with one bank and the input's parameters of one adapter or set, by its engine.

        Args:
            adapter (`int` or `Tensor`): a tensor `(B,)`, while compiling only, has the set of each row of `x`.
        """
        prepared = self.ready(x)
        if prepared is not None:
            return prepared(x, bank, adapter)
        bias = None if self.bias is None else self.bias.to(torch.float32)
        return self.compute(self.quantize_input(x, adapter), self.used_weight(bank), bias)

    @property
    def used_adapters(self) -> Any:
        """Those beside the weight; None where there are none, or while they are disabled."""
        adapters = self.adapters
        return None if adapters is None or not self.routing.strength else adapters

    @property
    def has_sums(self) -> bool:
        """Whether adapters are in use that read codes, and so add to the weight, see `numerics.sums`."""
        adapters = self.used_adapters
        return adapters is not None and adapters.reads_codes

    @property
    def num_weights(self) -> int:
        """Weights among which the timestep chooses: banks, or the sums of the one with each adapter."""
        return self.adapters.num_adapters if self.has_sums else self.num_banks

    def _adapter_of_codes(self) -> int | None:
        adapters = self.used_adapters
        if adapters is not None and not adapters.reads_codes:
            return None
        alone = adapters is None and self.num_banks == 1 and not self.num_sets
        return 0 if alone else self.routing.route(self.group).uniform

    def takes_codes(self, x: Tensor) -> int | None:
        """The adapter or set for whose grid another layer may quantize this one's input; None if it must give floats.

        Args:
            x (`Tensor`): what the other layer starts from.
        """
        apart = self.training or torch.compiler.is_compiling()  # dropout may be active; the compiler fuses by itself
        apart = apart or result_dtype(x) != x.dtype
        return self._adapter_of_codes() if not apart and (ready := self.ready(x)) and ready.reads_codes else None


def result_dtype(x: Tensor) -> torch.dtype:
    """What a float layer makes of this input: its dtype, or that of autocast."""
    device = x.device.type
    has_autocast = torch.amp.is_autocast_available(device)  # the meta device has none
    cast = has_autocast and x.dtype != torch.float64 and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if cast else x.dtype

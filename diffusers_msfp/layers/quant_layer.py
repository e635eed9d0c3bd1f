"""What all quantized layers share: stored tensors, observation of the input, and the two quantizers.

A quantized layer is a leaf that takes the place of its float original. It keeps the original's class as a base, so
PEFT finds it, and the original's attributes. Stored tensors:

| name | shape | dtype | meaning |
|---|---|---|---|
| `packed_weight` | `(K * C, 1, …, bytes)`, as many axes as the convolution's weight, 3 for a linear | uint8 | codes |
| `weight_scale` | `(C,)` | float32 | scale of each output channel |
| `group_scale` | `(C, bytes)` | uint8 | with group scales: multiplier of each group, 4 bits, packed as the codes are |
| `weight_error` | `()` | float32 | squared error of the weight divided by its sum of squares |
| `input_scale`, `input_zero_point` | `()`; `(K,)`, K > 1; `(S,)` | float32 | of the input; absent if it stays float |
| `input_error` | `()` | float32 | as `weight_error` |
| `observed_sample`, `observed_count`, `observed_range` | see `Observation` | | only while observing |
| `formats` | `(2, 3)`, `(3, 3)` | uint8 | of weight and input, see `stored.formats_tensor`; made when it is asked for |
| `bias` | as the original | as the model | untouched |
| `adapters.down`, `adapters.up` | see `methods.talora.AdapterBank` | float16 | only with adapters beside the weight |
| `recall.features` | `(S, C)` | float16 or float32 | outputs known for timesteps, see `methods.temporal.FeatureTable` |

C is the number of output channels, K that of weight banks: 1, or one per adapter where adapters are merged into the
weights; banks share `weight_scale` and `group_scale`. With one bank and no adapters the input may have S parameter
sets, one for each timestep of a finite set. Which bank, adapter or set a call uses is asked of `routing`.

In files `packed_weight` is called `weight`. The attribute `weight` is the float weight that the codes stand for, read
only and decoded when it is used, see `logical`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ..calibration import Observation, search_activation, search_groups, search_weight
from ..compat.hooks import share_hooks
from ..compat.torch import tensors_of, weight_of
from ..errors import ShapeError
from ..formats import FPFormat
from ..numerics import QParams, encode, pack, packed_size, select
from ..numerics.rounding import check_finite
from ..schemes import LayerScheme
from .execution import Execution
from .protocols import CachedOutput, Engine, Routing
from .stored import INPUT_TENSORS, lasting
from .transplant import transplant

_CHUNK = 2**21  # weights encoded at once


class QuantLayer(Execution, ABC):
    """Abstract base of the quantized layers. Made by `from_float` or `skeleton`, never by its constructor."""

    module_name: str
    packed_weight: nn.Parameter
    weight_scale: Tensor
    weight_error: Tensor
    input_scale: Tensor
    input_zero_point: Tensor
    input_error: Tensor
    weight_dtype: torch.dtype
    weight_format: FPFormat
    group_size: int | None
    input_format: FPFormat | None
    scheme: LayerScheme | None
    input_candidates: tuple[str, ...]
    input_is_sum: bool | None
    observation: Observation | None
    routing: Routing | None
    group: int
    adapters: nn.Module | None
    recall: CachedOutput | None
    engine: Engine | None
    columns = cast("slice | None", None)  # input channels of a split layer that it reads; kept by `transplant`

    # ── making one ───────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    @lasting
    def skeleton(
        cls,
        module: nn.Module,
        module_name: str,
        weight_format: FPFormat,
        device: torch.device | str = "meta",
        num_banks: int = 1,
        group_size: int | None = None,
    ) -> "QuantLayer":
        """An empty quantized layer for a float one, with its hooks and a float input.

        Args:
            module (`nn.Module`): the float original; its weight is not read.
            module_name (`str`): its full name in the model, used in messages and as a seed.
            num_banks (`int`): weights to make room for.
            group_size (`int`, *optional*): weights that share a multiplier of their channel's scale; None for all.
        """
        layer = transplant(module, cls)
        share_hooks(module, layer)
        layer.module_name, layer.weight_format, layer.weight_dtype = module_name, weight_format, weight_of(module).dtype
        layer.group_size, layer.input_format, layer.input_candidates, layer.observation = group_size, None, (), None
        layer.scheme, layer.input_is_sum = None, None
        layer.routing, layer.group, layer.adapters, layer.recall, layer.engine = None, 0, None, None, None
        layer.make_room(num_banks, device)
        rows, _ = layer.matrix_shape
        layer.register_buffer("weight_scale", torch.ones(rows, dtype=torch.float32, device=device))
        layer.register_buffer("weight_error", torch.zeros((), dtype=torch.float32, device=device))
        if group_size is not None:
            layer.put_multipliers(torch.ones(rows, layer.num_groups, dtype=torch.uint8, device=device))
        return layer

    @classmethod
    def from_float(
        cls, module: nn.Module, module_name: str, scheme: LayerScheme, weight: Tensor | None = None
    ) -> "QuantLayer":
        """Quantize a float layer: search, encode, pack. Its input is observed if the scheme quantizes it.

        Args:
            module (`nn.Module`): the float original, not changed.
            module_name (`str`): its full name in the model.
            scheme (`LayerScheme`): candidate formats.
            weight (`Tensor`, *optional*): used instead of `module.weight`, which may be on the meta device then.

        Raises:
            NonFiniteError: the weight holds NaN or infinity.
        """
        weight = weight_of(module).detach() if weight is None else weight
        check_finite(weight, f"The weight of layer `{module_name}`")
        size = scheme.group_size
        result = search_groups(weight, scheme.weight, size) if size else search_weight(weight, scheme.weight)
        layer = cls.skeleton(module, module_name, result.qparams.format, device=weight.device, group_size=size)
        if result.multipliers is not None:
            layer.put_multipliers(result.multipliers)
        layer.weight_scale.copy_(result.qparams.scale.flatten())
        layer.weight_error.copy_(result.error)
        layer._store(weight)
        layer.scheme = scheme
        if scheme.activation:
            layer.start_observing(scheme.activation)
        return layer

    @lasting
    def make_room(self, num_banks: int, device: torch.device | str = "meta") -> None:
        """Empty packed weights for this many banks."""
        self.changed()
        rows, length = self.matrix_shape
        axes = max(len(self.logical_shape), 3)
        shape = (num_banks * rows,) + (1,) * (axes - 2) + (packed_size(length, self.weight_format.bits),)
        self.packed_weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)

    def _store(self, weight: Tensor, bank: int = 0) -> None:
        """Encode and pack, some rows at a time: the temporaries of a large layer would outweigh it many times."""
        rows, length = self.matrix_shape
        matrix, packed = weight.reshape(rows, length), self.packed_bank(bank)
        step = max(1, _CHUNK // max(1, length))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            scale = self.weight_qparams(part).scale
            codes = encode(matrix[part].reshape(-1, self.rows_shape[1]), QParams(self.weight_format, scale))
            packed[part] = pack(codes.view(-1, length), self.weight_format.bits)

    def packed_bank(self, bank: int | Tensor) -> Tensor:
        """One bank's codes, `(C, bytes)`; a view where `bank` is a number."""
        packed = self.packed_weight
        banks = packed.view(self.num_banks, self.matrix_shape[0], packed.shape[-1])
        return select(banks, bank)

    @torch.no_grad()
    def store_banks(self, weights: Sequence[Tensor], original: Tensor | None = None) -> None:
        """Encode and pack one weight per bank, with the scales that the layer has.

        Args:
            weights (`Sequence[Tensor]`): float, each of `logical_shape`; values of the grid are stored as they are.
            original (`Tensor`, *optional*): what `weight_error` is measured against instead of each weight itself.
        """
        self.make_room(len(weights), self.packed_weight.device)
        error = energy = 0.0
        for bank, weight in enumerate(weights):
            self._store(weight, bank)
            meant = weight if original is None else original
            error += (self.dequantize_weight(bank) - meant).square().sum().item()
            energy += meant.square().sum().item()
        self.weight_error.fill_(error / energy if energy else 0.0)

    @torch.no_grad()
    def put_weight(self, packed: Tensor, error: Tensor) -> None:
        """Take codes that were packed before, of the same shape, with the error that was measured for them."""
        self.packed_weight.copy_(packed)
        self.weight_error.copy_(error)
        self.changed()

    @lasting
    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """A float layer with the decoded weight, and the hooks that this one has."""
        module = transplant(self, self.float_class)
        share_hooks(self, module)
        module.weight = nn.Parameter(self.dequantize_weight().to(dtype))
        return module

    # ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    @abstractmethod
    def logical_shape(self) -> tuple[int, ...]:
        """Shape of the float weight; output channels first."""

    def check_original(self, weight: Tensor) -> None:
        """Refuse a float weight that this layer cannot have been quantized from.

        Raises:
            ShapeError: it has another shape.
        """
        if tuple(weight.shape) != tuple(self.logical_shape):
            raise ShapeError(
                f"The teacher's `{self.module_name}` must have shape {tuple(self.logical_shape)}, but got "
                f"{tuple(weight.shape)}: not the model that was quantized."
            )

    # ── the input's range ────────────────────────────────────────────────────────────────────────────────────

    @property
    def observing(self) -> bool:
        """Whether the input stays float for now and is watched."""
        return bool(self.input_candidates)

    @lasting
    def start_observing(self, candidates: Sequence[str], observation: Observation | None = None) -> None:
        """Leave the input float and watch it, until `freeze`."""
        self.changed()
        self.input_candidates, self.input_format, self.input_is_sum = tuple(candidates), None, None
        self.observation = observation or Observation()
        for name in INPUT_TENSORS:
            if name in tensors_of(self):
                delattr(self, name)

    def freeze(self) -> bool:
        """Choose the input's format, scale and zero point from what was seen.

        Returns:
            `bool`: False if nothing was seen; the input then stays float for good.
        """
        observation = cast(Observation, self.observation)
        values = observation.drawn()
        if len(values):
            result = search_activation(values, self.input_candidates, observation.bounds())
            self.expect_input(result.qparams.format, self.weight_scale.device)
            stored = (result.qparams.scale, result.qparams.zero_point, result.error)
            for name, value in zip(INPUT_TENSORS, stored, strict=True):
                getattr(self, name).copy_(value)
        self.input_candidates, self.input_is_sum, self.observation = (), None, None
        self.changed()
        return bool(len(values))

    @lasting
    def expect_input(self, fmt: FPFormat, device: torch.device | str = "meta", num_sets: int = 0) -> None:
        """Make room for the parameters of an input of this format: one for each bank, or sets for timesteps."""
        self.changed()
        self.input_format = fmt
        several = num_sets or (self.num_banks if self.num_banks > 1 else 0)
        for name in INPUT_TENSORS:
            shape = (several,) if several and name != "input_error" else ()
            self.register_buffer(name, torch.ones(shape, dtype=torch.float32, device=device))

    def store_input(self, scale: Tensor, zero_point: Tensor, error: Tensor | None = None) -> None:
        """Take other parameters of the input, one for each bank, or `(S,)` for timesteps; the error stays if not given.

        Args:
            scale, zero_point (`Tensor`): `()`, `(K,)` or `(S,)`.
            error (`Tensor`, `()`, *optional*): measured with them.
        """
        error = self.input_error if error is None else error
        num_sets = scale.shape[0] if scale.ndim and self.num_banks == 1 else 0
        self.expect_input(cast(FPFormat, self.input_format), scale.device, num_sets)
        for name, value in zip(INPUT_TENSORS, (scale, zero_point, error), strict=True):
            getattr(self, name).copy_(value.view_as(getattr(self, name)))

    def route_by(self, routing: Routing | None, group: int = 0) -> None:
        """Ask `routing` which bank or adapter to use; it belongs to the model, not to the layer's own modules."""
        self.__dict__.update(routing=routing, group=group)
        self.changed()

    # ── use ──────────────────────────────────────────────────────────────────────────────────────────────────

    @abstractmethod
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operation of this kind of layer."""

    def extra_repr(self) -> str:
        """Formats beside the original's sizes."""
        state = "observing" if self.observing else (self.input_format or "float")
        banks = f", banks={self.num_banks}" if self.num_banks > 1 else ""
        banks += f", sets={self.num_sets}" if self.num_sets else ""
        groups = f" in groups of {self.group_size}" if self.group_size else ""
        return f"{super().extra_repr()}, weight={self.weight_format}{groups}, input={state}{banks}"

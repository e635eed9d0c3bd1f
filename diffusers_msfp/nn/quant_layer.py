"""What all quantized layers share: stored tensors, observation of the input, and the two quantizers.

A quantized layer is a leaf that takes the place of its float original. It keeps the original's class as a base, so
PEFT finds it, and the original's attributes. Stored tensors:

| name | shape | dtype | meaning |
|---|---|---|---|
| `weight` | `(C, 1, …, bytes)`, as many axes as the convolution's weight, 3 for a linear | uint8 | packed codes |
| `weight_scale` | `(C,)` | float32 | scale of each output channel |
| `weight_error` | `()` | float32 | squared error of the weight divided by its sum of squares |
| `input_scale`, `input_zero_point`, `input_error` | `()` | float32 | the input's parameters; absent if it stays float |
| `observed_sample`, `observed_count`, `observed_range` | see `Observation` | | only while observing |
| `bias` | as the original | as the model | untouched |

The bytes stand in the *last* axis, where no float weight of more than one input feature can broadcast onto them: an
adapter merged by force fails instead of corrupting codes.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from ..calibration import Observation, observe, search_activation, search_weight
from ..errors import CheckpointError
from ..formats import FPFormat
from ..numerics import QParams, decode, encode, fake_quantize, pack, packed_size, unpack
from ..numerics.rounding import check_finite
from ..schemes import LayerScheme

OBSERVED = ("observed_sample", "observed_count", "observed_range")
INPUT_TENSORS = ("input_scale", "input_zero_point", "input_error")
_CHUNK = 2**21  # weights encoded at once
WEIGHT_TENSORS = ("weight_scale", "weight_error")


def _transplant(source: nn.Module, cls: type[nn.Module]) -> nn.Module:
    """An empty module of another class with the plain attributes (sizes, strides, …) and the bias of `source`."""
    module = object.__new__(cls)
    nn.Module.__init__(module)
    own = set(module.__dict__) | set(QuantLayer.__annotations__)
    module.__dict__.update({key: value for key, value in vars(source).items() if key not in own})
    module.train(source.training)
    module.register_parameter("bias", source.bias)
    return module


class QuantLayer(nn.Module, ABC):
    """Abstract base of the quantized layers. Made by `from_float` or `skeleton`, never by its constructor.

    Calling the class like its float original returns a *float* layer of that kind: PEFT builds a convolution's
    adapters with `type(base_layer)(…)`.
    """

    float_class: type[nn.Module]
    place: str
    weight_format: FPFormat
    input_format: FPFormat | None
    input_candidates: tuple[str, ...]
    observation: Observation | None

    def __new__(cls, *args, **kwargs):
        """A float layer for the public constructor; an empty object for `copy` and `pickle`."""
        if args or kwargs:
            return cls.float_class(*args, **kwargs)
        return super().__new__(cls)

    # ── making one ───────────────────────────────────────────────────────────────────────────────────────────

    @classmethod
    def skeleton(cls, module: nn.Module, place: str, weight_format: FPFormat, device: torch.device | str = "meta"):
        """An empty quantized layer for a float one, with a float input.

        Args:
            module (`nn.Module`): the float original; its weight is not read.
            place (`str`): its full name in the model, used in messages and as a seed.
        """
        layer = _transplant(module, cls)
        layer.place, layer.weight_format = place, weight_format
        layer.input_format, layer.input_candidates, layer.observation = None, (), None
        rows, length = layer.matrix_shape
        axes = max(len(layer.logical_shape), 3)
        shape = (rows,) + (1,) * (axes - 2) + (packed_size(length, weight_format.bits),)
        layer.weight = nn.Parameter(torch.empty(shape, dtype=torch.uint8, device=device), requires_grad=False)
        layer.register_buffer("weight_scale", torch.ones(rows, device=device))
        layer.register_buffer("weight_error", torch.zeros((), device=device))
        return layer

    @classmethod
    def from_float(cls, module: nn.Module, place: str, scheme: LayerScheme, weight: Tensor | None = None):
        """Quantize a float layer: search, encode, pack. Its input is observed if the scheme quantizes it.

        Args:
            module (`nn.Module`): the float original, not changed.
            place (`str`): its full name in the model.
            scheme (`LayerScheme`): candidate formats.
            weight (`Tensor`, *optional*): used instead of `module.weight`, which may be on the meta device then.

        Raises:
            NonFiniteError: the weight holds NaN or infinity.
        """
        weight = module.weight.detach() if weight is None else weight
        check_finite(weight, f"The weight of layer `{place}`")
        result = search_weight(weight, scheme.weight)
        layer = cls.skeleton(module, place, result.qparams.format, device=weight.device)
        layer.weight_scale.copy_(result.qparams.scale.flatten())
        layer.weight_error.copy_(result.error)
        layer._store(weight)
        if scheme.activation:
            layer.start_observing(scheme.activation)
        return layer

    def _store(self, weight: Tensor) -> None:
        """Encode and pack, some rows at a time: the temporaries of a large layer would outweigh it many times."""
        rows, length = self.matrix_shape
        matrix, packed = weight.reshape(rows, length), self.weight.data.view(rows, -1)
        step = max(1, _CHUNK // max(1, length))
        for start in range(0, rows, step):
            part = slice(start, start + step)
            codes = encode(matrix[part], QParams(self.weight_format, self.weight_scale[part, None]))
            packed[part] = pack(codes, self.weight_format.bits)

    def to_float(self, dtype: torch.dtype) -> nn.Module:
        """A float layer with the decoded weight."""
        module = _transplant(self, self.float_class)
        module.weight = nn.Parameter(self.dequantize_weight().to(dtype))
        return module

    # ── shapes ───────────────────────────────────────────────────────────────────────────────────────────────

    @property
    @abstractmethod
    def logical_shape(self) -> tuple[int, ...]:
        """Shape of the float weight; output channels first."""

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Output channels and weights per output channel."""
        rows, *rest = self.logical_shape
        length = 1
        for size in rest:
            length *= size
        return rows, length

    # ── the input's range ────────────────────────────────────────────────────────────────────────────────────

    @property
    def observing(self) -> bool:
        """Whether the input stays float for now and is watched."""
        return bool(self.input_candidates)

    @property
    def observed(self) -> dict[str, Tensor]:
        """What was seen so far, by the names it is stored under; the sample is as long as it is full."""
        if self.observation is None:
            return {}
        return dict(
            zip(OBSERVED, (self.observation.drawn(), self.observation.count, self.observation.range), strict=True)
        )

    def __getattr__(self, name: str):
        """Make `OBSERVED` tensors look like stored ones; diffusers looks a name up before it loads it."""
        if name in OBSERVED and name in self.observed:
            return self.observed[name]
        return super().__getattr__(name)

    def start_observing(self, candidates: Sequence[str], observation: Observation | None = None) -> None:
        """Leave the input float and watch it, until `freeze`."""
        self.input_candidates, self.input_format = tuple(candidates), None
        self.observation = observation or Observation()
        for name in INPUT_TENSORS:
            self._buffers.pop(name, None)

    def freeze(self) -> bool:
        """Choose the input's format, scale and zero point from what was seen.

        Returns:
            `bool`: False if nothing was seen; the input then stays float for good.
        """
        values = self.observation.values()
        if len(values):
            result = search_activation(values, self.input_candidates)
            self.expect_input(result.qparams.format, self.weight.device)
            stored = (result.qparams.scale, result.qparams.zero_point, result.error)
            for name, value in zip(INPUT_TENSORS, stored, strict=True):
                getattr(self, name).copy_(value)
        self.input_candidates, self.observation = (), None
        return bool(len(values))

    def expect_input(self, fmt: FPFormat, device: torch.device | str = "meta") -> None:
        """Make room for the parameters of an input of this format."""
        self.input_format = fmt
        for name in INPUT_TENSORS:
            self.register_buffer(name, torch.ones((), device=device))

    # ── use ──────────────────────────────────────────────────────────────────────────────────────────────────

    def weight_qparams(self) -> QParams:
        """Scale `(C, 1)`: of the weight as a matrix."""
        scale = self.weight_scale[:, None]
        return QParams.unchecked(self.weight_format, scale, torch.zeros_like(scale))

    def input_qparams(self) -> QParams:
        """Scale and zero point of shape `()`."""
        return QParams.unchecked(self.input_format, self.input_scale, self.input_zero_point)

    def dequantize_weight(self) -> Tensor:
        """The weight as the layer uses it: float32, `logical_shape`."""
        rows, length = self.matrix_shape
        codes = unpack(self.weight.view(rows, -1), self.weight_format.bits, length)
        return decode(codes, self.weight_qparams()).view(self.logical_shape)

    def quantize_input(self, x: Tensor) -> Tensor:
        """The input as the layer uses it, float32: observed, fake-quantized, or as it is."""
        if self.observing:
            observe(self.observation, x, self.place)
        elif self.input_format is not None:
            if torch.compiler.is_compiling():
                torch._assert_async(torch.isfinite(x).all(), f"The input of layer `{self.place}` must be finite.")
            else:
                check_finite(x, f"The input of layer `{self.place}`")
            return fake_quantize(x.to(torch.float32), self.input_qparams())
        return x.to(torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        """Quantize the input, decode the weight, compute in float32, return the dtype of `x`."""
        bias = None if self.bias is None else self.bias.to(torch.float32)
        return self.compute(self.quantize_input(x), self.dequantize_weight(), bias).to(x.dtype)

    @abstractmethod
    def compute(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The float operation of this kind of layer."""

    # ── integrity ────────────────────────────────────────────────────────────────────────────────────────────

    def exact_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that must stay float32 whatever the model is cast to."""
        for name in (*WEIGHT_TENSORS, *INPUT_TENSORS):
            if (tensor := self._buffers.get(name)) is not None:
                yield name, tensor

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """Stored tensors, and while observing what was seen; the sample is as long as it is full."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.observed.items()})

    def load_observed(self, name: str, value: Tensor) -> None:
        """Take one of the `OBSERVED` tensors from a checkpoint, in any order.

        Raises:
            CheckpointError: a shape or dtype that no observation has.
        """
        target = getattr(self.observation, name.removeprefix("observed_"))
        fits = value.ndim == 1 and len(value) <= len(target) if name == OBSERVED[0] else value.shape == target.shape
        if not fits or value.dtype != target.dtype:
            raise CheckpointError(
                f"`{self.place}.{name}` must be {target.dtype} of shape {tuple(target.shape)}, but {value.dtype} of "
                f"shape {tuple(value.shape)} came: damaged file."
            )
        (target[: len(value)] if name == OBSERVED[0] else target).copy_(value)

    def _apply(self, fn, recurse=True):
        """Move with the model, but keep scales exact when it is cast."""
        exact = dict(self.exact_tensors())
        super()._apply(fn, recurse)
        for name, tensor in exact.items():
            moved = self._buffers[name]
            if moved.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(moved.device)
        return self

    def check_stored(self) -> None:
        """Refuse tensors that no quantization could have written.

        Raises:
            CheckpointError: a scale that is not finite and positive, or a positive zero point.
        """
        for name in ("weight_scale", "input_scale"):
            scale = self._buffers.get(name)
            if scale is not None and not (torch.isfinite(scale).all() and (scale > 0).all()):
                raise CheckpointError(f"`{self.place}.{name}` must be finite and > 0, but it is not: damaged file.")
        zero_point = self._buffers.get("input_zero_point")
        if zero_point is not None:
            value = float(zero_point)
            if not -float("inf") < value <= 0 or (self.input_format.signed and value != 0):
                raise CheckpointError(
                    f"`{self.place}.input_zero_point` must be finite and ≤ 0, and 0 for a signed format, but {value} "
                    f"came for `{self.input_format}`: damaged file."
                )

    def extra_repr(self) -> str:
        """Formats beside the original's sizes."""
        state = "observing" if self.observing else (self.input_format or "float")
        return f"{super().extra_repr()}, weight={self.weight_format}, input={state}"

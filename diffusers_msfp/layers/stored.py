"""The tensors that a quantized layer keeps: exact under casts, checked when they are loaded."""

from collections.abc import Callable, Collection, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from ..compat.torch import StatefulModule, tensors_of
from ..errors import CheckpointError, UnsupportedError
from ..formats import MULTIPLIER_BITS, FPFormat, largest_integer, largest_multiplier
from ..numerics import pack, unpack
from ..numerics.groups import num_groups

FORMATS_TENSOR = "formats"
OBSERVED = ("observed_sample", "observed_count", "observed_range")
INPUT_TENSORS = ("input_scale", "input_zero_point", "input_error")
GROUP_SCALE = "group_scale"
WEIGHT_TENSORS = ("weight_scale", "weight_error", GROUP_SCALE)
PACKED_WEIGHT = "packed_weight"
"""The packed codes' name in a layer; files call them `weight`, as they call the float weight that they stand for."""


def name_in_files(key: str) -> str:
    """What files call a tensor of a model's state dict."""
    return key.removesuffix(PACKED_WEIGHT) + "weight" if key.endswith(f".{PACKED_WEIGHT}") else key


def name_in_state(key: str, quantized: Collection[str]) -> str:
    """Inverse of `name_in_files`, with the names of a model's quantized layers."""
    module_name, _, tensor = key.rpartition(".")
    return f"{module_name}.{PACKED_WEIGHT}" if tensor == "weight" and module_name in quantized else key


_OBSERVING = 255
_IS_SUM = (0, 1, _OBSERVING)


def formats_tensor(
    weight: FPFormat,
    input: FPFormat | None,
    observing: bool = False,
    is_sum: bool | None = None,
    group_size: int | None = None,
) -> Tensor:
    """A layer's formats as a checkpoint's tensor, so that no state can be read with other ones.

    Args:
        weight (`FPFormat`), input (`FPFormat`, *optional*): None if the input stays float.
        observing (`bool`): whether the input's format is not chosen yet.
        is_sum (`bool`, *optional*): whether an observed input is a residual sum; None where it is not known yet.
        group_size (`int`, *optional*): of the weight's groups.

    Returns:
        `Tensor`, `(2, 3)`, uint8: signed, exponent bits, mantissa bits of the weight and of the input; zeros for a
        float input, 255 for one that is being observed, at the end 1 or 0 where it is known to be a sum or none. With
        groups `(3, 3)`: at the end the three bytes of their size, the lowest first.
    """
    rows = [[fmt.signed, fmt.exponent_bits, fmt.mantissa_bits] if fmt else [0, 0, 0] for fmt in (weight, input)]
    read = [_OBSERVING, _OBSERVING, _OBSERVING if is_sum is None else is_sum] if observing else rows[1]
    groups = [] if group_size is None else [list(group_size.to_bytes(3, "little"))]
    return torch.tensor([rows[0], read, *groups], dtype=torch.uint8, device="cpu")  # models are made on the meta device


def same_formats(a: Tensor, b: Tensor) -> bool:
    """Whether two of `formats_tensor` say the same formats; of inputs that are being observed, none is chosen."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    observing = all(t[1, 0] == _OBSERVING and t[1, 2] in _IS_SUM for t in (a, b))
    compared = 5 if observing else 6
    parts = slice(compared), slice(6, None)
    return all(torch.equal(a.flatten()[part], b.flatten()[part]) for part in parts)


def observed_is_sum(tensor: Tensor) -> bool | None:
    """What `formats_tensor` says of an observed input: whether it is a residual sum; None where it is not known."""
    signed, _, is_sum = tensor[1].tolist()
    return None if signed != _OBSERVING or is_sum == _OBSERVING else bool(is_sum)


def say_formats(tensor: Tensor) -> str:
    """What `formats_tensor` made, in words."""
    if tensor.dtype != torch.uint8 or tuple(tensor.shape) not in ((2, 3), (3, 3)):
        return f"{tensor.dtype} of shape {tuple(tensor.shape)}"
    words = []
    for signed, exponent, mantissa in tensor[:2].tolist():
        named = f"fp{signed + exponent + mantissa}_{'' if signed else 'u'}e{exponent}m{mantissa}"
        words.append("observing" if signed == _OBSERVING else named if exponent else "float")
    groups = "".join(f" in groups of {int.from_bytes(bytes(size), 'little')}" for size in tensor[2:].tolist())
    return f"weight {words[0]}{groups}, input {words[1]}"


Own = TypeVar("Own", bound="StoredTensors")
Function = TypeVar("Function", bound=Callable)


def lasting(function: Function) -> Function:
    """Let what a function makes be trained later, also where it is called in `torch.inference_mode`."""
    return torch.inference_mode(False)(torch.no_grad()(function))


class StoredTensors(StatefulModule):
    """Abstract base of `QuantLayer`: what concerns its tensors as a checkpoint's, not as numbers to compute with."""

    @property
    def num_banks(self) -> int:
        """K, packed weights that the layer holds."""
        return max(1, self.packed_weight.shape[0] // max(1, self.logical_shape[0]))

    @property
    def num_sets(self) -> int:
        """S, parameter sets of the input among which the timestep chooses; 0 without."""
        scale = tensors_of(self).get("input_scale")
        return scale.shape[0] if scale is not None and scale.ndim and self.num_banks == 1 else 0

    def input_range(self) -> tuple[Tensor, Tensor]:
        """Scale and zero point of the input, `()`, or `(K,)` or `(S,)` for each bank or set."""
        return self.input_scale, self.input_zero_point

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Output channels and weights per output channel."""
        rows, *rest = self.logical_shape
        length = 1
        for size in rest:
            length *= size
        return rows, length

    @property
    def num_groups(self) -> int:
        """Groups of each output channel; 0 without."""
        return 0 if self.group_size is None else num_groups(self.matrix_shape[1], self.group_size)

    @property
    def has_whole_groups(self) -> bool:
        """Whether all groups are of equal size, so that they can be rows of a matrix."""
        return self.group_size is not None and self.matrix_shape[1] % self.group_size == 0

    @property
    def rows_shape(self) -> tuple[int, int]:
        """The weight as a matrix with a scale for each row, where groups allow it; see `weight_qparams`."""
        rows, length = self.matrix_shape
        return (rows * self.num_groups, self.group_size) if self.has_whole_groups else (rows, length)

    def multipliers(self, part: slice = slice(None)) -> Tensor:
        """Of the groups of some output channels, `(C, groups)` uint8."""
        return unpack(self.group_scale[part], MULTIPLIER_BITS, self.num_groups)

    @lasting
    def put_multipliers(self, multipliers: Tensor) -> None:
        """Take a multiplier for each group, `(C, groups)` uint8."""
        self.register_buffer(GROUP_SCALE, pack(multipliers, MULTIPLIER_BITS))

    @property
    def largest_weight(self) -> int:
        """What no integer of the weight, multiplier included, can exceed."""
        return largest_integer(self.weight_format, grouped=self.group_size is not None)

    @property
    def packed_bytes(self) -> int:
        """Of one bank's codes and all scales."""
        groups = 0 if self.group_size is None else self.group_scale.numel()
        return self.packed_weight.numel() // self.num_banks + 4 * self.weight_scale.numel() + groups

    @property
    def observed(self) -> dict[str, Tensor]:
        """What was seen so far, by the names it is stored under; the sample is as long as it is full."""
        if self.observation is None:
            return {}
        return dict(
            zip(OBSERVED, (self.observation.drawn(), self.observation.count, self.observation.range), strict=True)
        )

    def __getattr__(self, name: str) -> Any:
        """Make `OBSERVED` tensors look like stored ones; diffusers looks a name up before it loads it."""
        if name in OBSERVED and name in self.observed:
            return self.observed[name]
        return super().__getattr__(name)

    def exact_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that must stay as they are whatever the model is cast to."""
        own = tensors_of(self)
        yield from ((name, own[name]) for name in (*WEIGHT_TENSORS, *INPUT_TENSORS) if name in own)

    def formats_tensor(self) -> Tensor:
        """See the function of this name."""
        return formats_tensor(self.weight_format, self.input_format, self.observing, self.input_is_sum, self.group_size)

    def take_formats(self, said: Tensor | None) -> None:
        """Of a state's formats, which are this layer's, what is known of an observed input; None says nothing."""
        is_sum = None if said is None else observed_is_sum(said)
        if is_sum is not None:
            self.expect_sum(is_sum)

    def more_state(self) -> dict[str, Tensor]:
        """The formats, and while observing what was seen; the sample is as long as it is full.

        A layer without weights yet, on the meta device, has no formats to say: a checkpoint's record does.
        """
        said = {} if self.weight_scale.is_meta else {FORMATS_TENSOR: self.formats_tensor()}
        return self.observed | said

    def requires_grad_(self: Own, requires_grad: bool = True) -> Own:
        """As of a float layer, with True refused: packed weights cannot be trained.

        Raises:
            UnsupportedError: `requires_grad` is true.
        """
        if requires_grad:
            raise UnsupportedError(
                f"The weight of `{self.module_name}` is packed, so it cannot be trained, but got "
                f"`requires_grad_(True)`. "
                f"Train an adapter on it, or its bias alone (`layer.bias.requires_grad_(True)`)."
            )
        return super().requires_grad_(False)

    def load_observed(self, name: str, value: Tensor) -> None:
        """Take one of the `OBSERVED` tensors from a checkpoint, in any order.

        Raises:
            CheckpointError: a shape or dtype that no observation has.
        """
        target = getattr(self.observation, name.removeprefix("observed_"))
        fits = value.ndim == 1 and len(value) <= len(target) if name == OBSERVED[0] else value.shape == target.shape
        if not fits or value.dtype != target.dtype:
            raise CheckpointError(
                f"`{self.module_name}.{name}` must be {target.dtype} of shape {tuple(target.shape)}, but got "
                f"{value.dtype} of shape {tuple(value.shape)}: damaged file."
            )
        (target[: len(value)] if name == OBSERVED[0] else target).copy_(value)

    def check_stored(self) -> None:
        """Refuse tensors that no quantization could have written.

        Raises:
            CheckpointError: a scale that is not finite and positive, a positive zero point, or an error that is NaN.
        """
        own = tensors_of(self)
        for name in ("weight_error", "input_error"):
            error = own.get(name)
            if error is not None and not torch.isfinite(error).all():
                raise CheckpointError(f"`{self.module_name}.{name}` must be finite, but it is not: damaged file.")
        for name in ("weight_scale", "input_scale"):
            scale = own.get(name)
            if scale is not None and not (torch.isfinite(scale).all() and (scale > 0).all()):
                raise CheckpointError(
                    f"`{self.module_name}.{name}` must be finite and > 0, but it is not: damaged file."
                )
        if self.group_size is not None:
            largest, multipliers = largest_multiplier(self.weight_format), self.multipliers()
            if not ((multipliers >= 1) & (multipliers <= largest)).all():
                raise CheckpointError(
                    f"`{self.module_name}.{GROUP_SCALE}` must hold multipliers from 1 to {largest} for "
                    f"`{self.weight_format}`, but it does not: damaged file."
                )
        zero_point = own.get("input_zero_point")
        if zero_point is not None:
            fits = zero_point == 0 if self.input_format.signed else zero_point <= 0
            if not (torch.isfinite(zero_point) & fits).all():
                raise CheckpointError(
                    f"`{self.module_name}.input_zero_point` must be finite and ≤ 0, and 0 for a signed format, but got "
                    f"{zero_point.tolist()} for `{self.input_format}`: damaged file."
                )
        if self.adapters is not None:
            self.adapters.check_values(self.module_name)

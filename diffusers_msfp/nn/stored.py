"""The tensors that a quantized layer keeps: exact under casts, checked when they are loaded."""

from collections.abc import Collection, Iterator

import torch
from torch import Tensor

from ..compat.torch import CastAware, tensors_of
from ..errors import CheckpointError

OBSERVED = ("observed_sample", "observed_count", "observed_range")
INPUT_TENSORS = ("input_scale", "input_zero_point", "input_error")
WEIGHT_TENSORS = ("weight_scale", "weight_error")
PACKED_WEIGHT = "packed_weight"
"""The packed codes' name in a layer; files call them `weight`, as they call the float weight that they stand for."""


def name_in_files(key: str) -> str:
    """What files call a tensor of a model's state dict."""
    return key.removesuffix(PACKED_WEIGHT) + "weight" if key.endswith(f".{PACKED_WEIGHT}") else key


def name_in_state(key: str, quantized: Collection[str]) -> str:
    """Inverse of `name_in_files`, with the names of a model's quantized layers."""
    place, _, tensor = key.rpartition(".")
    return f"{place}.{PACKED_WEIGHT}" if tensor == "weight" and place in quantized else key


class StoredTensors(CastAware):
    """Abstract base of `QuantLayer`: what concerns its tensors as a checkpoint's, not as numbers to compute with."""

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

    def exact_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Buffers that must stay float32 whatever the model is cast to."""
        own = tensors_of(self)
        yield from ((name, own[name]) for name in (*WEIGHT_TENSORS, *INPUT_TENSORS) if name in own)

    def _save_to_state_dict(self, destination, prefix, keep_vars) -> None:
        """Stored tensors, and while observing what was seen; the sample is as long as it is full."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.observed.items()})

    def _load_from_state_dict(self, state_dict, prefix, *arguments) -> None:
        """As of any module; codes may also have the name that they have in files."""
        if f"{prefix}weight" in state_dict:
            state_dict[f"{prefix}{PACKED_WEIGHT}"] = state_dict.pop(f"{prefix}weight")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

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

    def check_stored(self) -> None:
        """Refuse tensors that no quantization could have written.

        Raises:
            CheckpointError: a scale that is not finite and positive, a positive zero point, or an error that is NaN.
        """
        own = tensors_of(self)
        for name in ("weight_error", "input_error"):
            error = own.get(name)
            if error is not None and not torch.isfinite(error).all():
                raise CheckpointError(f"`{self.place}.{name}` must be finite, but it is not: damaged file.")
        for name in ("weight_scale", "input_scale"):
            scale = own.get(name)
            if scale is not None and not (torch.isfinite(scale).all() and (scale > 0).all()):
                raise CheckpointError(f"`{self.place}.{name}` must be finite and > 0, but it is not: damaged file.")
        zero_point = own.get("input_zero_point")
        if zero_point is not None:
            fits = zero_point == 0 if self.input_format.signed else zero_point <= 0
            if not (torch.isfinite(zero_point) & fits).all():
                raise CheckpointError(
                    f"`{self.place}.input_zero_point` must be finite and ≤ 0, and 0 for a signed format, but "
                    f"{zero_point.tolist()} came for `{self.input_format}`: damaged file."
                )
        if self.adapters is not None:
            self.adapters.check(self.place)

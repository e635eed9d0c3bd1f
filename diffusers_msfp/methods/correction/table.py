"""The table of a corrected output, and the hook that applies it in a model's forward."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...compat.accelerate import onloaded
from ...compat.torch import StatefulModule
from ...errors import CheckpointError, ConfigError
from ...sampling.timestep import Timestep, TimestepArgument
from ...sampling.used_output import sample_of
from ..routes import routing_of

CORRECTION = "output_correction"
"""Where a model has its `CorrectionTable`."""
COEFFICIENTS = ("a", "b", "c")
MAX_ENTRIES = 2**16


@dataclass(frozen=True)
class CorrectionPlan:
    """The size of a table; `output_correction` in `quantization_config`.

    Args:
        entries (`int`): S, timesteps.
        channels (`int`): C, of the output, without variances.

    Raises:
        CheckpointError: anything that no fit could have written.
    """

    entries: int
    channels: int

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MAX_ENTRIES:
                raise CheckpointError(
                    f"`{CORRECTION}.{name}` in config.json must lie in 1 … {MAX_ENTRIES}, but got {value!r}: damaged "
                    f"file."
                )

    def to_dict(self) -> dict:
        """In types that JSON knows."""
        return asdict(self)


class CorrectionTable(StatefulModule):
    """`a_t * output + b_t * sample + c_t`, linear in t between the timesteps of the table, constant beyond its ends.

    Args:
        timesteps (`Tensor`, `(S,)`, float32): as the model gets them, ascending.
        a, b, c (`Tensor`, `(S, C)`, float32): by timestep and channel of the output.

    Raises:
        CheckpointError: other shapes, dtypes or order, or values that are not finite.
    """

    timesteps: Tensor
    a: Tensor
    b: Tensor
    c: Tensor

    def __init__(self, timesteps: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
        super().__init__()
        for name, value in zip(("timesteps", *COEFFICIENTS), (timesteps, a, b, c), strict=True):
            self.register_buffer(name, value)
        self.check()

    @property
    def plan(self) -> CorrectionPlan:
        """Its size."""
        return CorrectionPlan(*self.a.shape)

    def check(self, name: str = CORRECTION) -> None:
        """Refuse a table that no fit could have written."""
        known, size = self.timesteps, (len(self.timesteps), self.a.shape[-1])
        fits = all(tensor.dtype == torch.float32 for tensor in self.buffers()) and known.ndim == 1 and len(known)
        fits = fits and all(tuple(getattr(self, key).shape) == size for key in COEFFICIENTS)
        if fits and not known.is_meta:
            fits = all(bool(tensor.isfinite().all()) for tensor in self.buffers()) and bool((known.diff() > 0).all())
        if not fits:
            raise CheckpointError(
                f"`{name}` must have finite, ascending timesteps `(S,)` and `a`, `b`, `c` `(S, C)`, all float32, but "
                f"it does not: damaged file."
            )

    def coefficients(self, timestep: Timestep) -> Tensor:
        """`(3, B or 1, C)`: a, b and c at a timestep, or at one for each sample."""
        known = self.timesteps
        wanted = torch.as_tensor(timestep).detach().to(known.device, known.dtype).reshape(-1)
        table = torch.stack([self.a, self.b, self.c])
        if len(known) == 1:
            return table.expand(-1, len(wanted), -1)
        above = (known < wanted[:, None]).sum(1).clamp(1, len(known) - 1)  # in operators that exported graphs have too
        start, end = known[above - 1], known[above]
        share = ((wanted - start) / (end - start)).clamp(0, 1)[:, None]
        return table[:, above - 1] * (1 - share) + table[:, above] * share

    def correct(self, prediction: Tensor, sample: Tensor, timestep: Timestep) -> Tensor:
        """The corrected prediction, in its dtype.

        Args:
            prediction, sample (`Tensor`, `(B, C, …)`, or `(B, N, C)` for sequences): the model's output and input.
            timestep: of the call, or of each sample.
        """
        shape = (
            (-1, 1, self.a.shape[-1]) if prediction.ndim == 3 else (-1, self.a.shape[-1], *[1] * (prediction.ndim - 2))
        )
        with onloaded(self):
            found = self.coefficients(timestep).to(prediction.device)  # what groups of modules are moved by leaves it
        a, b, c = (part.reshape(shape) for part in found)
        corrected = a * prediction + c
        return (corrected + b * sample if sample.shape == prediction.shape else corrected).to(prediction.dtype)


def channels_of(prediction: Tensor) -> int:
    """Channels of a denoiser's output: of images axis 1, of sequences the last."""
    return prediction.shape[axis_of_channels(prediction)]


def axis_of_channels(prediction: Tensor) -> int:
    """1 of images, 2 of sequences."""
    return 2 if prediction.ndim == 3 else 1


def correction_of(model: nn.Module) -> CorrectionTable | None:
    """The table on a model, fitted with all that it has; None without one."""
    return getattr(model, CORRECTION, None)


def base_correction_of(model: nn.Module) -> CorrectionTable | None:
    """The table of a model without the adapters beside its weights; None without one."""
    routing = routing_of(model)
    return None if routing is None else cast("CorrectionTable | None", routing.base_correction)


def _in_force(model: nn.Module, sample: Tensor) -> CorrectionTable | None:
    """The table that was fitted to the model as it computes now; None for adapters of another strength."""
    routing = routing_of(model)
    if routing is None or routing.strength == 1:
        return correction_of(model)
    base = None if routing.strength else base_correction_of(model)
    return None if base is None else base.to(sample.device)


class CorrectionHook:
    """Forward hook that corrects what a model predicts; a variance that stands beside it is left alone.

    Args:
        argument (`TimestepArgument`): where the model takes its timestep.
    """

    def __init__(self, argument: TimestepArgument) -> None:
        self.argument = argument

    def __call__(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        """The output with another prediction in it."""
        timestep = self.argument.of(args, kwargs)
        if timestep is None:
            raise ConfigError(
                f"The output of {type(model).__name__} is corrected by timestep, so each call must have a `timestep`, "
                f"but got none."
            )
        sample = sample_of(args, kwargs)
        table = _in_force(model, sample)
        if table is None:
            return output
        return map_prediction(output, table.a.shape[-1], lambda each: table.correct(each, sample, timestep))


def map_prediction(output: Any, channels: int, change: Callable[[Tensor], Tensor]) -> Any:
    """A model's output, object or tuple, with another prediction: its first field, of which `channels` count."""
    if isinstance(output, Tensor):
        own = channels_of(output)
        if own == 2 * channels and output.ndim > 3:  # a variance beside it
            return torch.cat([change(output[:, :channels]), output[:, channels:]], dim=1)
        return change(output)
    if isinstance(output, tuple):
        return (map_prediction(output[0], channels, change), *output[1:])
    if isinstance(output, list):  # a tensor for each sample
        return [map_prediction(each[None], channels, change)[0] for each in output]
    first = next(iter(output))
    output[first] = map_prediction(output[first], channels, change)
    return output

"""What is stored for each timestep of a sampler's finite set, and how the timestep of a call finds it.

Everything is indexed by the timestep itself, never by the number of the call: other samplers, other numbers of steps
and continuous timesteps find the nearest of the set. Exact features serve a call only where its timestep is in the set.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from ...calibration import search_activation
from ...calibration.search import is_skewed
from ...compat.accelerate import onloaded
from ...compat.torch import StatefulModule
from ...errors import CheckpointError
from ...formats import FPFormat
from ...numerics import QParams, fake_quantize
from ...numerics.route import ByTimestep, Route, Timestep
from ..routes import FINITE_SET
from .plan import TemporalPlan


@dataclass(frozen=True)
class Entry(Route):
    """The nearest entry of the set for each sample.

    Args:
        exact (`Tensor`, bool, shape of `index`): whether it is the sample's own timestep.
        certainly (`bool`, *optional*): `exact` where it is the same for all samples; None where they differ, or while
            compiling.
    """

    exact: Tensor | None = None
    certainly: bool | None = None


class FiniteSet(ByTimestep, StatefulModule):
    """The timesteps of a set; a quantized layer's `Routing`.

    Args:
        timesteps (`Tensor`, `(S,)`, float32): as the model gets them, ascending.

    Raises:
        CheckpointError: another shape, dtype or order.
    """

    module_name = FINITE_SET
    timesteps: Tensor
    plan: TemporalPlan
    strength = 0.0  # of adapters; there are none

    def __init__(self, timesteps: Tensor) -> None:
        super().__init__()
        self.register_buffer("timesteps", timesteps)
        self.cached: bool | Tensor = True
        self.basis: dict[str, Tensor] | None = None  # what the features were computed with, see `attach.basis_of`
        self.forget()
        self.check()

    def before_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """What the features were computed with is moved and cast as the model is."""
        self.basis = None if self.basis is None else {name: fn(tensor) for name, tensor in self.basis.items()}

    def after_state(self) -> None:
        """A state brings features together with what they were computed with."""
        self.basis = None

    def check(self, name: str = FINITE_SET) -> None:  # noqa: ARG002
        """Refuse a set that no calibration could have written."""
        known = self.timesteps
        fits = known.dtype == torch.float32 and known.ndim == 1 and known.numel()
        if not fits or (not known.is_meta and not (torch.isfinite(known).all() and (known.diff() > 0).all())):
            raise CheckpointError(
                f"A set of timesteps must be finite and ascending, float32 of shape (S,), but got {known.dtype} of "
                f"shape {tuple(known.shape)}: damaged file."
            )

    def lookup(self, timestep: Timestep) -> list[Entry]:
        """The nearest entry; one group serves all layers.

        Args:
            timestep (`int`, `float` or `Tensor` of shape `()`, `(1,)` or `(B,)`).
        """
        distance, index = self._distance(timestep).min(1)
        exact = (distance == 0) & self.cached
        if torch.compiler.is_compiling():
            return [Entry(index[0], exact=exact[0]) if len(index) == 1 else Entry(index, exact=exact)]
        entries, found = set(index.tolist()), set(exact.tolist())
        certainly = found.pop() if len(found) == 1 else None
        if len(entries) == 1:
            return [Entry(index[0], entries.pop(), exact[0] if certainly is not None else exact, certainly)]
        return [Entry(index, None, exact, certainly)]

    def nearest(self, timesteps: Tensor) -> Tensor:
        """Numbers of the nearest entries; `(B,)` → `(B,)`, int64."""
        return self._distance(timesteps).argmin(1)

    def _distance(self, timestep: Timestep) -> Tensor:
        """How far each entry is; `(B, S)`."""
        wanted = torch.as_tensor(timestep).detach().to(self.timesteps.device, self.timesteps.dtype).reshape(-1)
        return (wanted[:, None] - self.timesteps).abs()


class FeatureTable(StatefulModule):
    """A layer's exact outputs for the timesteps of the set; in their stead the layer is not computed.

    Args:
        features (`Tensor`, `(S, C)`): float16, or float32 where that would not do.
    """

    features: Tensor

    def __init__(self, features: Tensor) -> None:
        super().__init__()
        self.register_buffer("features", features)

    def check(self, module_name: str) -> None:
        """Refuse features that no network could have given.

        Raises:
            CheckpointError: NaN or infinity.
        """
        if not self.features.is_meta and not torch.isfinite(self.features).all():
            raise CheckpointError(f"`{module_name}.features` must be finite, but it is not: damaged file.")

    def output(self, entry: Entry, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's output for an input, looked up where it can be.

        Args:
            entry (`Entry`): of the running call.
            x (`Tensor`, `(B * m, …, in)`): each sample stands `m` times in a row.
            compute (`Callable[[Tensor], Tensor]`): the layer itself, for other timesteps.
        """
        if entry.certainly is False:
            return compute(x)
        index = Route.rows(entry.index, x.shape[0])
        with onloaded(self):  # what groups of modules are moved by may have moved one of both
            known = self.features.index_select(0, index.expand(x.shape[0]).to(self.features.device)).to(x)
        known = known.view(x.shape[0], *[1] * (x.ndim - 2), -1).expand(*x.shape[:-1], -1)
        if entry.certainly:
            return known
        exact = Route.rows(cast(Tensor, entry.exact), x.shape[0]).to(x.device)
        return torch.where(exact.view(-1, *[1] * (x.ndim - 1)), known, compute(x))


def store_features(features: Tensor, tolerance: float) -> Tensor:
    """Features `(S, C)` in float16, or in float32 where float16 would cost a relative error above `tolerance`."""
    half = features.to(torch.float16)
    lost = (half.to(torch.float32) - features).norm(dim=1)
    return half if bool((lost <= tolerance * features.norm(dim=1)).all()) else features.contiguous()


def finite_set_search(
    x: Tensor, default: QParams, bounds: tuple[float, float] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Finite set calibration (FSC): the best scale and zero point of one format for each timestep.

    Args:
        x (`Tensor`, `(S, …)`, float32): what is quantized at each timestep.
        default (`QParams`): scale and zero point `()`, kept where the format does not fit, such as an unsigned one
            for values that are nearly all negative; its format is the one used.
        bounds (`tuple[float, float]`, *optional*): of all values of which `x` is a sample.

    Returns:
        `tuple[Tensor, Tensor, Tensor]`: scale and zero point, `(S,)`, and the squared errors, `(S,)`.

    Source:
        arXiv 2311.16503, section 4.3, takes minimum and maximum; here the squared error is searched.
    """
    best = [_best(values, default, bounds) for values in x]
    found = QParams.unchecked(default.format, *(torch.stack(part) for part in zip(*best, strict=True)))
    return found.scale, found.zero_point, (quantize_rows(x, found) - x).square().flatten(1).sum(1)


def _best(values: Tensor, default: QParams, bounds: tuple[float, float] | None) -> tuple[Tensor, Tensor]:
    fmt: FPFormat = default.format
    low, high = bounds or (end.item() for end in torch.aminmax(values))
    fits = fmt.signed or is_skewed(low, high)
    found = search_activation(values, [fmt.name], (low, high)).qparams if fits else default
    return found.scale.reshape(()), found.zero_point.reshape(())


def quantize_rows(x: Tensor, qparams: QParams) -> Tensor:
    """Fake quantization of `(S, …)` with parameters `(S,)`."""
    shape = (-1, *[1] * (x.ndim - 1))
    scale, zero_point = (part.view(shape) for part in (qparams.scale, qparams.zero_point))
    return fake_quantize(x, QParams.unchecked(qparams.format, scale, zero_point))

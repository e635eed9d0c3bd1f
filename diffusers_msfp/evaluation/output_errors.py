"""The error of denoisers' outputs, with and without what the sampler makes of it."""

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..results import Result
from ..sampling.denoising_factor import RunFactors


@dataclass(frozen=True, kw_only=True)
class DenoiserError(Result):
    """How far a denoiser's outputs are from the reference's, pooled over samples and timesteps.

    Args:
        traj_rel_l2 (`float`, *optional*): `sqrt(Σ γ_t²‖Δ‖² / Σ γ_t²‖reference‖²)`: the error as the sampler uses it,
            whose coefficient γ_t is the smallest where most of `eps_rel_l2` lies; see `denoising_factors`. γ_t is that
            of the linear step: what clipping takes away from an error, and what guidance makes of it, do not count.
            None where its scheduler has no such coefficients, and for a denoiser that was never called.
        eps_mse (`float`, *optional*): mean squared difference; None for a denoiser that was never called.
        eps_rel_l2 (`float`, *optional*): `sqrt(Σ‖Δ‖² / Σ‖reference‖²)`; None likewise.
        eps_rel_l2_by_timestep (`Mapping[str, float]`): timestep → the same.
    """

    traj_rel_l2: float | None
    eps_mse: float | None
    eps_rel_l2: float | None
    eps_rel_l2_by_timestep: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class ComparedDenoiser(DenoiserError):
    """One denoiser of several.

    Args:
        quantized (`bool`): whether the candidate's is.
    """

    quantized: bool


class OutputErrors:
    """Squared error and energy of one denoiser's outputs by timestep.

    Args:
        sampler (`RunFactors`): what leads it.
    """

    def __init__(self, sampler: RunFactors) -> None:
        self.sampler = sampler
        self.error: dict[float, float] = defaultdict(float)
        self.energy: dict[float, float] = defaultdict(float)
        self.count = 0

    def add(self, timestep: float, expected: Tensor, actual: Tensor) -> None:
        """Take the outputs of one call into account, float64."""
        self.error[timestep] += (actual - expected).square().sum().item()
        self.energy[timestep] += expected.square().sum().item()
        self.count += expected.numel()

    def weighted(self) -> tuple[float, float] | None:
        """`Σ γ_t²‖Δ‖²` and `Σ γ_t²‖reference‖²`; None where the sampler has no γ_t for these calls."""
        factors = self.sampler.of(list(self.error))
        if factors is None:
            return None
        error, energy = (sum(factors[t] ** 2 * part[t] for t in factors) for part in (self.error, self.energy))
        return error, energy

    def result(self) -> dict[str, Any]:
        """The fields of a `DenoiserError`."""
        return self.pooled([self])

    @staticmethod
    def pooled(parts: Iterable["OutputErrors"]) -> dict[str, Any]:
        """The fields of a `DenoiserError` of several denoisers together, each weighted by its own sampler."""
        parts = [part for part in parts if part.count]
        weighted = [part.weighted() for part in parts]
        known = [each for each in weighted if each is not None]
        error, energy = _added(part.error for part in parts), _added(part.energy for part in parts)
        count, both = sum(part.count for part in parts), (sum(error.values()), sum(energy.values()))
        trajectory = [sum(column) for column in zip(*known, strict=True)]
        return {
            "traj_rel_l2": _relative(*trajectory) if parts and len(known) == len(parts) else None,
            "eps_mse": both[0] / count if count else None,
            "eps_rel_l2": _relative(*both) if count else None,
            "eps_rel_l2_by_timestep": {f"{t:g}": _relative(error[t], energy[t]) for t in sorted(energy, reverse=True)},
        }


def _added(tables: Iterable[Mapping[float, float]]) -> dict[float, float]:
    total: dict[float, float] = defaultdict(float)
    for table in tables:
        for timestep, value in table.items():
            total[timestep] += value
    return total


def _relative(error: float, energy: float) -> float:
    return math.sqrt(error / energy) if energy else math.inf if error else 0.0

"""What a quantized layer knows of choices by timestep: `talora.RoutingTable`, `temporal.FiniteSet`, `FeatureTable`."""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from ..numerics.route import Route


class Routing(Protocol):
    """Asked by a layer which of its banks, adapters or parameter sets to use."""

    strength: float
    """Factor of what adapters add; 0 where there are none."""

    def route(self, group: int = 0) -> Route:
        """The running call's choice for a layer group."""


class CachedOutput(Protocol):
    """Knows a layer's outputs at some timesteps."""

    def output(self, route: Route, x: Tensor, compute: Callable[[Tensor], Tensor]) -> Tensor:
        """The layer's output for `x` at the timestep of a route, computed where it is not known."""

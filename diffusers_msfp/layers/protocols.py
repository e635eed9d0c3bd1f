"""What a quantized layer knows of those above it: engines that run it, and choices by timestep.

Such things are `engines.Engine` and `PreparedLayer`; `methods.talora.RoutingTable`, `methods.temporal.FiniteSet` and
`FeatureTable`.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from ..numerics import Codes
from ..numerics.route import Route

if TYPE_CHECKING:
    from .quant_layer import QuantLayer


class Prepared(Protocol):
    """One layer, made ready by an engine. The layer drops it when anything it was made from changes."""

    made_of: list[tuple[int, int | str]]
    """`tensors_state` of the layer then."""

    @property
    def reads_codes(self) -> bool:
        """Whether another module may quantize the layer's input."""

    @property
    def kept_bytes(self) -> int:
        """Memory of what it keeps beside the layer's own tensors, in bytes."""

    def __call__(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
        """The layer's output for a float input, in its dtype."""

    def takes(self, codes: Codes) -> bool:
        """Whether codes are on the grid that the layer has now."""

    def from_codes(self, codes: Codes) -> Tensor:
        """The layer's output for codes that it takes."""


class Engine(Protocol):
    """Makes layers ready."""

    def prepare(self, layer: "QuantLayer") -> Prepared | None:
        """The layer made ready; None leaves it to the reference."""


class Routing(Protocol):
    """Asked by a layer which of its banks, adapters or parameter sets to use."""

    @property
    def strength(self) -> float:
        """Factor of what adapters add; 0 where there are none."""

    def route(self, group: int = 0) -> Route:
        """The running call's choice for a layer group."""


class CachedOutput(Protocol):
    """Knows a layer's outputs at some timesteps."""

    def output(self, route: Any, x: Tensor, compute: Callable[[Tensor], Tensor], /) -> Tensor:
        """The layer's output for `x` at the timestep of a route of its kind, computed where it is not known."""

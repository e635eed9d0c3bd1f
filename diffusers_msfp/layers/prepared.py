"""What a quantized layer knows of engines; `engines.Engine` is such a thing."""

from typing import Protocol

from torch import Tensor

from ..numerics import Codes


class Prepared(Protocol):
    """One layer, made ready by an engine. The layer drops it when anything it was made from changes."""

    reads_codes: bool
    """Whether another module may quantize the layer's input."""

    def __call__(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
        """The layer's output for a float input, in its dtype."""

    def takes(self, codes: Codes) -> bool:
        """Whether codes are on the grid that the layer has now."""

    def from_codes(self, codes: Codes) -> Tensor:
        """The layer's output for codes that it takes."""


class Engine(Protocol):
    """Makes layers ready."""

    def prepare(self, layer) -> Prepared | None:
        """The layer made ready; None leaves it to the reference."""

"""What a quantized layer knows of engines; `engines.Engine` is such a thing."""

from typing import Protocol

from torch import Tensor


class Prepared(Protocol):
    """One layer, made ready by an engine. The layer drops it when anything it was made from changes."""

    def __call__(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
        """The layer's output for a float input, in its dtype, or for the codes that the engine itself hands out."""


class Engine(Protocol):
    """Makes layers ready."""

    def prepare(self, layer) -> Prepared | None:
        """The layer made ready; None leaves it to the reference."""

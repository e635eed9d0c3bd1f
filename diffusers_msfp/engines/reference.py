"""reference: the layer's own float32 forward. It defines the result, and gradients flow through it."""

from ..layers import QuantLayer
from .engine import Engine


class ReferenceEngine(Engine):
    """Leaves layers as they are."""

    name = "reference"
    measured_on = frozenset({"cpu x86_64"})

    def refusal(self, layer: QuantLayer) -> None:  # noqa: ARG002
        """It can run everything."""

    def prepare(self, layer: QuantLayer) -> None:  # noqa: ARG002
        """There is nothing to prepare."""

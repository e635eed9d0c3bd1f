"""reference: the layer's own float32 forward. It defines the result, and gradients flow through it."""

from .engine import Engine


class ReferenceEngine(Engine):
    """Leaves layers as they are."""

    name = "reference"

    def refusal(self, layer) -> None:  # noqa: ARG002
        """It can run everything."""

    def prepare(self, layer) -> None:  # noqa: ARG002
        """There is nothing to prepare."""

"""What a quantized layer knows of adapters' routing; `talora.RoutingTable` is such a thing."""

from typing import Protocol


class Routing(Protocol):
    """Asked by a layer with adapters which one to use."""

    num_adapters: int
    strength: float

    def route(self, group: int):
        """The running call's choice for a layer group, with `apply(function, x, num_adapters)`."""

"""What the timestep of a call chooses: banks, which are constants of a graph, and numbers, which are inputs of it.

Layers with several weights (adapters that are merged into them) need a graph for each combination of banks that the
router names, often two or three. Parameter sets of inputs and stored outputs are numbers; one input of the graph,
`chosen`, has them all.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from torch import Tensor

from ...layers import QuantLayer
from .rounding import Grid


@dataclass(frozen=True)
class Reader:
    """What a layer finds in `chosen`.

    Args:
        place (`slice`): of `1 / unit`, zero and unit of its input, or of its output.
        known (`bool`): whether it is the output.
    """

    place: slice
    known: bool


@dataclass(frozen=True)
class Choice:
    """What a call's timestep chooses.

    Args:
        banks (`dict[str, int]`): by the layer's name, where it has several.
        readers (`dict[str, Reader]`): layers that read numbers.
        chosen (`Tensor`, `(E,)`, float32, *optional*): the numbers; None where no layer reads any.
    """

    banks: dict[str, int] = field(default_factory=dict)
    readers: dict[str, Reader] = field(default_factory=dict)
    chosen: Tensor | None = None

    @property
    def key(self) -> str:
        """Of what is constant in a graph: another key needs another graph."""
        return f"{sorted(self.banks.items())} {sorted((name, repr(each)) for name, each in self.readers.items())}"


def following(layers: Sequence[QuantLayer]) -> list[QuantLayer]:
    """Layers that follow the timestep."""
    return [layer for layer in layers if layer.num_banks > 1 or layer.num_sets or layer.recall is not None]


def choose(layers: Sequence[QuantLayer]) -> Choice | None:
    """What the running call chooses.

    Args:
        layers (`Sequence[QuantLayer]`): see `following`.

    Returns:
        `Choice`: None where it is not the same for all samples.
    """
    banks, readers, numbers, place = {}, {}, [], 0
    routes: dict[tuple[int, int], Any] = {}
    for layer in layers:
        group = layer.group if layer.num_banks > 1 else 0
        asked = id(layer.routing), group
        if asked not in routes:
            routes[asked] = cast(Any, layer.routing).route(group)
        route = routes[asked]
        if route.uniform is None or (layer.recall is not None and route.certainly is None):
            return None
        known = layer.recall is not None and route.certainly
        if layer.num_banks > 1:
            banks[layer.module_name] = route.uniform
        elif known or layer.num_sets:
            found = _output(layer, route.uniform) if known else _grid(layer, route.uniform)
            readers[layer.module_name] = Reader(slice(place, place + len(found)), known)
            numbers.append(found)
            place += len(found)
    return Choice(banks, readers, torch.cat(numbers) if numbers else None)


def _output(layer: QuantLayer, index: int) -> Tensor:
    return cast(Any, layer.recall).features[index].to(torch.float32)


def _grid(layer: QuantLayer, index: int) -> Tensor:
    grid = Grid.of(layer.input_qparams(index))
    return torch.tensor([grid.inverse, float(grid.zero), grid.unit], dtype=torch.float32, device="cpu")

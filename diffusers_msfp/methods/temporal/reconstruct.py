"""The quantized temporal block while it is worked on: FSC and TIAR on nothing but timesteps.

Each entry of the finite set stands for the timesteps nearest to it, which other samplers come to, so both see five of
them: the entry's own, and two on the way to each neighbour.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ...layers import QuantLayer
from ...numerics import QParams, fake_quantize
from ..rounding import SoftRounding, annealed_exponent
from . import BlockLayer, TemporalBlock, finite_set_search, quantize_rows

Sets = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Layer → scale and zero point `(S,)`, and relative squared error `()`, of its input."""

SHARES = (0.25, 0.5)
"""How far on the way to a neighbour the other timesteps of an entry lie."""
NEIGHBOURS = 0.1
"""Their weight in reconstruction."""


def neighbourhoods(timesteps: Tensor) -> Tensor:
    """For each entry of a set its own timestep and four more on the way to its neighbours; `(S,)` → `(S, 5)`."""
    before, after = torch.cat([timesteps[:1], timesteps[:-1]]), torch.cat([timesteps[1:], timesteps[-1:]])
    points = [timesteps] + [timesteps + share * (end - timesteps) for end in (before, after) for share in SHARES]
    whole = bool((timesteps == timesteps.round()).all())  # some models embed whole timesteps only
    return torch.stack([point.round() if whole else point for point in points], dim=1)


class StudentBlock:
    """The quantized layers of a block, on their own.

    Args:
        block (`TemporalBlock`): its structure.
        layers (`Mapping[str, QuantLayer]`): the model's, not changed.

    Attributes:
        weights (`dict[str, Tensor]`): what the layers multiply with, float32.
        sets (`Sets`): empty before `search_sets`.
    """

    def __init__(self, block: TemporalBlock, layers: Mapping[str, QuantLayer]) -> None:
        self.block, self.layers = block, {name: layers[name] for name in block.names}
        self.weights = {name: layer.dequantize_weight() for name, layer in self.layers.items()}
        self.sets: Sets = {}

    def run(self, roots: Mapping[str, Tensor], weights: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The outputs of all layers, `(S, 5, out)`, for inputs of the roots `(S, 5, in)`."""

        def apply(block_layer: BlockLayer, x: Tensor) -> Tensor:
            return self._multiply(block_layer.name, self._quantize(block_layer.name, x), weights or self.weights)

        return self.block.run(roots, apply)

    def _multiply(self, name: str, x: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        bias = self.layers[name].bias
        return F.linear(x, weights[name], None if bias is None else bias.detach().to(torch.float32))

    def _quantize(self, name: str, x: Tensor) -> Tensor:
        layer = self.layers[name]
        if layer.input_format is None:
            return x
        if name not in self.sets:
            return fake_quantize(x, layer.input_qparams())
        scale, zero_point, _ = self.sets[name]
        return quantize_rows(x, QParams.unchecked(layer.input_format, scale, zero_point))

    @torch.no_grad()
    def search_sets(self, roots: Mapping[str, Tensor]) -> None:
        """FSC: choose input parameters for each entry, layer after layer, on what the layers before really give."""
        self.sets = {}
        known: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}  # most layers of a block read the same input

        def apply(block_layer: BlockLayer, x: Tensor) -> Tensor:
            layer = self.layers[block_layer.name]
            if layer.input_format is not None:
                key = block_layer.source or block_layer.name, block_layer.activation, layer.input_format
                if key not in known:
                    scale, zero_point, errors = finite_set_search(x, layer.input_qparams())
                    known[key] = scale, zero_point, errors.sum() / x.square().sum().clamp_min(1e-30)
                self.sets[block_layer.name] = known[key]
            return self._multiply(block_layer.name, self._quantize(block_layer.name, x), self.weights)

        self.block.run(roots, apply)

    def reconstruct(
        self,
        roots: Mapping[str, Tensor],
        targets: Mapping[str, Tensor],
        originals: Mapping[str, Tensor],
        *,
        iterations: int,
        learning_rate: float,
        penalty: float,
    ) -> None:
        """TIAR: learn the rounding of all weights of the block together, with quantized inputs.

        Minimised is the squared error of each layer and timestep over the square of the target, mean over timesteps.

        Args:
            roots, targets (`Mapping[str, Tensor]`): `(S, 5, in)` and `(S, 5, out)`, of the full-precision block.
            originals (`Mapping[str, Tensor]`): float weights.
        """
        soft = {
            name: SoftRounding(originals[name].reshape(layer.rows_shape), layer.weight_qparams())
            for name, layer in self.layers.items()
        }
        parameters = [rounding.logit for rounding in soft.values()]
        optimizer = torch.optim.Adam(parameters, lr=learning_rate)
        number = sum(parameter.numel() for parameter in parameters)
        share = parameters[0].new_tensor([1.0, *[NEIGHBOURS] * (2 * len(SHARES))], dtype=torch.float32)
        factors = {name: share / y.square().sum(-1).clamp_min(1e-30) for name, y in targets.items()}
        with torch.enable_grad():
            for iteration in range(iterations):
                outputs = self.run(roots, {name: self._whole(name, each()) for name, each in soft.items()})
                loss: Any = sum(
                    ((y - targets[name]).square().sum(-1) * factors[name]).sum(1).mean() for name, y in outputs.items()
                )
                exponent = annealed_exponent(iteration / iterations)
                if exponent is not None and penalty:
                    loss = loss + penalty / number * sum(rounding.penalty(exponent) for rounding in soft.values())
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
        self.weights = {name: self._whole(name, rounding.hard()) for name, rounding in soft.items()}

    def _whole(self, name: str, rows: Tensor) -> Tensor:
        """A layer's weight from a matrix of `rows_shape`."""
        return rows.view(self.layers[name].logical_shape)

"""The temporal information block (TIB): linears whose input depends on the timestep and on nothing else.

It is found by experiment, not by names: the float model is called again with other samples, prompts and labels at the
same timestep, and what arrives bit for bit the same, but differs at another timestep, belongs to the block. How its
layers follow each other is found the same way: a layer's input equals another's output, or its activation.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...calibration.watch import watching_calls

ModelCall = Callable[[], object]

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda x: x,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu": F.relu,
    "mish": F.mish,
}
"""What may stand between two linears of a block."""


_MANY_ROWS = 64
"""A call with more is not of the block, which has a vector for each sample, and is not worth the memory."""


class _Seen(Exception):
    """Everything that was asked for has passed; the rest of the model need not run."""


@dataclass(frozen=True)
class BlockLayer:
    """A linear of the block.

    Args:
        name (`str`): in the model.
        source (`str`, *optional*): the linear whose output it reads; None if it reads no other's.
        activation (`str`): what stands between them, a name in `ACTIVATIONS`.
    """

    name: str
    source: str | None = None
    activation: str = "identity"


@dataclass(frozen=True)
class TemporalBlock:
    """The layers of a block, each after the one that it reads."""

    layers: tuple[BlockLayer, ...]

    @property
    def names(self) -> tuple[str, ...]:
        """Of all layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def roots(self) -> tuple[str, ...]:
        """Layers that read no other."""
        return tuple(layer.name for layer in self.layers if layer.source is None)

    def readers(self, name: str) -> tuple[str, ...]:
        """Layers that read the output of this one."""
        return tuple(layer.name for layer in self.layers if layer.source == name)

    def run(self, roots: Mapping[str, Tensor], apply: Callable[[BlockLayer, Tensor], Tensor]) -> dict[str, Tensor]:
        """The outputs of all layers.

        Args:
            roots (`Mapping[str, Tensor]`): inputs of the roots, `(S, in)`, see `root_inputs`.
            apply (`Callable[[BlockLayer, Tensor], Tensor]`): a layer's output for its input.
        """
        outputs: dict[str, Tensor] = {}
        for layer in self.layers:
            source = layer.source
            x = roots[layer.name] if source is None else ACTIVATIONS[layer.activation](outputs[source])
            outputs[layer.name] = apply(layer, x)
        return outputs


def find_block(
    layers: Mapping[str, nn.Module], calls: Sequence[ModelCall], varied: Sequence[ModelCall]
) -> TemporalBlock:
    """The temporal information block among the layers of a float model.

    Args:
        layers (`Mapping[str, nn.Module]`): the model's linears that may belong to it, by name.
        calls (`Sequence[ModelCall]`): call the model at two timesteps or more, each with one timestep for all samples.
        varied (`Sequence[ModelCall]`): the same timesteps with everything else changed, in equal shapes.

    Returns:
        `TemporalBlock`: empty where nothing depends on the timestep alone.
    """
    runs, others = [_record(layers, call) for call in calls], [_record(layers, call) for call in varied]
    found: list[BlockLayer] = []
    for name in runs[0]:
        if not all(_same(run.get(name, []), other.get(name, [])) for run, other in zip(runs, others, strict=True)):
            continue
        inputs = [run[name][0][0] for run in runs]
        if inputs[0].ndim > 1 and not torch.equal(inputs[0], inputs[-1]):
            found.append(_block_layer(name, inputs, [layer.name for layer in found], runs))
    return TemporalBlock(tuple(found))


def find_upstream(
    modules: Mapping[str, nn.Module], calls: Sequence[ModelCall], varied: Sequence[ModelCall]
) -> tuple[str, ...]:
    """Names of the modules whose input depends on the timestep and on nothing else; see `find_block`."""
    runs, others = [_record(modules, call) for call in calls], [_record(modules, call) for call in varied]
    return tuple(
        name
        for name in runs[0]
        if all(_same(run.get(name, []), other.get(name, [])) for run, other in zip(runs, others, strict=True))
        and not torch.equal(runs[0][name][0][0], runs[-1][name][0][0])
    )


def _same(calls: list[tuple[Tensor, Tensor]], others: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether a layer saw one and the same input, however often it was called."""
    return bool(calls) and len(calls) == len(others) and all(torch.equal(calls[0][0], x) for x, _ in calls + others)


def _block_layer(name: str, inputs: list[Tensor], earlier: list[str], runs: list[dict]) -> BlockLayer:
    """Where a layer's input comes from."""
    for source in reversed(earlier):
        outputs = [run[source][0][1] for run in runs]
        if outputs[0].shape != inputs[0].shape:
            continue
        for activation, function in ACTIVATIONS.items():
            if all(torch.allclose(function(y), x, rtol=1e-4, atol=1e-6) for y, x in zip(outputs, inputs, strict=True)):
                return BlockLayer(name, source, activation)
    return BlockLayer(name)


def _record(layers: Mapping[str, nn.Module], call: ModelCall) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """Inputs and outputs of all calls of each layer, in the order of the layers' first calls."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {}

    def keep(name: str) -> Callable:
        def hook(_layer: nn.Module, args: tuple, output: object) -> None:
            if not (args and isinstance(args[0], Tensor) and isinstance(output, Tensor)):
                return
            if args[0].numel() <= _MANY_ROWS * (args[0].shape[-1] if args[0].ndim else 1):
                seen.setdefault(name, []).append((args[0].detach().clone(), output.detach().clone()))

        return hook

    handles = [layer.register_forward_hook(keep(name)) for name, layer in layers.items()]
    try:
        call()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def root_inputs(roots: Mapping[str, nn.Module], calls: Sequence[ModelCall]) -> dict[str, Tensor]:
    """What the roots of a block read, `(S, in)` float32, in the first sample of each call.

    A call ends as soon as all roots have been called; for most models that is before their first convolution.

    Args:
        roots (`Mapping[str, nn.Module]`): by name.
        calls (`Sequence[ModelCall]`): call the float model, one timestep each.
    """
    found: dict[str, list[Tensor]] = {name: [] for name in roots}
    done = 0

    def keep(name: str, args: tuple) -> None:
        if len(found[name]) == done:
            x = args[0].detach()
            found[name].append(x.reshape(-1, x.shape[-1])[0].to(torch.float32))
        if all(len(rows) > done for rows in found.values()):
            raise _Seen

    with watching_calls(roots, keep):
        for call in calls:
            with suppress(_Seen):
                call()
            done += 1
    return {name: torch.stack(rows) for name, rows in found.items()}

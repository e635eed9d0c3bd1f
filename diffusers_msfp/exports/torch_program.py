"""torch-export: an `ExportedProgram` in a `.pt2`, of torch's own operators alone."""

import warnings
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..engines.openvino.layers import Inputs
from ..engines.openvino.record import Recorder
from ..layers import QuantLayer
from .layers import packed_layer, stored_bytes
from .target import Ports, Target

_HISTORY = ("stack_trace", "nn_module_stack", "source_fn_stack", "from_node", "torch_fn")
"""What a program's nodes know of the code that they come from: most of a small program's file."""


class Named(nn.Module):
    """A recorder that takes its tensors by name."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def forward(self, **tensors: Tensor) -> tuple[Tensor, ...]:
        """See `Recorder.forward`."""
        return cast(tuple, self.recorder(*tensors.values()))


class TorchExport(Target):
    """`torch.export.load(file).module()(sample=…, timestep=…)` gives a tuple, wherever torch is."""

    name, suffix = "torch-export", ".pt2"
    unpacked = "group scales are multiplied into bytes"

    def layer_in_graph(self, layer: QuantLayer, inputs: Inputs) -> nn.Module:
        """See `Target`."""
        return packed_layer(layer, inputs)

    def weight_bytes(self, layer: QuantLayer) -> int:
        """See `Target`."""
        return stored_bytes(layer)

    def in_integers(self, layer: QuantLayer) -> bool:  # noqa: ARG002
        """See `Target`; torch has no portable product of integers."""
        return False

    def write(self, recorder: Recorder, ports: Ports, path: Path) -> None:
        """See `Target`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(Named(recorder), (), dict(ports.inputs), strict=False)
        parts: list[Any] = [each for each in program.graph_module.modules() if isinstance(each, torch.fx.GraphModule)]
        for node in (node for part in parts for node in part.graph.nodes):
            for key in _HISTORY:
                node.meta.pop(key, None)
        torch.export.save(program, path)

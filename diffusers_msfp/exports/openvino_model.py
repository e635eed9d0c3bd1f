"""openvino: the engine's own graph in an `.xml` and a `.bin`."""

from pathlib import Path
from typing import Any

from torch import nn

from ..engines.openvino.choices import Choice
from ..engines.openvino.layers import Inputs, graph_layer
from ..engines.openvino.record import Recorder, record
from ..layers import QuantLayer
from .layers import in_integers
from .target import Ports, Target


class OpenVINO(Target):
    """The graph of the engine `openvino`, with its weights as bytes."""

    name, suffix = "openvino", ".xml"
    packages, extra = ("openvino",), "openvino"
    unpacked = (
        "OpenVINO multiplies bytes where a weight is a constant of bytes; what bytes do not hold, or some processors "
        "would not add exactly, is float32"
    )

    def layer_in_graph(self, layer: QuantLayer, inputs: Inputs) -> nn.Module:
        """See `Target`."""
        return graph_layer(layer, Choice(), inputs, in_bytes=in_integers(layer))

    def weight_bytes(self, layer: QuantLayer) -> int:
        """See `Target`."""
        rows, length = layer.matrix_shape
        return rows * length * (1 if in_integers(layer) else 4)

    def in_integers(self, layer: QuantLayer) -> bool:
        """See `Target`."""
        return in_integers(layer)

    def write(self, recorder: Recorder, ports: Ports, path: Path) -> None:
        """See `Target`."""
        import openvino

        recording = record(recorder)
        graph: Any = recording.graph
        for ports_of_graph, names in ((graph.inputs, list(ports.inputs)), (graph.outputs, ports.outputs)):
            for port, name in zip(ports_of_graph, names, strict=True):
                port.get_tensor().set_names({name})
                port.get_node().set_friendly_name(name)
        openvino.save_model(graph, path, compress_to_fp16=False)

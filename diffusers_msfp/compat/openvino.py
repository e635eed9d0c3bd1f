"""Internals of OpenVINO (all in 2026.2 to 2026.4): its frontend for torch without what `convert_model` adds around it,
which takes four times as long."""

from collections.abc import Sequence
from typing import Any

import openvino
from openvino._offline_transformations import apply_moc_transformations
from openvino.frontend import FrontEndManager
from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder
from torch import Tensor

__all__ = ["graph_of", "keep_waves_exact"]

_WAVES = ("Sin", "Cos")


def graph_of(traced: Any, tensors: Sequence[Tensor]) -> openvino.Model:
    """A traced module as a graph with the static shapes of its example inputs.

    Args:
        traced (`torch.jit.ScriptModule`): must live as long as the graph, which shares its weights.
        tensors (`Sequence[Tensor]`): its example inputs.
    """
    frontend = FrontEndManager().load_by_framework("pytorch")
    decoder = TorchScriptPythonDecoder(traced, example_input=tuple(tensors))  # which the frontend does not keep
    loaded = frontend.load(decoder)
    graph = frontend.convert(loaded)
    for port, tensor in zip(graph.inputs, tensors, strict=True):
        port.get_node().set_partial_shape(openvino.PartialShape(list(tensor.shape)))
    graph.validate_nodes_and_infer_types()
    apply_moc_transformations(graph, cf=False, smart_reshape=False)
    return graph


def keep_waves_exact(graph: openvino.Model) -> None:
    """Keep sines and cosines, and all that leads to them, in float32 where a graph is compiled for bfloat16.

    Bfloat16 has 8 bits, so the phases of timestep 993 would be those of 992. What leads to an output without a product
    on its way stays in float32: sines become outputs, behind those there are.
    """
    for node in graph.get_ordered_ops():
        if node.get_type_name() in _WAVES:
            graph.add_outputs(node.output(0))

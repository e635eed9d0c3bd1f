"""onnx: opset 21, which is the first with a 4-bit type, in operators that onnxruntime has on every CPU."""

import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..engines.openvino.layers import Inputs
from ..engines.openvino.record import Recorder
from ..layers import QuantLayer
from .layers import PackedGraphLayer, in_integers, stored_bytes
from .onnx_layers import onnx_layer
from .target import Ports, Target

OPSET = 21
_SINGLE = 2**31 - 2**24
"""Bytes of weights that fit one file of this format, which has room for 2 GiB."""


class Onnx(Target):
    """For onnxruntime 1.20 or newer."""

    name, suffix = "onnx", ".onnx"
    packages, extra = ("onnx", "onnxscript"), "onnx"
    unpacked = "group scales are multiplied into bytes"

    def layer_in_graph(self, layer: QuantLayer, inputs: Inputs) -> nn.Module:
        """See `Target`."""
        return onnx_layer(layer, inputs)

    def weight_bytes(self, layer: QuantLayer) -> int:
        """See `Target`."""
        return stored_bytes(layer)

    def in_integers(self, layer: QuantLayer) -> bool:
        """See `Target`."""
        return in_integers(layer)

    def write(self, recorder: Recorder, ports: Ports, path: Path) -> None:
        """See `Target`."""
        export_onnx(recorder, ports.inputs, ports.outputs, path)


def export_onnx(module: nn.Module, inputs: Mapping[str, Tensor], outputs: Sequence[str], path: Path) -> None:
    """Write a module with layers of `onnx_layers`; codes of 4 bits as such, two in a byte.

    Args:
        module (`nn.Module`): takes tensors in order.
        inputs (`Mapping[str, Tensor]`), outputs (`Sequence[str]`): see `Ports`.
        path (`Path`): file to write; more than 2 GiB of weights go to another, `.data`.
    """
    import onnx_ir

    with _quiet():
        program: Any = torch.onnx.export(
            module,
            tuple(inputs.values()),
            input_names=list(inputs),
            output_names=list(outputs),
            opset_version=OPSET,
            dynamo=True,
            optimize=False,  # it would expand small weights
            verbose=False,
        )
    model = program.model
    layers = {
        f"{name}.stored".lstrip("."): layer
        for name, layer in module.named_modules(remove_duplicate=False)
        if isinstance(layer, PackedGraphLayer) and layer.four_bits
    }
    for name, value in model.graph.initializers.items():
        if name in layers:
            _pack_codes(value, layers[name])
    for node in model.graph.all_nodes():  # where it comes from: much of a small model's file
        node.metadata_props.clear()
        node.doc_string = None
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    onnx_ir.save(model, path, external_data=None if size < _SINGLE else f"{path.name}.data")


def _pack_codes(value: Any, layer: PackedGraphLayer) -> None:
    """Make an initializer of codes one of 4-bit numbers, two in a byte.

    Args:
        value (`onnx_ir.Value`): uint8.
        layer (`PackedGraphLayer`): whose codes they are.
    """
    import ml_dtypes
    import onnx_ir

    codes = layer.stored.numpy().astype(ml_dtypes.uint4)
    value.const_value = onnx_ir.Tensor(codes, dtype=onnx_ir.DataType.UINT4, name=value.name)
    value.dtype = onnx_ir.DataType.UINT4


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch says of packages that have nothing to do with it."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)

"""OpenVINO: a whole denoiser as one graph, whose quantized layers multiply integers of 8 bits.

`install` and `remove` are what `set_engine` calls; `compare` times a model both ways, and `is_any` tells `auto` whether
a graph was ever faster; `why_missing` says whether the package is there, and a model's `graph_forward_of` whether its
calls run as graphs.
"""

from .forward import GraphForward, compare, graph_forward_of, install, remove
from .installed import require, why_missing
from .layers import multiplies_bytes
from .measured import is_any

NAME = "openvino"
"""Of the engine."""

__all__ = [
    "NAME",
    "GraphForward",
    "compare",
    "graph_forward_of",
    "install",
    "is_any",
    "multiplies_bytes",
    "remove",
    "require",
    "why_missing",
]

"""OpenVINO: a whole denoiser as one graph, whose quantized layers multiply integers of 8 bits.

`install` and `remove` are what `set_engine` calls; `why_missing` says whether the package is there, and a model's
`graph_forward_of` whether its calls run as graphs.
"""

from .forward import GraphForward, graph_forward_of, install, remove
from .layers import are_bytes
from .runtime import require, why_missing

NAME = "openvino"
"""Of the engine."""

__all__ = ["NAME", "GraphForward", "are_bytes", "graph_forward_of", "install", "remove", "require", "why_missing"]

"""OpenVINO: a whole denoiser as one graph, whose quantized layers multiply integers of 8 bits.

`install` and `remove` are what `set_engine` calls; `why_missing` says whether the package is there.
"""

from .forward import GraphForward, graph_forward_of, install, remove
from .runtime import require, why_missing

NAME = "openvino"
"""Of the engine."""

__all__ = ["NAME", "GraphForward", "graph_forward_of", "install", "remove", "require", "why_missing"]

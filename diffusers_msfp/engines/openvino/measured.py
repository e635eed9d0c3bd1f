"""Whether a model's calls are faster as a graph than layer by layer, which `auto` wants to know.

A graph takes seconds to minutes to compile and holds its weights once more, so nobody gets one in passing:
`forward.compare` times both on request, for one architecture and shape, and keeps the answer beside the other
measurements of `tuning`.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...layers import QuantLayer
from .. import tuning

PREFIX = "graph "
GRAPH, LAYERS = "openvino", "layers"


def structure_of(model: nn.Module, layers: Iterable[QuantLayer]) -> str:
    """Of an architecture in its formats, whatever its weights: what the time of a call depends on besides its shape."""
    parts = [(layer.logical_shape, layer.weight_format, layer.input_format, layer.group_size) for layer in layers]
    text = f"{type(model).__name__} {[tuple(map(str, part)) for part in parts]}"
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def question_of(model: nn.Module, structure: str, tensors: Sequence[Tensor]) -> str:
    """What is asked of a machine; timesteps and labels do not count."""
    read = " ".join(tuning.text_of(each.shape, cast(torch.dtype, model.dtype)) for each in tensors if each.ndim > 1)
    return f"{PREFIX}{type(model).__name__} {structure} {read}"


def is_any() -> bool:
    """Whether a graph was faster for anything that this machine was asked about."""
    return tuning.allowed() and any(is_faster(question) for question in tuning.measured(PREFIX))


def is_faster(question: str) -> bool:
    """Whether calls were measured to be faster as a graph; False where nothing was measured or may be taken."""
    return tuning.allowed() and tuning.chosen(question, LAYERS) == GRAPH

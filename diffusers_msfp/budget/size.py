"""Bytes of a weight file before it is written: every tensor that a quantized model saves, and the file's header.

Sums are upper bounds by a few bytes for each tensor: offsets count with as many digits as the largest can have.
"""

import json
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..layers.stored import name_in_files
from ..plugin.config import MSFPConfig
from ..plugin.files.saving import file_metadata
from .palette import Palette

_TYPES = {torch.float32: "F32", torch.float64: "F64", torch.bfloat16: "BF16"}  # others have as short a name or shorter


def tensor_bytes(name: str, tensor: Tensor, digits: int) -> int:
    """Of a tensor's numbers and its entry in a header whose offsets have so many digits."""
    entry = {"dtype": _TYPES.get(tensor.dtype, "U8"), "shape": list(tensor.shape), "data_offsets": [0, 0]}
    text = json.dumps({name_in_files(name): entry}, separators=(",", ":"))
    return tensor.numel() * tensor.element_size() + len(text.encode()) - 1 + 2 * (digits - 1)


def layer_bytes(model: nn.Module, palette: Palette) -> tuple[int, dict[str, dict[str, int]]]:
    """What a denoiser's weight file takes: of all that is not a choice, and of each layer in each form.

    Args:
        model (`nn.Module`): float.
        palette (`Palette`): its layers.

    Returns:
        `tuple[int, dict[str, dict[str, int]]]`: bytes; layer → scheme → bytes.
    """
    state = model.state_dict()
    digits = len(str(sum(tensor.numel() * tensor.element_size() for tensor in state.values())))
    own: dict[str, dict[str, int]] = {
        name: {scheme: _state_bytes(layer.state_dict(prefix=f"{name}."), digits) for scheme, layer in options.items()}
        for name, options in palette.layers.items()
    }
    rest = {key: value for key, value in state.items() if key.rpartition(".")[0] not in palette.layers}
    metadata = json.dumps({"__metadata__": {"format": "pt", **file_metadata(MSFPConfig())}}, separators=(",", ":"))
    return _state_bytes(rest, digits) + len(metadata.encode()) + 16, own  # its length, and padding to 8 bytes


def _state_bytes(state: Mapping[str, Tensor], digits: int) -> int:
    return sum(tensor_bytes(name, tensor, digits) for name, tensor in state.items())

"""What weight files are checked for when they are loaded: where they lie, digest, formats, finite numbers.

Files of format version 2 say the formats of each layer, which must be the record's; in memory they are made from it.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError
from ..layers import QuantLayer
from ..layers.convert import quant_layers
from ..layers.stored import FORMATS_TENSOR, same_formats, say_formats
from .digest import Digest
from .opening import opened

_ENDING = f".{FORMATS_TENSOR}"


def formats_of(model: nn.Module) -> dict[str, Tensor]:
    """What the files of a model say, by the tensors' names."""
    return {f"{name}{_ENDING}": layer.formats_tensor() for name, layer in quant_layers(model)}


def without_formats(names: Iterable[str], config: Any) -> list[str]:
    """Names of tensors that libraries place; version 1 knows no formats in files, so there they are left over."""
    return [name for name in names if config.format_version == 1 or not name.endswith(_ENDING)]


def check_formats(tensors: Mapping[str, Tensor], recorded: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a file says of formats that the record knows; refused where it is not what the record says.

    Args:
        tensors (`Mapping[str, Tensor]`): of a file; others than formats are not looked at.
        recorded (`Mapping[str, Tensor]`): see `formats_of`; a layer that the files call otherwise is passed over.

    Raises:
        CheckpointError: so it is.
    """
    found = {name: said for name, said in tensors.items() if name in recorded}
    for name, said in found.items():
        expected = recorded[name]
        if not same_formats(said, expected):
            raise CheckpointError(
                f"`{name}` says {say_formats(said)}, but config.json says {say_formats(expected)}: damaged file, "
                f"or files of two checkpoints."
            )
    return found


def check_places(files: Sequence[Path]) -> None:
    """Refuse packed weights from pickles, or from outside the model's folder.

    Raises:
        CheckpointError: a file that is no safetensors file, or an index that leads elsewhere.
    """
    for file in files:
        if file.suffix != ".safetensors":
            raise CheckpointError(f"Packed weights are stored as safetensors, but got {file.name}: not one of ours.")
        if file.parent != files[0].parent or not (file.parent / "config.json").is_file():
            raise CheckpointError(f"Weights must lie in the model's folder, but its index names {file}.")


def check_floats(model: nn.Module) -> None:
    """Refuse biases, norms and the like that are not finite; packed models have few of them.

    Raises:
        CheckpointError: one is not.
    """
    packed = {id(module.packed_weight) for module in model.modules() if isinstance(module, QuantLayer)}
    for name, tensor in model.named_parameters():
        if id(tensor) not in packed and not tensor.is_meta and not torch.isfinite(tensor).all():
            raise CheckpointError(f"`{name}` must be finite, but got NaN or infinity: damaged file.")


def check_files(files: Sequence[Path], digest: Digest | None, recorded: Mapping[str, Tensor]) -> None:
    """Check whole files before a library reads them.

    Args:
        files (`Sequence[Path]`): all that will be read.
        digest (`Digest`, *optional*): None leaves its check out.
        recorded (`Mapping[str, Tensor]`): see `formats_of`.

    Raises:
        CheckpointError: no safetensors, damaged ones, or other tensors than the record's.
    """
    check_places(files)
    names = set()
    for file in files:
        with opened(file) as handle:
            for name in handle.keys():
                names.add(name)
                if digest is not None or name.endswith(_ENDING):
                    tensor = handle.get_tensor(name)
                    if digest is not None:
                        digest.check({name: tensor})
                    check_formats({name: tensor}, recorded)
    if digest is not None and files:
        digest.check_complete(names)

"""From format version 1 to 2, file by file: no number is read as another, whatever dtype or variant it has."""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from diffusers import AutoModel
from safetensors.torch import save_file
from torch import Tensor

from ...checkpoint.describe import TRANSFORMERS_WEIGHTS, WEIGHTS, component_dirs, read_config
from ...checkpoint.digest import Digest
from ...checkpoint.opening import opened
from ...checkpoint.version2 import FORMAT_VERSION
from ...errors import CheckpointError, ConfigError
from ...layers.skeleton import LayerGroup
from ...layers.stored import FORMATS_TENSOR, formats_tensor
from ...outputs import write_whole
from ..config import MSFPConfig
from .saving import write_digest

_FILE = re.compile(rf"({WEIGHTS}|{TRANSFORMERS_WEIGHTS})(?:\.([\w-]+?))?(?:-\d{{5}}-of-\d{{5}})?\.safetensors")
_INDEX = re.compile(rf"({WEIGHTS}|{TRANSFORMERS_WEIGHTS})[\w.-]*\.json")


def outdated_components(folder: Path) -> tuple[list[str], list[str]]:
    """Quantized components of a pipeline's or model's folder: those of format version 1, and those of the present one.

    Raises:
        CheckpointError: no quantized checkpoint, or one that is newer than this package.
    """
    versions = {
        name: MSFPConfig.from_dict(read_config(part)["quantization_config"]).format_version
        for name, part in component_dirs(folder).items()
    }
    old = [name for name, version in versions.items() if version < FORMAT_VERSION]
    return old, [name for name in versions if name not in old]


def migrate(folder: Path, names: list[str], made: Path) -> None:
    """Write a folder anew, with components as version 2, and load these; other files are linked or copied.

    Args:
        folder (`Path`): not changed.
        names (`list[str]`): see `outdated_components`.
        made (`Path`): does not exist yet; on the same disk.

    Raises:
        ConfigError: links to files elsewhere, as in the Hub's cache.
        CheckpointError: files that are no checkpoint of version 1, pickles among them, or variants that differ.
    """
    linked = next((path for path in (folder, *folder.rglob("*")) if path.is_symlink()), None)
    if linked is not None:
        raise ConfigError(f"A checkpoint to convert must hold its files itself, but {linked} is a link. Copy it first.")
    shutil.copytree(folder, made, copy_function=_link_or_copy)
    for name in names:
        variants = _convert(made / name)
        for variant in variants:
            AutoModel.from_pretrained(str(made / name), variant=variant)  # says what is wrong with it


def _link_or_copy(source: str, target: str) -> None:
    try:
        os.link(source, target)
    except OSError:  # a disk that knows no hard links
        shutil.copy2(source, target)


def _convert(folder: Path) -> set[str | None]:
    """Rewrite a component's weights, indices and config; its variants."""
    config = MSFPConfig.from_dict(read_config(folder)["quantization_config"])
    written, record = config.to_dict(), config.take_record()
    files = {path: match[2] for path in sorted(folder.iterdir()) if (match := _FILE.fullmatch(path.name))}
    if not files or any(path.suffix == ".bin" for path in folder.iterdir()):
        raise CheckpointError(
            f"Packed weights are stored as safetensors, and as these alone, but {folder} is otherwise."
        )
    formats, seen = _formats(record.layers or ()), set()
    sums: dict[tuple[str, str], str] = {}
    for path in files:
        own = _add_formats(path, formats)
        seen |= own.keys() & formats.keys()
        for key, value in Digest.of(own).sums.items():
            if sums.setdefault(key, value) != value:
                raise CheckpointError(f"All variants must have the same `{key[0]}`, but those in {folder} differ.")
    if missing := sorted(formats.keys() - seen):
        raise CheckpointError(f"{folder} must hold the weight of `{missing[0]}`, but it does not: not its record.")
    for path in [path for path in folder.iterdir() if _INDEX.fullmatch(path.name)]:
        _add_to_index(path, formats)
    write_digest(folder, Digest(sums), written | {"format_version": FORMAT_VERSION})
    return set(files.values())


def _formats(layers: Sequence[LayerGroup]) -> dict[str, Tensor]:
    """What each layer of a record says, by the name of its weight."""
    return {
        f"{name}.weight": formats_tensor(group.weight_format, group.input_format, group.observing)
        for group in layers
        for name in group.modules
    }


def _said(weight: str) -> str:
    return f"{weight.removesuffix('weight')}{FORMATS_TENSOR}"


def _add_formats(path: Path, formats: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Replace a weight file by one that says the formats of its layers; all its tensors."""
    with opened(path) as handle:
        metadata = dict(handle.metadata() or {}) | {"format_version": str(FORMAT_VERSION)}
        tensors = {name: handle.get_tensor(name) for name in handle.keys()}
    tensors |= {_said(name): formats[name].clone() for name in tensors.keys() & formats.keys()}
    part = path.with_name(f".{path.name}.part")
    save_file(tensors, part, metadata=metadata)
    part.replace(path)  # never through the link into the original
    return tensors


def _add_to_index(path: Path, formats: Mapping[str, Tensor]) -> None:
    index = json.loads(path.read_text(encoding="utf-8"))
    files = index["weight_map"]
    new = {_said(name): file for name, file in files.items() if name in formats}
    metadata = index.setdefault("metadata", {})
    if isinstance(metadata.get("total_size"), int):
        metadata["total_size"] += sum(formats[name].numel() for name in files if name in formats)
    metadata |= {"format_version": str(FORMAT_VERSION)} if "format_version" in metadata else {}
    files |= new
    write_whole(path, json.dumps(index, indent=2, sort_keys=True) + "\n")

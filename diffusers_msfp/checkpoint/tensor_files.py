"""Tensor files larger than memory: read tensor by tensor, written tensor by tensor."""

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..compat.torch import tree_leaves
from ..errors import CheckpointError, ConfigError
from .describe import INDEX, WEIGHTS, weight_files, weights_by_variant
from .digest import checksum
from .opening import opened

MAX_SHARD_SIZE = "10GB"
"""diffusers' own default."""


def bytes_per_number(file: Path) -> float | None:
    """What a number takes in a weight file, on average; None where it cannot be read."""
    if file.suffix == ".safetensors":
        with opened(file) as handle:
            numbers = sum(math.prod(handle.get_slice(name).get_shape()) for name in handle.keys())
    else:
        try:
            state = torch.load(file, map_location="meta", mmap=True, weights_only=True)
        except (UnpicklingError, RuntimeError):
            return None
        numbers = sum(each.numel() for each in tree_leaves(state) if isinstance(each, Tensor))
    return file.stat().st_size / max(1, numbers)


class TensorFolder(Mapping):
    """The weights in a model's folder, name → tensor, mapped into memory when they are asked for.

    Args:
        folder (`Path`): with what a load would read: safetensors, one file or sharded, or `.bin`.
        variant (`str`, *optional*): read its files where there are some.

    Raises:
        CheckpointError: no such files, or damaged ones.
    """

    def __init__(self, folder: Path, variant: str | None = None) -> None:
        self.files = weight_files(folder, variant, variants=False)
        if not self.files:
            variants = ", ".join(f"`{name}`" for name in weights_by_variant(folder))
            there = f"those of {variants}: name one as `variant`" if variants else "none"
            raise CheckpointError(f"{folder} must hold weights ({WEIGHTS}.safetensors), but there are {there}.")
        self._pickled: dict[Path, dict[str, Tensor]] = {}
        self._ranges = {name: file for file in self.files for name in self._open(file)}

    def _open(self, file: Path) -> list[str]:
        """Names of a file's tensors."""
        try:
            if file.suffix == ".bin":
                self._pickled[file] = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                return list(self._pickled[file])
            with safe_open(file, framework="pt") as handle:
                return list(handle.keys())
        except (SafetensorError, UnpicklingError, RuntimeError, FileNotFoundError) as error:
            reason = str(error).partition("\n")[0]
            raise CheckpointError(f"{file} must be a complete weight file, but it is not ({reason}).") from error

    def __getitem__(self, name: str) -> Tensor:
        file = self._ranges[name]
        if file in self._pickled:
            return self._pickled[file][name]
        with safe_open(file, framework="pt") as handle:  # anew, for a mapping keeps all pages that were read through it
            return handle.get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._ranges)

    def __len__(self) -> int:
        return len(self._ranges)


class TensorFile(Mapping):
    """Tensors of one safetensors file under other names, mapped into memory when they are asked for.

    Args:
        file (`Path`): where they are.
        places (`Mapping[str, str | Tensor]`): name → name in the file, or a tensor that is in memory already.
    """

    def __init__(self, file: Path, places: Mapping[str, str | Tensor]) -> None:
        self._file, self._places = file, places

    def __getitem__(self, name: str) -> Tensor:
        source = self._places[name]
        if isinstance(source, Tensor):
            return source
        with safe_open(self._file, framework="pt") as handle:  # anew, as above
            return handle.get_tensor(source)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


class TensorLayout:
    """safetensors files whose every byte has its place before the first is known: filled in any order.

    They are split, named and indexed as `save_pretrained` does it.

    Args:
        state (`Mapping[str, Tensor]`): shapes and dtypes; may be on the meta device.
        metadata (`Mapping[str, str]`): of each file.
        max_shard_size (`int` or `str`): bytes in a file, or like `"5GB"`.

    Raises:
        ConfigError: a size that makes no sense.
    """

    def __init__(self, state: Mapping[str, Tensor], metadata: Mapping[str, str], max_shard_size: int | str) -> None:
        try:
            self._split = split_torch_state_dict_into_shards(
                dict(state), filename_pattern=f"{WEIGHTS}{{suffix}}.safetensors", max_shard_size=max_shard_size
            )
        except (ValueError, OverflowError) as error:
            raise ConfigError(f"`max_shard_size` must be a size like '5GB', but got {max_shard_size!r}.") from error
        self._metadata, self._state = dict(metadata), state
        self._files: dict[str, tuple[bytes, int]] = {}  # name → header, number of bytes
        self._ranges: dict[str, tuple[str, int, int]] = {}  # name → file, first byte, number of bytes
        for file, names in self._split.filename_to_tensors.items():
            self._lay_out(file, {name: state[name] for name in names})

    def _lay_out(self, file: str, tensors: Mapping[str, Tensor]) -> None:
        header: dict[str, dict] = {"__metadata__": {"format": "pt", **self._metadata}}
        ranges, end = {}, 0
        # Wide numbers first, so that all of them are aligned.
        for name, tensor in sorted(tensors.items(), key=lambda item: (-item[1].element_size(), item[0])):
            begin, end = end, end + tensor.numel() * tensor.element_size()
            dtype = json.loads(save({"": tensor.new_empty(0, device="cpu")})[8:])[""]["dtype"]
            header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [begin, end]}
            ranges[name] = (begin, end - begin)
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._files[file] = (len(text).to_bytes(8, "little") + text, start + end)
        self._ranges |= {name: (file, start + begin, size) for name, (begin, size) in ranges.items()}

    def create(self, folder: Path) -> None:
        """Make the files, without numbers; those that are there already keep theirs."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, (header, size) in self._files.items():
            with open(folder / name, "ab") as file:  # a new one is sparse: it takes its room as it is filled
                file.truncate(size)
            with open(folder / name, "r+b") as file:
                file.write(header)

    def write(self, folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, str]:
        """Put tensors in their places; the checksum of each."""
        checksums = {}
        for name, tensor in tensors.items():
            file, first, size = self._ranges[name]
            data = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data
            if len(data) != size:
                raise CheckpointError(f"`{name}` must have {size} bytes, but got {len(data)}: not this model's.")
            with open(folder / file, "r+b") as handle:
                handle.seek(first)
                handle.write(data)
            checksums[name] = checksum(name, self._state[name], data)
        return checksums

    def checksums(self, folder: Path, names: list[str]) -> dict[str, str]:
        """Of tensors as they are in the files."""
        found = {}
        for name in names:
            file, first, size = self._ranges[name]
            with open(folder / file, "rb") as handle:
                handle.seek(first)
                found[name] = checksum(name, self._state[name], handle.read(size))
        return found

    def finish(self, folder: Path) -> None:
        """Write the index, if there are several files."""
        if self._split.is_sharded:
            total = dict(self._split.metadata) | self._metadata
            index = {"metadata": total, "weight_map": self._split.tensor_to_filename}
            (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")

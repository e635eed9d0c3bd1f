"""`digest` in `quantization_config`: a checksum of every tensor in a checkpoint's files, checked when they are loaded.

Tensors that were exchanged, or whose bytes were damaged, may still decode to valid numbers; only a checksum tells. Each
is the CRC-32 of name, dtype, shape and bytes: what zip and PNG rely on against accidents, and the fastest that every
Python has (0.15 s for a file of 434 MB that is in the system's cache, one core; SHA-256 takes twice as long where the
processor helps, and many times that elsewhere). Against malice it is no protection, nor could any digest be that lies
beside the files: hashes of the Hub are.

There is one for each tensor, so that an error can name it, eight characters long and grouped by what modules hold, so
that config.json stays short: 64 kB for the shape of Stable Diffusion 1.5. A tensor counts once for each dtype that it
has in the plain files and in those of variants. The environment variable `MSFP_CHECK_DIGEST=0` turns the check off.
"""

import hashlib
import json
import os
import re
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CheckpointError

ALGORITHM = "crc32"
VARIABLE = "MSFP_CHECK_DIGEST"
_LENGTH = 8
_HEX = re.compile(rf"([0-9a-f]{{{_LENGTH}}})+")


def checking() -> bool:
    """Whether digests are checked: always, unless the environment says `MSFP_CHECK_DIGEST=0`."""
    return os.environ.get(VARIABLE, "1").strip().lower() not in ("0", "false", "no", "off")


def dtype_name(tensor: Tensor) -> str:
    """Like `"float32"`."""
    return str(tensor.dtype).removeprefix("torch.")


def checksum(name: str, like: Tensor, data: bytes | memoryview | None = None) -> str:
    """A tensor's checksum, eight hexadecimal digits.

    Args:
        name (`str`): as in the files.
        like (`Tensor`): with the tensor's dtype and shape.
        data (`bytes`, *optional*): its bytes, if `like` has not the values.
    """
    if data is None:
        plain = like.detach().to("cpu").contiguous().reshape(-1)
        data = plain.view(torch.uint8).numpy().data
    head = f"{name} {dtype_name(like)} {list(like.shape)}".encode()
    return f"{zlib.crc32(data, zlib.crc32(head)):0{_LENGTH}x}"


@dataclass(frozen=True)
class Digest:
    """Checksums of a checkpoint's tensors.

    Args:
        sums (`Mapping[tuple[str, str], str]`): (tensor's name, dtype) → checksum.
    """

    sums: Mapping[tuple[str, str], str]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> "Digest":
        """Of tensors by their names in the files."""
        return cls({(name, dtype_name(tensor)): checksum(name, tensor) for name, tensor in tensors.items()})

    @classmethod
    def from_dict(cls, record: Any) -> "Digest":
        """Read a record.

        Raises:
            CheckpointError: malformed, or made by another algorithm.
        """
        try:
            if isinstance(record["algorithm"], str) and record["algorithm"] != ALGORITHM:
                raise CheckpointError(
                    f"This package checks digests made with {ALGORITHM}, but config.json has one made with "
                    f"{record['algorithm']!r}: it needs a newer package (`pip install -U diffusers-msfp`)."
                )
            sums = {}
            for group in record["groups"]:
                tensors = [tuple(entry.split(":")) for entry in group["tensors"]]
                for module, text in group["modules"].items():
                    fits = _HEX.fullmatch(text) and len(text) == _LENGTH * len(tensors)
                    if not fits or any(len(entry) != 2 for entry in tensors) or set(group) != {"tensors", "modules"}:
                        raise TypeError(f"entry of {module!r}")
                    for index, (tensor, dtype) in enumerate(tensors):
                        name = f"{module}.{tensor}" if module else tensor
                        sums[name, dtype] = text[_LENGTH * index : _LENGTH * (index + 1)]
            if set(record) != {"algorithm", "groups"} or record["algorithm"] != ALGORITHM:
                raise TypeError("its keys")
        except (KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"`digest` in config.json is malformed ({error}): damaged file.") from error
        return cls(sums)

    def to_dict(self) -> dict:
        """In types that JSON knows: modules with the same kinds of tensors together."""
        modules: dict[str, list[tuple[str, str]]] = {}
        for (name, dtype), value in sorted(self.sums.items()):
            module, _, tensor = name.rpartition(".")
            modules.setdefault(module, []).append((f"{tensor}:{dtype}", value))
        groups: dict[tuple[str, ...], dict[str, str]] = {}
        for module, entries in modules.items():
            kinds, values = zip(*entries, strict=True)
            groups.setdefault(kinds, {})[module] = "".join(values)
        return {
            "algorithm": ALGORITHM,
            "groups": [{"tensors": list(kinds), "modules": names} for kinds, names in groups.items()],
        }

    def joined(self, other: "Digest") -> "Digest":
        """With another variant's, whose packed tensors are the same; without it where any common tensor differs."""
        common = self.sums.keys() & other.sums.keys()
        same = {name for name, _ in self.sums} == {name for name, _ in other.sums}
        return (
            Digest({**other.sums, **self.sums})
            if same and all(self.sums[key] == other.sums[key] for key in common)
            else self
        )

    def check(self, tensors: Mapping[str, Tensor]) -> None:
        """Compare tensors, some or all, with what is recorded.

        Raises:
            CheckpointError: one differs or is not recorded; its name is said.
        """
        for name, tensor in tensors.items():
            expected = self.sums.get((name, dtype_name(tensor)))
            if expected is None:
                raise CheckpointError(
                    f"The files may hold only tensors that the digest in config.json knows, but got `{name}` "
                    f"({dtype_name(tensor)}): exchanged files, or damaged ones. {_WAY_OUT}"
                )
            found = checksum(name, tensor)
            if found != expected:
                raise CheckpointError(
                    f"`{name}` must have the checksum {expected} that config.json records, but got {found}: damaged "
                    f"bytes, or exchanged tensors. {_WAY_OUT}"
                )

    def check_complete(self, names: Iterable[str]) -> None:
        """Refuse files that lack tensors.

        Raises:
            CheckpointError: the first that is missing.
        """
        missing = sorted({name for name, _ in self.sums} - set(names))
        if missing:
            raise CheckpointError(
                f"A checkpoint must hold `{missing[0]}`, but it does not: damaged or incomplete file. {_WAY_OUT}"
            )


def fingerprint(models: Iterable[nn.Module]) -> str | None:
    """What tells quantized models from others, in whatever dtype and from whatever folder they were loaded.

    Args:
        models (`Iterable[nn.Module]`): all quantized parts of a pipeline, their ranges frozen.

    Returns:
        `str`: 16 hexadecimal digits of the SHA-256 of all their tensors, those of floats as float16; None for none.
    """
    sums = [
        checksum(name, tensor.half() if tensor.is_floating_point() else tensor)
        for model in models
        for name, tensor in model.state_dict().items()
    ]
    return hashlib.sha256("".join(sorted(sums)).encode()).hexdigest()[:16] if sums else None


_WAY_OUT = f"Download or save the checkpoint again; `{VARIABLE}=0` in the environment loads it unchecked."


def recorded_digest(folder: str | Path) -> Digest:
    """What a folder's `config.json` says already, if it is there and says anything."""
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        return Digest.from_dict(config["quantization_config"]["digest"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # no checkpoint, or one that is replaced
        return Digest({})

"""What was done to a model, as its checkpoint says it: read from `quantization_config`, or from the model itself.

The user's request (scheme, overrides, what stays float) is `MSFPConfig`; both share a JSON object in files, and nothing
else. A model in memory has no record: it is read off its layers and of what its methods left on it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from ..errors import CheckpointError
from ..layers.skeleton import LayerGroup, describe_layers
from ..methods.method import parts
from ..sampling.observation import Calibration, calibration_of
from .digest import VARIABLE, Digest, checking
from .version2 import FORMAT_VERSION, check_version, check_version_1, check_version_2

MAX_DEPTH = 8
REQUEST = frozenset({"quant_method", "format_version", "scheme", "modules_to_not_convert", "scheme_overrides"}) | {
    "components_to_quantize"
}
"""Keys of `quantization_config` that are the user's request."""


@dataclass(frozen=True)
class ModelRecord:
    """The layers of a quantized model, its calibration and what methods left on it.

    Args:
        layers (`tuple[LayerGroup, ...]`, *optional*): None in a damaged file; see `require_complete`.
        calibration (`Calibration`, *optional*): None in a damaged file, and counts as frozen.
        parts (`Mapping[str, Any]`): key of a method's part (`"split"`, `"temporal"`, `"adapters"`) → its record.
        digest (`Digest`, *optional*): of the files; a model in memory has none.
        format_version (`int`): of the checkpoint, 1 or 2; see `version2` for what 2 adds.
    """

    layers: tuple[LayerGroup, ...] | None
    calibration: Calibration | None = None
    parts: Mapping[str, Any] = field(default_factory=dict)
    digest: Digest | None = None
    format_version: int = FORMAT_VERSION

    @classmethod
    def of(cls, model: nn.Module, format_version: int = FORMAT_VERSION) -> "ModelRecord":
        """What is true of a quantized model now.

        Args:
            format_version (`int`): that it is to be saved as.
        """
        found = {part.key: part.record_of(model) for part in parts()}
        return cls(
            describe_layers(model),
            calibration_of(model),
            {key: record for key, record in found.items() if record is not None},
            format_version=format_version,
        )

    @classmethod
    def keys(cls) -> set[str]:
        """Of its JSON object."""
        return {"layers", "calibration", "digest", *(part.key for part in parts())}

    @classmethod
    def from_dict(cls, record: Mapping) -> "ModelRecord":
        """Read and validate a checkpoint's; unknown keys are refused in version 2.

        Args:
            record (`Mapping`): `quantization_config`.

        Raises:
            CheckpointError: anything that no version of this package could have written, or that needs a newer one.
        """
        format_version = check_version(record.get("format_version", 1))
        if format_version > 1:
            check_version_2(record, cls.keys() | REQUEST)
        else:
            check_version_1(record)
        known = {key: record.get(key) for key in sorted(cls.keys())}
        _require_flat(list(known.values()))
        layers = known["layers"]
        if layers is not None and not isinstance(layers, list):
            raise CheckpointError(
                f"`layers` in config.json must be a list, but got {type(layers).__name__}: damaged file."
            )
        digest = known["digest"] if format_version > 1 else None
        return cls(
            None if layers is None else tuple(LayerGroup.from_dict(group) for group in layers),
            None if known["calibration"] is None else Calibration.from_dict(known["calibration"]),
            {part.key: part.read(known[part.key]) for part in parts() if known[part.key] is not None},
            None if digest is None else Digest.from_dict(digest),
            format_version,
        )

    def to_dict(self) -> dict:
        """In types that JSON knows; what is younger than the format only where there is some."""
        written = {part.key: part.write(self.parts[part.key]) for part in parts() if part.key in self.parts}
        return (
            {
                "layers": None if self.layers is None else [group.to_dict() for group in self.layers],
                "calibration": None if self.calibration is None else self.calibration.to_dict(),
                "adapters": None,
            }
            | written
            | ({} if self.digest is None else {"digest": self.digest.to_dict()})
        )

    def names(self) -> frozenset[str]:
        """Of the quantized layers."""
        return frozenset(name for group in self.layers or () for name in group.modules)

    def require_complete(self) -> None:
        """Refuse a record that does not say what its layers are, or lacks its digest.

        Raises:
            CheckpointError: so it is.
        """
        if self.layers is None:
            raise CheckpointError("config.json of a quantized model must have `layers`, but it has none: damaged file.")
        if self.format_version > 1 and self.digest is None and checking():
            raise CheckpointError(
                f"config.json of format version {self.format_version} must have `digest`, but it has none: damaged "
                f"file, or one that was not saved to its end. `{VARIABLE}=0` in the environment loads it unchecked."
            )

    def with_digest(self, digest: Digest | None) -> "ModelRecord":
        """The same, with the digest of its files; version 1 has none."""
        return replace(self, digest=digest if self.format_version > 1 else None)

    def digest_to_check(self) -> Digest | None:
        """What files are checked by; None where there is nothing to check."""
        return self.digest if checking() else None


def _require_flat(values: list) -> None:
    """Refuse what is nested deeper than any record."""
    level = values
    for _ in range(MAX_DEPTH):
        level = [
            part
            for value in level
            if isinstance(value, list | Mapping)
            for part in (value.values() if isinstance(value, Mapping) else value)
        ]
    if level:
        raise CheckpointError(
            f"A config's record is at most {MAX_DEPTH} levels deep, but got a deeper one: damaged file."
        )

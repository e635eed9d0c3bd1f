"""Format version 2 of a checkpoint's record: what may stand in it, and what this package can execute of it.

Beside the keys of version 1, `quantization_config` of version 2 holds:

| key | meaning | executed |
| --- | --- | --- |
| `digest` | a checksum of every tensor, see `digest.Digest`; must be there | yes |
| `formats` of each layer, a tensor in the files | of weight and input, see `layers.stored.formats_tensor` | yes |
| `adapters.reads` | `"float"` or `"codes"`: what adapters beside the weights read; absent means `"float"` | yes |
| `layers[…].group_size` | group scales of the weights, see below | yes |
| `timestep_scales` | the input's scales by timestep, see `TimestepScales` | no |
| `output_correction` | correction of the output by timestep, see `methods.correction.CorrectionTable` | yes |
| `channel_scales` | scales per input channel, see `ChannelScales` | no |

`group_size` (whole number ≥ 2): so many consecutive weights of an output channel, its input dimensions flattened, share
a multiplier of the channel's scale: tensor `<layer>.group_scale`, `(C, bytes)`, uint8, 4 bits each, packed as codes.

What is not executed yet has its place, so that version 2 need not be raised again: it is read, validated, and then
refused, for a model without it would be another one. Unknown keys are refused too. In version 1 they get a warning, as
ever, and a model that was loaded from version 1 is saved as version 1: it has neither digest nor formats in its files.
Newly quantized models are saved as version 2, for the digest is what protects people; `convert-checkpoint` migrates.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, fields
from typing import Any

from ..errors import CheckpointError

FORMAT_VERSION = 2
MAX_ENTRIES = 2**16
LAYER_KEYS = {"weight", "input", "modules", "group_size"}
CALIBRATION_KEYS = {"state", "last_timestep", "has_fallen", "first_timestep"}
NEWER = "it needs a newer package: `pip install -U diffusers-msfp`."


@dataclass(frozen=True)
class TimestepScales:
    """The input's scale and zero point by timestep, for any layers, also with banks or adapters. Not executed yet.

    Args:
        over (`str`): `"timesteps"` (the nearest entry serves) or `"intervals"` (the entry that it lies in).
        entries (`int`): S. Tensors: `timestep_scales.points` `(S,)`, float32, ascending (timesteps, or lower ends), and
            of each layer `input_scale` and `input_zero_point`, `(S,)`, or `(K, S)` with K banks or adapters.
        layers (`list[str]`): layers that have them.
    """

    over: str
    entries: int
    layers: list[str]

    def __post_init__(self) -> None:
        _require("timestep_scales.over", self.over, self.over in ("timesteps", "intervals"))
        _require("timestep_scales.entries", self.entries, _whole(self.entries, 1, MAX_ENTRIES))
        _require("timestep_scales.layers", self.layers, _is_names(self.layers))


@dataclass(frozen=True)
class ChannelScales:
    """A factor for each input channel, folded into the weight's columns. Not executed yet.

    Args:
        layers (`list[str]`): layers that have them, as tensor `<layer>.channel_scale`, `(in,)`, float32.
        power_of_two (`bool`): whether all are powers of two.
    """

    layers: list[str]
    power_of_two: bool = False

    def __post_init__(self) -> None:
        _require("channel_scales.layers", self.layers, _is_names(self.layers))
        _require("channel_scales.power_of_two", self.power_of_two, isinstance(self.power_of_two, bool))


RESERVED = {
    "timestep_scales": TimestepScales,
    "channel_scales": ChannelScales,
}
"""Key of a record → what it must hold."""


def check_version(version: Any) -> int:
    """Refuse what is no format version, or a newer one.

    Raises:
        CheckpointError: so it is.
    """
    if not _whole(version, 1, 2**31):
        raise CheckpointError(f"`format_version` must be a whole number ≥ 1, but got {version!r}.")
    if version > FORMAT_VERSION:
        raise CheckpointError(
            f"This package reads checkpoints up to format version {FORMAT_VERSION}, but got {version}. Upgrade it: "
            f"`pip install -U diffusers-msfp`."
        )
    return version


def check_version_2(record: Mapping, known: Collection[str]) -> None:
    """Refuse a record of version 2 that is malformed, or says what this package cannot execute.

    Args:
        known (`Collection[str]`): keys that are read elsewhere.

    Raises:
        CheckpointError: unknown keys, values of another kind, or reserved ones.
    """
    _refuse_unknown("quantization_config", set(record) - set(known) - RESERVED.keys())
    used = []
    for key, cls in RESERVED.items():
        value = record.get(key)
        if value is None:
            continue
        if not isinstance(value, Mapping):
            raise CheckpointError(f"`{key}` in config.json must be an object, but got {value!r}: damaged file.")
        _refuse_unknown(key, set(value) - {field.name for field in fields(cls)})
        try:
            cls(**value)
        except TypeError as error:
            raise CheckpointError(f"`{key}` in config.json is malformed ({error}): damaged file.") from error
        used.append(key)
    groups = record.get("layers")
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, Mapping):  # else refused where layers are made
            _refuse_unknown("layers", set(group) - LAYER_KEYS)
    if isinstance(calibration := record.get("calibration"), Mapping):
        _refuse_unknown("calibration", set(calibration) - CALIBRATION_KEYS)
    if used:
        raise CheckpointError(f"This package cannot execute `{used[0]}` of format version 2 yet: {NEWER}")


def check_version_1(record: Mapping) -> None:
    """Refuse what changes the meaning of a part that version 1 has too.

    Raises:
        CheckpointError: a kind of adapters, a correction of the output or groups, which only version 2 can say.
    """
    if record.get("output_correction") is not None:
        raise CheckpointError(
            "`output_correction` in config.json belongs to format version 2, but it says 1: damaged file."
        )
    groups = record.get("layers")
    for group in groups if isinstance(groups, list) else ():
        if isinstance(group, Mapping) and "group_size" in group:
            raise CheckpointError(
                "`layers[…].group_size` in config.json belongs to format version 2, but it says 1: damaged file."
            )
    adapters = record.get("adapters")
    if isinstance(adapters, Mapping) and "reads" in adapters:
        raise CheckpointError(
            "`adapters.reads` in config.json belongs to format version 2, but it says 1: damaged file."
        )


def _refuse_unknown(where: str, unknown: set) -> None:
    if unknown:
        raise CheckpointError(
            f"A record of format version 2 may hold only known keys, but `{where}` in config.json has "
            f"{', '.join(sorted(map(str, unknown)))}: {NEWER}"
        )


def _require(what: str, value: object, fits: bool) -> None:
    if not fits:
        raise CheckpointError(f"`{what}` in config.json must not be {value!r}: damaged file.")


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _is_names(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(name, str) and name for name in value)

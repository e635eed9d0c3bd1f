"""Results files beside a checkpoint: what `evaluate`, `compare` and `bench` print with `--json`, told by their fields.

A card takes its figures from these files and from nowhere else; what has no file is named as not measured.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from ..errors import ConfigError

FOLDER = "results"
CHECKPOINT = f"{FOLDER}/checkpoint.json"
"""What the card says beside the measurements; written when it is made."""

_NUMBER = (int, float)
_PLACES = ("candidate", "reference", "model", "out")


@dataclass(frozen=True)
class Results:
    """The measurements that were found; None where there is no file.

    Args:
        evaluation (`dict`, *optional*): of `evaluate`.
        comparison (`dict`, *optional*): of `compare`.
        speed (`dict`, *optional*): of `bench`.
        files (`dict`): kind → its file.
    """

    evaluation: dict | None = None
    comparison: dict | None = None
    speed: dict | None = None
    files: Mapping[str, Path] = field(default_factory=dict)

    @property
    def by_timestep(self) -> dict[str, float] | None:
        """Timestep → relative error of the denoiser's output."""
        return (self.comparison or self.evaluation or {}).get("eps_rel_l2_by_timestep")

    @property
    def sizes(self) -> tuple[int, int] | None:
        """Bytes of the denoiser's weights in full precision and quantized."""
        for found in (self.evaluation, self.comparison):
            one, other = ((found or {}).get(key) for key in ("bytes_reference", "bytes_quantized"))
            if isinstance(one, int) and isinstance(other, int) and one > 0 and other > 0:
                return one, other
        return None

    def require_of(self, checkpoint: str | None) -> None:
        """Refuse figures of something else.

        Args:
            checkpoint (`str`, *optional*): `fingerprint` of what is published.

        Raises:
            ConfigError: a file names another.
        """
        for kind, file in self.files.items():
            found = getattr(self, kind) or {}
            named = found.get("checkpoint")
            if named != checkpoint:
                float_model = "checkpoint" in found
                other = f"was measured with {named or 'a float model'}" if float_model else "names no checkpoint"
                raise ConfigError(
                    f"A card's figures must be of the checkpoint that is published, {checkpoint}, but {file} {other}. "
                    f"Measure this one, or remove the file."
                )

    def missing(self, base: str) -> dict[str, str]:
        """What was not measured → the command that measures it."""
        ways = {}
        if self.evaluation is None:
            ways["quality with confidence intervals"] = f"diffusers-msfp evaluate DIR --reference {base}"
        if self.speed is None:
            bench = f"diffusers-msfp bench --model DIR --json > DIR/{FOLDER}/speed.json"
            ways["speed"] = f"mkdir -p DIR/{FOLDER} && {bench}"
        return ways

    def published(self) -> dict[str, dict]:
        """Path in the repository → what is published of a measurement: all but places on this machine."""
        kinds = {"evaluation": self.evaluation, "comparison": self.comparison, "speed": self.speed}
        return {
            f"{FOLDER}/{kind}.json": {key: value for key, value in content.items() if key not in _PLACES}
            for kind, content in kinds.items()
            if content is not None
        }


def read_results(folder: Path, more: Iterable[Path] = ()) -> Results:
    """Read `results/*.json` and `results.json`, what `evaluate` wrote beside the folder, and files that are named.

    Raises:
        ConfigError: a named file is not a result, a file holds what no measurement gives, or there are two of a kind.
    """
    found: dict[str, dict] = {}
    files: dict[str, Path] = {}
    named = [Path(path) for path in more]
    beside = [folder / "results.json", folder.parent / f"{folder.name}-evaluation" / "results.json"]
    for path in dict.fromkeys([*sorted((folder / FOLDER).glob("*.json")), *beside, *named]):
        if not path.is_file() and path not in named:
            continue
        content = _read(path)
        kind = _kind(content)
        if kind is None:
            if path in named:
                raise ConfigError(
                    f"{path} must be what `evaluate`, `compare` or `bench` prints with `--json`, but it is not."
                )
            continue
        if kind in found:
            raise ConfigError(f"A card takes one {kind}, but got {files[kind]} and {path}. Remove one of them.")
        found[kind], files[kind] = content, path
    return Results(**cast(Any, found), files=files)


def _read(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise ValueError(f"it holds {constant}")

    try:
        return in_present_words(json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse))
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path} must be a JSON file of finite numbers, but it is not ({error}).") from error


def in_present_words(content: object) -> object:
    """A results file with the names that its fields have now; older files are read for one version more."""
    if not isinstance(content, dict):
        return content
    found = {_RENAMED.get(key, key): value for key, value in content.items()}
    for key in ("settings", "preview"):
        if isinstance(found.get(key), dict):
            found[key] = {_RENAMED.get(name, name): value for name, value in found[key].items()}
    if isinstance(found.get("rows"), list):
        found["rows"] = [
            {_RENAMED.get(name, name): value for name, value in row.items()} if isinstance(row, dict) else row
            for row in found["rows"]
        ]
    return found


_RENAMED = {
    "bytes_ref": "bytes_reference",
    "bytes_cand": "bytes_quantized",
    "bytes_candidate": "bytes_quantized",
    "source": "candidate",
    "num": "num_samples",
    "steps": "num_inference_steps",
}


def _kind(content: object) -> str | None:
    """What a results file is, by its fields; None if it is something else."""
    if not isinstance(content, dict):
        return None
    figures, rows = content.get("figures"), content.get("rows")
    if isinstance(figures, dict) and isinstance(content.get("settings"), dict):
        pairs = figures.values()
        fits = all(isinstance(pair, dict) and all(_is_estimate(e) for e in pair.values()) for pair in pairs)
        return "evaluation" if fits and _is_by_timestep(content) else None
    if _is_by_timestep(content) and _is_number_with_interval(content, "image_psnr_db"):
        return "comparison"
    keys = ("seconds", "seconds_low", "seconds_high", "speedup")
    if isinstance(rows, list) and rows and all(isinstance(row, dict) and "provider" in row for row in rows):
        return "speed" if all(isinstance(row.get(key), _NUMBER) for row in rows for key in keys) else None
    return None


def _is_estimate(entry: object) -> bool:
    return isinstance(entry, dict) and all(isinstance(entry.get(key), _NUMBER) for key in ("value", "low", "high"))


def _is_number_with_interval(content: dict, key: str) -> bool:
    interval = content.get(f"{key}_interval")
    is_pair = isinstance(interval, list) and len(interval) == 2 and all(isinstance(end, _NUMBER) for end in interval)
    return isinstance(content.get(key), _NUMBER) and (interval is None or is_pair)


def _is_by_timestep(content: dict) -> bool:
    errors = content.get("eps_rel_l2_by_timestep")
    return (
        isinstance(content.get("eps_rel_l2"), _NUMBER)
        and isinstance(content.get("traj_rel_l2"), (*_NUMBER, type(None)))
        and isinstance(errors, dict)
        and all(t.replace(".", "", 1).isdecimal() and isinstance(e, _NUMBER) for t, e in errors.items())
        and all(math.isfinite(error) for error in errors.values())
    )

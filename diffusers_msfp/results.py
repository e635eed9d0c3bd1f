"""What verbs hand back: results as frozen dataclasses, and progress on the way."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Protocol


class OnProgress(Protocol):
    """A function that a verb calls on its way, in all verbs with the same arguments."""

    def __call__(self, done: int, total: int, /, **info: Any) -> None:
        """Take notice.

        Args:
            done (`int`): what is finished: steps, layers, parts, updates.
            total (`int`): of how many; 0 while that is not known.
            **info: what the verb knows besides: `stage` (`str`, what is being done), `part` (`str`, what was
                finished), `loss` (`float`), `note` (`str`).
        """


def in_stage(on_progress: OnProgress | None, stage: str) -> OnProgress | None:
    """A callback for one stage of a verb, which hears its name too; None where there is no callback."""
    if on_progress is None:
        return None
    return lambda done, total, /, **info: on_progress(done, total, **{"stage": stage} | info)


@dataclass(frozen=True, kw_only=True)
class Result:
    """Base of what verbs return: its fields are what was found, `to_dict` gives them as JSON knows them."""

    def to_dict(self) -> dict[str, Any]:
        """Plain data, which `--json` prints: fields by name, in order, `OPTIONAL` ones that are None left out."""
        own = {field.name: getattr(self, field.name) for field in fields(self)}
        optional = {field.name for field in fields(self) if field.metadata.get("optional")}
        return {name: plain(value) for name, value in own.items() if value is not None or name not in optional}


OPTIONAL: Mapping[str, bool] = {"optional": True}
"""Metadata of a field that `to_dict` leaves out where it is None."""


def plain(value: Any) -> Any:
    """A value as JSON knows it: results, mappings and sequences in depth, paths as text."""
    if isinstance(value, Mapping):
        return {str(key): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, Path):
        return str(value)
    return value.to_dict() if hasattr(value, "to_dict") else value

"""Settings of a config dataclass as data: name, type, default, and the meaning that its docstring gives."""

import inspect
import re
from collections.abc import Iterator
from dataclasses import MISSING, dataclass, fields
from typing import Any, get_type_hints

_ENTRY = re.compile(r"^ {4}(\w+) \((.+?)\):\s*(.*)$")


@dataclass(frozen=True)
class Setting:
    """One field of a config.

    Args:
        name (`str`): of the field.
        type (`Any`): its annotation.
        default (`Any`): None where there is none, or where it depends on other fields.
        meaning (`str`): of the docstring, in Markdown, on one line.
    """

    name: str
    type: Any
    default: Any
    meaning: str

    @property
    def type_name(self) -> str:
        """As it is written."""
        return self.type.__name__ if isinstance(self.type, type) else str(self.type)


def settings_of(config: type) -> Iterator[Setting]:
    """The fields of a dataclass, in order.

    Args:
        config (`type`): a dataclass whose docstring says under `Args:` what each field means.

    Raises:
        KeyError: a field that the docstring does not name.
    """
    hints, meanings = get_type_hints(config), _meanings(config)
    for field in fields(config):
        default = field.default if field.default is not MISSING else None
        yield Setting(field.name, hints[field.name], default, meanings[field.name])


def _meanings(config: type) -> dict[str, str]:
    """Field → what the section `Args:` of a docstring says."""
    found: dict[str, list[str]] = {}
    lines = iter((inspect.getdoc(config) or "").splitlines())
    for line in lines:
        if line == "Args:":
            break
    name = None
    for line in lines:
        if line and not line.startswith(" "):
            break
        if entry := _ENTRY.match(line):
            name = entry[1]
            found[name] = [entry[3]]
        elif name is not None:
            found[name].append(line.strip())
    return {name: " ".join(part for part in parts if part) for name, parts in found.items()}

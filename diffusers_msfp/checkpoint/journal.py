"""What a run has finished, so that the next one can go on."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..outputs import write_whole


class Journal:
    """One JSON line that says which run it is, then one for each finished entry.

    Args:
        file (`Path`): where it is kept.
        identity (`dict`): all that the result depends on, as JSON knows it; the order counts.

    Attributes:
        entries (`list[dict]`): of an earlier run with the same identity.
        differs (`list[str]`): what an earlier run had otherwise.
    """

    def __init__(self, file: Path, identity: dict) -> None:
        self.file, self._identity = file, identity
        found, *entries = self._read() or [identity]
        keys = dict.fromkeys([*identity, *found])
        self.differs = [key for key in keys if json.dumps(found.get(key)) != json.dumps(identity.get(key))]
        self.entries = [] if self.differs else entries

    def _read(self) -> list[dict]:
        """All lines up to one that is damaged, or was being written when the run was killed."""
        lines = []
        for line in self.file.read_bytes().split(b"\n")[:-1] if self.file.is_file() else []:
            try:
                lines.append(dict(json.loads(line)))
            except (ValueError, TypeError):
                break
        return lines

    def keep(self, entries: Sequence[dict]) -> None:
        """Begin anew with these entries."""
        write_whole(self.file, "".join(json.dumps(line) + "\n" for line in (self._identity, *entries)))

    def add(self, entry: dict) -> None:
        """Write down one more."""
        with open(self.file, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

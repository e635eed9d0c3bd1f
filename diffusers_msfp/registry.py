"""One kind of dictionary for everything that has a name: formats, schemes, recipes."""

from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from typing import Generic, TypeVar

from .errors import ConfigError

T = TypeVar("T")


class Registry(Mapping[str, T], Generic[T]):
    """Read-only mapping from name to object that refuses unknown names with the list of known ones.

    Args:
        kind (`str`): what the objects are, for messages, e.g. `"scheme"`.
        error (`type[Exception]`): raised for an unknown name.

    Example:
        >>> from diffusers_msfp import FORMATS
        >>> FORMATS["fp4_e2m1"].lattice[-1]
        12
    """

    def __init__(self, kind: str, error: type[Exception] = ConfigError) -> None:
        self._kind = kind
        self._error = error
        self._items: dict[str, T] = {}

    def add(self, name: str, item: T) -> T:
        """Register `item` under `name`, once, and return it."""
        if name in self._items:
            raise self._error(f"Every {self._kind} needs a name of its own, but `{name}` is taken.")
        self._items[name] = item
        return item

    def __getitem__(self, name: str) -> T:
        try:
            return self._items[name]
        except (KeyError, TypeError):
            near = get_close_matches(name.lower(), self._items, n=1) if isinstance(name, str) else []
            meant = f" Did you mean `{near[0]}`?" if near else ""
            raise self._error(f"Unknown {self._kind} {name!r}. Known: {', '.join(self._items)}.{meant}") from None

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and name in self._items

    def __iter__(self) -> Iterator[str]:
        return iter(self._items)

    def __len__(self) -> int:
        return len(self._items)

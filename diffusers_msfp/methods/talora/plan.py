"""What a checkpoint's config says of its adapters."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from ...errors import CheckpointError
from ...schemes import matches
from .trainee import PLACEMENTS

MAX_ADAPTERS = 256  # the table's entries are bytes
MAX_RANK_DIGITS = 5
READS = ("float", "codes")


@dataclass(frozen=True)
class AdapterPlan:
    """The place of adapters and of the router's table; `adapters` in `quantization_config`.

    Args:
        placement (`str`): `"merged"` (one packed weight per adapter) or `"side"` (float adapters beside one weight).
        num_adapters (`int`): h.
        num_timesteps (`int`): T, length of the router's table.
        ranks (`Mapping[str, list[str]]`): rank → names of the layers that have adapters of it.
        router_groups (`tuple[str, ...]`): patterns of layer groups that choose on their own; what matches none is the
            last group.
        base (`str`, *optional*): fingerprint of the packed weights that adapters beside them were trained for.
        training (`Mapping`): how it was made; for people, not read.
        reads (`str`): what adapters beside the weights read: the layer's `"float"` input, as in format version 1, or
            its `"codes"`, see `AdapterBank`. Absent means `"float"`.

    Raises:
        CheckpointError: anything that no training could have written.
    """

    placement: str
    num_adapters: int
    num_timesteps: int
    ranks: Mapping[str, list[str]]
    router_groups: tuple[str, ...] = ()
    base: str | None = None
    training: Mapping = field(default_factory=dict)
    reads: str = "float"

    def __post_init__(self) -> None:
        problem, patterns = None, self.router_groups
        if not isinstance(patterns, list | tuple) or not all(isinstance(pattern, str) for pattern in patterns):
            problem = f"`router_groups` must be a list of patterns, but got {patterns!r}"
        elif self.placement not in PLACEMENTS:
            problem = f"`placement` must be one of {', '.join(PLACEMENTS)}, but got {self.placement!r}"
        elif not _whole(self.num_adapters) or self.num_adapters > MAX_ADAPTERS:
            problem = f"`num_adapters` must lie in 1 … {MAX_ADAPTERS}, but got {self.num_adapters!r}"
        elif not _whole(self.num_timesteps) or self.num_timesteps > 2**20:
            problem = f"`num_timesteps` must lie in 1 … {2**20}, but got {self.num_timesteps!r}"
        elif not (isinstance(self.ranks, Mapping) and all(_is_rank_entry(*item) for item in self.ranks.items())):
            problem = "`ranks` must map ranks to lists of layer names, but it does not"
        elif self.reads not in READS:
            problem = f"`reads` must be one of {', '.join(READS)}, but got {self.reads!r}"
        elif self.reads == "codes" and self.placement != "side":
            problem = "adapters that are merged read nothing, but `reads` is 'codes'"
        if problem:
            raise CheckpointError(f"In `adapters` of config.json {problem}: damaged file.")
        object.__setattr__(self, "router_groups", tuple(patterns))

    def to_dict(self) -> dict:
        """In types that JSON knows."""
        record = asdict(self) | {"router_groups": list(self.router_groups)}
        if self.reads == "float":
            del record["reads"]  # the default, which version 1 does not say
        return record

    @property
    def since(self) -> int:
        """The format version that has a place for it."""
        return 1 if self.reads == "float" else 2

    @property
    def groups(self) -> int:
        """Number of layer groups."""
        return len(self.router_groups) + 1 if self.router_groups else 1

    def group_of(self, name: str) -> int:
        """The group of a layer."""
        for index, pattern in enumerate(self.router_groups):
            if matches(pattern, name):
                return index
        return len(self.router_groups)

    def rank_of(self) -> dict[str, int]:
        """Layer name → rank."""
        return {name: int(rank) for rank, names in self.ranks.items() for name in names}


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def _is_rank_entry(rank: object, names: object) -> bool:
    return (
        isinstance(rank, str)
        and rank.isdecimal()
        and len(rank) <= MAX_RANK_DIGITS
        and int(rank) >= 1
        and isinstance(names, list | tuple)
        and all(isinstance(name, str) for name in names)
    )

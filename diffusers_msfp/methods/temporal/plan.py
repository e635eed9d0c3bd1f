"""What a checkpoint's config says of the finite set and of the layers that follow it."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property

from ...errors import CheckpointError

SCOPES = ("block", "all")
CACHE_DTYPES = {"float16": 2, "float32": 4}
"""Dtype → bytes of a number."""
MAX_TIMESTEPS = 2**16


@dataclass(frozen=True)
class TemporalPlan:
    """The place of input parameters per timestep and of cached features; `temporal` in `quantization_config`.

    Args:
        num_timesteps (`int`): S, size of the finite set.
        block (`tuple[str, ...]`): quantized layers that depend on the timestep alone.
        sets (`tuple[str, ...]`): layers whose input has a scale and zero point for each timestep of the set.
        cached (`Mapping[str, list[str]]`): dtype → layers whose outputs are stored for the set.
        training (`Mapping`): how it was made; see `keeps_block`.
        upstream (`tuple[str, ...]`): float modules that depend on the timestep alone, such as those before the block.

    Raises:
        CheckpointError: anything that no calibration could have written.
    """

    num_timesteps: int
    block: tuple[str, ...]
    sets: tuple[str, ...] = ()
    cached: Mapping[str, list[str]] = field(default_factory=dict)
    training: Mapping = field(default_factory=dict)
    upstream: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problem = None
        whole = isinstance(self.num_timesteps, int) and not isinstance(self.num_timesteps, bool)
        if not whole or not 1 <= self.num_timesteps <= MAX_TIMESTEPS:
            problem = f"`num_timesteps` must lie in 1 … {MAX_TIMESTEPS}, but got {self.num_timesteps!r}"
        elif not (isinstance(self.cached, Mapping) and set(self.cached) <= CACHE_DTYPES.keys()):
            problem = f"`cached` must map {' or '.join(CACHE_DTYPES)} to names of layers, but got {self.cached!r}"
        elif not isinstance(self.training, Mapping):
            problem = f"`training` must hold settings by name, but got {self.training!r}"
        elif not all(map(_is_names, (self.block, self.sets, self.upstream, *self.cached.values()))):
            problem = "`block`, `sets`, `cached` and `upstream` must hold different names of layers, but they do not"
        elif not set(self.cached_layers()) <= set(self.block):
            problem = "`cached` must name layers of `block`, but it names others"
        if problem:
            raise CheckpointError(f"In `temporal` of config.json {problem}: damaged file.")
        for name in ("block", "sets", "upstream"):
            object.__setattr__(self, name, tuple(getattr(self, name)))

    @cached_property
    def surroundings(self) -> tuple[str, ...]:
        """Names of the block, of what is before it, and of the containers around them, outer ones first."""
        names = (*self.block, *self.upstream)
        return tuple(sorted({name.rsplit(".", depth)[0] for name in names for depth in range(name.count(".") + 1)}))

    @property
    def keeps_block(self) -> bool:
        """Whether the block's layers were made to give what full precision gives, and must stay as they are."""
        return bool(self.cached) or self.training.get("iterations") != 0

    def to_dict(self) -> dict:
        """In types that JSON knows."""
        record = asdict(self) | {name: list(getattr(self, name)) for name in ("block", "sets", "upstream")}
        return record if self.upstream else {key: value for key, value in record.items() if key != "upstream"}

    def cached_layers(self) -> dict[str, str]:
        """Layer → dtype of its features."""
        return {name: dtype for dtype, names in self.cached.items() for name in names}

    def summary(self, timesteps: Sequence[float], channels: Mapping[str, int]) -> dict:
        """What there is and what it takes.

        Args:
            timesteps (`Sequence[float]`): the finite set.
            channels (`Mapping[str, int]`): outputs of each layer, at least of the cached ones.

        Returns:
            `dict`: `timesteps`, `block`, `sets` and `cached` (names of layers), `sets_bytes`, `cache_bytes`.
        """
        cached = self.cached_layers()
        return {
            "timesteps": list(timesteps),
            "block": list(self.block),
            "sets": list(self.sets),
            "cached": [name for name in self.block if name in cached],
            "sets_bytes": 8 * self.num_timesteps * len(self.sets),
            "cache_bytes": sum(self.num_timesteps * channels[n] * CACHE_DTYPES[dtype] for n, dtype in cached.items()),
        }

    @property
    def layers(self) -> list[str]:
        """All layers that follow the finite set."""
        return list(dict.fromkeys((*self.sets, *self.cached_layers())))


def _is_names(names: object) -> bool:
    return (
        isinstance(names, list | tuple)
        and all(isinstance(name, str) for name in names)
        and len(set(names)) == len(names)
    )

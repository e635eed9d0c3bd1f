"""Time the ways of computing something, and remember the fastest."""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch

from ...compat.processor import instruction_limit
from ...errors import ConfigError
from ...formats import FPFormat
from ...sampling.calls import follows_seed
from . import cache

VARIABLE = "MSFP_AUTOTUNE"
GAIN = 0.05  # what another way must save before it takes the default's place
NOISY = 0.25  # between the shortest and the median of a way's times, relative: a measurement with more counts for
# nothing and is not kept on disk, since a machine under load would keep wrong choices for good
_MIN_ROUNDS, _MAX_ROUNDS, _SECONDS, _HOPELESS = 5, 9, 0.02, 2.0

_LOCK = threading.RLock()
_wanted: list[bool] = []  # what the environment says, once it was read
_known: dict[str, dict[str, float]] = {}
_new: set[str] = set()
_noisy: set[str] = set()
_chosen: dict[str, str] = {}
_read_for: list[tuple] = []  # threads and limit under which the machine's file has been read


def from_environment() -> None:
    """Take what `MSFP_AUTOTUNE` says from now on, 1 by default.

    Raises:
        ConfigError: it is neither 0 nor 1.
    """
    wanted = os.environ.get(VARIABLE, "1")
    if wanted not in ("0", "1"):
        raise ConfigError(f"{VARIABLE} must be 1 (take what is measured to be fastest) or 0, but got {wanted!r}.")
    _wanted[:] = [wanted == "1"]


def allowed() -> bool:
    """Whether a call may be timed and take what was fastest, instead of the default."""
    if not _wanted:
        from_environment()
    return _wanted[0] and not follows_seed() and not torch.compiler.is_compiling()


def fastest(question: str, ways: Mapping[str, Callable[[], object]]) -> str:
    """The name of the fastest way; the first is the default, which others must beat by more than `GAIN`.

    Args:
        question (`str`): what is computed, with all that its time depends on besides the machine.
        ways (`Mapping[str, Callable]`): name → one computation, which may be repeated.
    """
    default = next(iter(ways))
    if len(ways) == 1 or not allowed():
        return default
    if (threads_and_limit(),) == tuple(_read_for) and question in _chosen:
        return _chosen[question]
    with _LOCK:
        _read()
        if _known.get(question, {}).keys() != ways.keys():
            _known[question], steady = time_ways(ways)
            (_new if steady else _noisy).add(question)
        _chosen[question] = default if question in _noisy else choose(default, _known[question])
        return _chosen[question]


def chosen(question: str, default: str) -> str:
    """What `fastest` would take without measuring anything; the default where nothing is known."""
    with _LOCK:
        _read()
        known = {} if question in _noisy else _known.get(question, {})
        return choose(default, known) if default in known else default


def is_steady(question: str) -> bool:
    """Whether what was measured counts: later processes find it, too."""
    with _LOCK:
        _read()
        return question in _known and question not in _noisy


def text_of(shape: Sequence[int], dtype: torch.dtype) -> str:
    """Shape of an input and dtype of the result, as they stand in questions: `8x128x32x32 bfloat16`."""
    return f"{'x'.join(map(str, shape))} {str(dtype).removeprefix('torch.')}"


def choose(default: str, seconds: Mapping[str, float]) -> str:
    """The fastest, or the default where that saves no more than `GAIN`."""
    best = min(seconds, key=lambda name: seconds[name])
    return best if seconds[best] < (1 - GAIN) * seconds[default] else default


def time_ways(ways: Mapping[str, Callable[[], object]]) -> tuple[dict[str, float], bool]:
    """Shortest time of each way, in seconds, and whether the measurement was steady.

    It is steady if no way's times spread, and one that would take the default's place won in every round: its longest
    time is below the default's shortest. They take turns. After the first round those that take `_HOPELESS` times as
    long as another are left out.
    """
    for way in ways.values():
        way()  # lays out weights, and lets libraries prepare their kernels
    times: dict[str, list[float]] = {name: [] for name in ways}
    racing, start = dict(ways), time.perf_counter()
    for turn in range(_MAX_ROUNDS):
        if turn >= _MIN_ROUNDS and time.perf_counter() - start > _SECONDS:
            break
        for name, way in racing.items():
            before = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - before)
        best = min(min(each) for each in times.values())
        racing = {name: way for name, way in racing.items() if min(times[name]) < _HOPELESS * best}
    shortest = {name: min(each) for name, each in times.items()}
    default = next(iter(ways))
    winner = choose(default, shortest)
    steady = all(median(times[name]) <= (1 + NOISY) * shortest[name] for name in racing)
    return shortest, steady and (winner == default or max(times[winner]) < shortest[default])


def measured(prefix: str = "") -> dict[str, dict[str, float]]:
    """Questions that begin so → way → seconds, as far as this machine has measured them."""
    with _LOCK:
        _read()
        return {question: dict(ways) for question, ways in _known.items() if question.startswith(prefix)}


def about(shape: tuple[int, int], weight: FPFormat, read: FPFormat | None, group_size: int | None = None) -> str:
    """How the questions on a layer begin: output channels and length of its weight, its formats and groups."""
    groups = f" in groups of {group_size}" if group_size else ""
    return f"layer {'x'.join(map(str, shape))} {weight}{groups} {read} "


def measured_for(
    shape: tuple[int, int], weight: FPFormat, read: FPFormat | None, group_size: int | None = None
) -> dict[str, dict[str, float]]:
    """`measured` for layers of this size, these formats and groups, without what they have in common."""
    prefix = about(shape, weight, read, group_size)
    return {question.removeprefix(prefix): ways for question, ways in measured(prefix).items()}


def store() -> None:
    """Put on disk what has been measured since, if anything; without a word where that is not possible."""
    if not _new:
        return
    with _LOCK:
        cache.add({question: _known[question] for question in _new})
        _new.clear()


def forget() -> None:
    """Drop what the process knows; environment and disk are read again."""
    with _LOCK:
        for each in (_wanted, _known, _new, _noisy, _chosen, _read_for):
            each.clear()


def threads_and_limit() -> tuple[int, str]:
    """What may change within a process, and is another machine to the measurements."""
    return torch.get_num_threads(), instruction_limit()


def _read() -> None:
    """Take what this machine's file has, once; anew when the number of threads or the limit has changed."""
    if _read_for != [threads_and_limit()]:
        for each in (_known, _new, _noisy, _chosen, _read_for):
            each.clear()
        _known.update(cache.read())
        _read_for.append(threads_and_limit())

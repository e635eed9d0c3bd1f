"""Where verbs write checkpoints: complete or not at all."""

import json
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from filelock import FileLock, Timeout
from torch import nn

from ...checkpoint.describe import read_config
from ...checkpoint.tensor_files import MAX_SHARD_SIZE
from ...compat.diffusers import keep_labels
from ...errors import ConfigError, NonFiniteError, first_line
from ...outputs import named, overlap, refuse_repository, require_writable, write_file, writing
from .interrupts import Interrupted
from .terminal import stderr

PATIENCE = timedelta(days=30)
"""How long a process waits for others, whose share takes longer."""


def is_checkpoint(folder: Path) -> bool:
    """Whether a folder is that of a pipeline or of a model."""
    return any((folder / name).is_file() for name in ("model_index.json", "config.json"))


def check_target(
    out: str | Path,
    overwrite: bool,
    *,
    read: Iterable[str | Path | None],
    ours: Callable[[Path], bool] = is_checkpoint,
    what: str = "checkpoints",
) -> Path:
    """Refuse a place that holds something that was not asked to be replaced, or that cannot be written.

    Args:
        read (`Iterable[str | Path | None]`): what the result is made from, which must outlast it; or Hub ids.
        ours (`Callable[[Path], bool]`): whether a folder is of the kind that may be replaced.
        what (`str`): the plural of such folders.

    Returns:
        `Path`: the folder to write; for a link what it leads to.

    Raises:
        ConfigError: it exists, is not such a folder where one is to be replaced, or cannot be written.
    """
    out = Path(out)
    out = out.resolve() if out.is_symlink() else named(out)
    require_writable(out)
    if not out.exists():
        return out
    if not overwrite:
        raise ConfigError(f"{out} must not exist yet, but it does. Choose another folder, or pass `--overwrite`.")
    if not ours(out) and any(out.iterdir() if out.is_dir() else [out]):
        raise ConfigError(f"`--overwrite` replaces {what} only, but {out} holds something else.")
    refuse_repository(out, "`--overwrite`")
    for source in [Path(each) for each in read if each]:
        if source.exists() and overlap(out, source):
            part = "a part of " if source.resolve() in out.resolve().parents else ""
            raise ConfigError(
                f"What is read must outlast what is written, but `--overwrite` of {out} would replace {part}{source}. "
                f"Choose another folder."
            )
    return out


def write_checkpoint(
    loaded: Any,
    out: Path,
    folder: Path | None = None,
    max_shard_size: int | str = MAX_SHARD_SIZE,
    more: Mapping[str, str] | None = None,
) -> None:
    """Save to `folder`, or beside `out`, and move into place in one step: nothing half-written looks finished.

    What was stored in half precision is so again, and loads in float32 as everything else does.

    Args:
        more (`Mapping[str, str]`, *optional*): text files beside the pipeline's own, by name.
    """
    with writing(out):
        folder = folder or _parent(out)
        with scratch_folder(out, folder) as scratch:
            made = Path(scratch) / "made"
            keep_labels(loaded)
            with _in_half_precision(loaded) as halved:
                loaded.save_pretrained(made, max_shard_size=max_shard_size)
            for name in halved:  # transformers would follow its config, and denoisers meet tensors of two dtypes
                if "dtype" in (config := read_config(made / name)):
                    write_json(config | {"dtype": "float32"}, made / name / "config.json")
            for name, text in (more or {}).items():
                (made / name).write_text(text, encoding="utf-8")
            publish(made, out)


@contextmanager
def _in_half_precision(loaded: Any) -> Iterator[list[str]]:
    """While this lasts, float32 parts whose every value a half-precision dtype holds are of that dtype; their names."""
    parts = {name: part for name, part in getattr(loaded, "components", {}).items() if isinstance(part, nn.Module)}
    changed: dict[str, list[torch.Tensor]] = {}
    try:
        for name, part in parts.items():
            stored = [each for each in part.state_dict(keep_vars=True).values() if each.is_floating_point()]
            is_float32 = bool(stored) and all(each.dtype == torch.float32 for each in stored)
            if getattr(part, "hf_quantizer", None) is None and is_float32 and (dtype := _half_of(stored)) is not None:
                changed[name] = stored
                for each in stored:
                    each.data = each.data.to(dtype)
        yield list(changed)
    finally:
        for each in (tensor for tensors in changed.values() for tensor in tensors):
            each.data = each.data.float()


def _half_of(tensors: list[torch.Tensor]) -> torch.dtype | None:
    """The half-precision dtype that holds every value of these; None where there is none."""
    halves = (torch.bfloat16, torch.float16)
    return next((d for d in halves if all(torch.equal(each.data.to(d).float(), each) for each in tensors)), None)


def scratch_folder(out: Path, folder: Path | None = None) -> tempfile.TemporaryDirectory:
    """A hidden folder beside `out`, or in `folder`, for what is to take its place; see `publish`."""
    where = folder or out.parent
    return tempfile.TemporaryDirectory(".part", f".{out.name}-", where, ignore_cleanup_errors=True)


def write_json(content: dict, out: Path) -> None:
    """One JSON object, complete or not at all."""
    write_file(out, json.dumps(content, indent=1) + "\n")


def publish(made: Path, out: Path) -> None:
    """Move a finished checkpoint into place; what it replaces is moved to where it came from, and then goes."""
    old = made.parent / "old"
    shutil.rmtree(old, ignore_errors=True)  # of a run that was killed here
    if out.exists():
        out.rename(old)
    try:
        made.rename(out)
    except BaseException:
        if old.exists() and not out.exists():
            old.rename(out)
        raise
    try:
        if old.exists():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
    except OSError as error:
        stderr.print(f"{out} is complete; what it replaces stays in {old} ({first_line(error)}).", soft_wrap=True)


@contextmanager
def only_run(work: Path, what: str) -> Iterator[None]:
    """While this lasts, no other process is at work in a folder.

    Raises:
        ConfigError: one is; `what` says what only one at a time can do.
    """
    try:
        with FileLock(work / "lock", timeout=0):
            yield
    except Timeout as error:
        raise ConfigError(f"One run at a time can {what}, but another one is at it. Wait for it to end.") from error


@contextmanager
def work_folder(out: Path) -> Iterator[Path]:
    """The hidden folder `.<out>.part` beside `out`, which a run that is interrupted leaves to the next one.

    Raises:
        ConfigError: another run is at work in it, or it cannot be made.
    """
    with writing(out):
        work = _parent(out) / f".{out.name}.part"
        work.mkdir(exist_ok=True)
    try:
        with only_run(work, f"write {out}"):
            yield work
    except NonFiniteError:  # no run from this source can do better
        shutil.rmtree(work)
        raise
    except KeyboardInterrupt as stop:
        raise Interrupted(f"{work} keeps what is finished, and the same command goes on with it") from stop
    except BaseException:
        stderr.print(f"{work} keeps what is finished: the same command goes on with it.", soft_wrap=True)
        raise
    shutil.rmtree(work, ignore_errors=True)  # with what `publish` could not remove


def state_of_files(place: Path, out: Path) -> list[list]:
    """Name, size and time of the files of a folder, or of a file, but for hidden ones and those in `out`."""
    files = [place] if place.is_file() else sorted(each for each in place.rglob("*") if each.is_file())
    return [
        state_of_file(file, file.relative_to(place))
        for file in files
        if not any(part.startswith(".") for part in file.relative_to(place).parts)
        and out.absolute() not in file.absolute().parents
    ]


def state_of_file(file: Path, name: Path | None = None) -> list:
    """Name, size and time, as JSON knows them."""
    return [str(name or file), file.stat().st_size, file.stat().st_mtime_ns]


def _parent(out: Path) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    return out.parent


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    status = Path("/proc/self/status")  # on Linux, whose getrusage counts the process that started this one too
    peak = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.is_file() else None
    if peak is not None:
        return int(peak[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

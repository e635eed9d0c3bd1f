"""Where things are kept between runs, how large they are, and whether a Hub token is there."""

import os
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants, get_token

from ..engines.kernels import user_cache
from ..results import Result


@dataclass(frozen=True, kw_only=True)
class Cache(Result):
    """A folder that is filled on the way and may be deleted.

    Args:
        what (`str`): is in it.
        path (`Path`): where it is, or would be.
        bytes (`int`, *optional*): of its files; None while it does not exist.
        writable (`bool`): whether this process may fill it.
    """

    what: str
    path: Path
    bytes: int | None
    writable: bool


def caches() -> list[Cache]:
    """Compiled kernels and measurements of this package, Triton's kernels, and what came from the Hub."""
    numba = os.environ.get("NUMBA_CACHE_DIR")
    triton = os.environ.get("TRITON_CACHE_DIR") or "~/.triton/cache"
    places = {
        "compiled kernels and measurements": user_cache.folder(""),
        "compiled kernels (NUMBA_CACHE_DIR)": Path(numba) if numba else None,
        "Triton's kernels": Path(triton).expanduser(),
        "models from the Hub": Path(constants.HF_HUB_CACHE),
    }
    return [
        Cache(what=what, path=path, bytes=_bytes(path), writable=_writable(path))
        for what, path in places.items()
        if path is not None
    ]


def has_token() -> bool:
    """Whether `huggingface_hub` would send a token; nothing of it is looked at."""
    return bool(get_token())


def _bytes(folder: Path) -> int | None:
    """Files in depth, links not followed; what may not be read counts nothing."""
    if not folder.is_dir():
        return None
    total, open_folders = 0, [folder]
    while open_folders:
        try:
            with os.scandir(open_folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        open_folders.append(Path(entry.path))
                    else:
                        total += entry.stat(follow_symlinks=False).st_size
        except OSError:
            continue
    return total


def _writable(folder: Path) -> bool:
    """Whether it, or the nearest folder above it that exists, takes files."""
    nearest = next((path for path in (folder, *folder.absolute().parents) if path.exists()), folder)
    return nearest.is_dir() and os.access(nearest, os.W_OK)

"""Whether results can be written, found out before the work for them begins, and in words where it fails later."""

import errno
import io
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL.Image import Image

from .errors import ConfigError

_PROBE = 2**16  # bytes; a full disk takes an empty file
_REASONS = {
    errno.EACCES: "permission is denied",
    errno.EPERM: "permission is denied",
    errno.EROFS: "the file system is read-only",
    errno.ENOSPC: "no space is left on the disk",
    errno.EDQUOT: "the disk quota is used up",
    errno.EEXIST: "a file is in the way",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EISDIR: "a folder is in the way",
    errno.ENOENT: "a folder of the path is missing and cannot be made",
    errno.ENAMETOOLONG: "the name is too long",
}


def reason_of(error: OSError) -> str:
    """What the system did not do, in words, with the path that it names."""
    reason = _REASONS.get(error.errno or 0) or (error.strerror or str(error) or type(error).__name__).lower()
    return f"{reason} ({error.filename})" if error.filename else reason


def require_writable_folder(out: Path) -> None:
    """Refuse a folder that results are to be put into, made if it does not exist; nothing is left behind.

    Raises:
        ConfigError: it is a file, cannot be made, or takes no file.
    """
    with writing(out):
        if out.exists() and not out.is_dir():
            raise ConfigError(f"{out} must be a folder to write to, but it is a file. Choose another place.")
        _try_to_write(out, out)


def refuse_repository(out: Path, what: str) -> None:
    """Refuse to replace a folder whose history would go with it.

    Args:
        what (`str`): replaces it, for the message.

    Raises:
        ConfigError: it is a git repository.
    """
    if (out / ".git").exists():
        raise ConfigError(
            f"{what} replaces the whole folder, but {out} is a git repository, whose history would go too. Write to "
            f"another folder, and copy its files."
        )


def require_writable(out: Path) -> None:
    """Refuse a file or folder that is to appear, or to be replaced, in one step; folders above it are made if missing.

    Raises:
        ConfigError: its folder is a file, cannot be made, or takes no file; or it is a file that may not be written.
    """
    with writing(out):
        if out.is_file() and not os.access(out, os.W_OK):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
        _try_to_write(out, out.parent)


def require_writable_file(out: Path) -> None:
    """As `require_writable`, for a file.

    Raises:
        ConfigError: as there; or a folder has this name.
    """
    with writing(out):
        if out.is_dir():
            raise ConfigError(f"{out} must be a file to write, but it is a folder. Name a file.")
    require_writable(out)


def _try_to_write(out: Path, folder: Path) -> None:
    folder = folder.absolute()
    nearest = next(path for path in (folder, *folder.parents) if path.exists())
    if not nearest.is_dir():
        raise ConfigError(f"{out} cannot be written: {nearest} is a file, not a folder. Choose another place.")
    with tempfile.TemporaryFile(dir=nearest) as probe:
        probe.write(bytes(_PROBE))
        probe.flush()


def write_whole(file: Path, content: str | bytes) -> None:
    """Write a file completely or not at all; several processes and threads may write the same one.

    Where it is a link, what it leads to; a file that is there keeps its permissions.

    Raises:
        OSError: it cannot be written; what was there stays.
    """
    file = file.resolve() if file.is_symlink() else file
    part = file.with_name(f".{file.name}.{os.getpid()}.{threading.get_ident()}.part")
    try:
        part.write_bytes(content.encode() if isinstance(content, str) else content)
        if file.exists():
            shutil.copymode(file, part)
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def write_file(file: Path, content: str | bytes) -> None:
    """A file, complete or not at all; folders above it are made if they are missing.

    Raises:
        ConfigError: it cannot be written; what was there stays.
    """
    with writing(file):
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, content)


def named(path: Path) -> Path:
    """A path whose last part is a name, to which one beside it may be given: `.` and `..` are resolved."""
    return path.resolve() if path.name in ("", "..") else path


def overlap(one: Path, other: Path) -> bool:
    """Whether two places are the same, or one lies in the other."""
    one, other = one.resolve(), other.resolve()
    return one == other or one in other.parents or other in one.parents


def png_of(image: Image) -> bytes:
    """A picture as a file's content, for `write_whole`."""
    content = io.BytesIO()
    image.save(content, format="png")
    return content.getvalue()


@contextmanager
def writing(out: Path) -> Iterator[None]:
    """Say of what goes wrong in here that `out` could not be written, and why.

    Raises:
        ConfigError: instead of an `OSError`, or of what safetensors raises in its place.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(f"{out} cannot be written: {reason_of(error)}.") from error
    except Exception as error:
        code = str(error).rpartition("(os error ")[2].partition(")")[0]  # of safetensors, which has a class of its own
        if type(error).__name__ != "SafetensorError" or not code.isdigit():
            raise
        raise ConfigError(
            f"{out} cannot be written: {reason_of(OSError(int(code), os.strerror(int(code))))}."
        ) from error

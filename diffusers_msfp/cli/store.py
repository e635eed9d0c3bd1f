"""Where verbs write checkpoints: complete or not at all."""

import shutil
import tempfile
from pathlib import Path

import psutil

from ..errors import ConfigError
from .load import SourceError


def check_target(out: str | Path, overwrite: bool) -> Path:
    """Refuse a place that holds something that was not asked to be replaced.

    Raises:
        ConfigError: it exists, or is no checkpoint where one is to be replaced.
    """
    out = Path(out)
    if out.exists() and not overwrite:
        raise ConfigError(f"{out} must not exist yet, but it does. Choose another folder, or pass `--overwrite`.")
    if (
        out.exists()
        and not (out / "model_index.json").is_file()
        and not (out / "config.json").is_file()
        and any(out.iterdir() if out.is_dir() else [out])
    ):
        raise ConfigError(f"`--overwrite` replaces checkpoints only, but {out} holds something else.")
    return out


def write_checkpoint(loaded, out: Path) -> None:
    """Save beside `out` and move into place in one step, so that nothing half-written looks like a checkpoint."""
    out.parent.mkdir(parents=True, exist_ok=True)
    if not out.parent.is_dir():
        raise SourceError(f"{out.parent} must be a folder.")
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-", suffix=".part") as scratch:
        made = Path(scratch) / "made"
        loaded.save_pretrained(made)
        if out.exists():
            old = Path(scratch) / "old"
            out.rename(old)
            made.rename(out)
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        else:
            made.rename(out)


def peak_rss_bytes() -> int:
    """Largest resident memory of this process so far, in bytes."""
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    import sys

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

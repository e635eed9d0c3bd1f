"""Where what was compiled or measured on a machine is kept: in the user's cache, never beside the installed package,
where it would outlive the package and hide the next installation."""

import os
import tempfile
from pathlib import Path


def folder(name: str) -> Path:
    """`$XDG_CACHE_HOME/diffusers_msfp/<name>`, by default under `~/.cache`; not created."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if root.startswith("~"):  # a user without a home
        root = tempfile.gettempdir()
    return Path(root) / "diffusers_msfp" / name

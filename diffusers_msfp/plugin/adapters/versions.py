"""Whether the installed PEFT is new enough for the library that puts an adapter on a model.

diffusers and transformers each demand a version of their own, and transformers' newest release can demand one of PEFT
that is not out yet. What they say then names neither the library that asks nor a way out.
"""

import importlib
from importlib.metadata import PackageNotFoundError, requires, version

from packaging.requirements import Requirement
from packaging.version import Version

from ...errors import SEE_DOCTOR, UnsupportedError

MINIMA = {"diffusers": "diffusers.utils.constants", "transformers": "transformers.integrations.peft"}
"""Library → the module that holds its `MIN_PEFT_VERSION`."""


def require_peft(library: str) -> None:
    """Refuse adapters where the installed PEFT is older than a library's own minimum.

    Args:
        library (`str`): `"diffusers"` or `"transformers"`, the one that loads the adapter.

    Raises:
        UnsupportedError: PEFT is older, or missing.
    """
    minimum = getattr(importlib.import_module(MINIMA[library]), "MIN_PEFT_VERSION", None)
    installed = _installed("peft")
    if minimum is None or (installed and Version(installed) >= Version(minimum)):
        return
    actual = f"PEFT {installed}" if installed else "no PEFT"
    raise UnsupportedError(
        f"Adapters on models of {library} {_installed(library)} need PEFT {minimum} or newer, but {actual} is "
        f"installed: `pip install 'peft>={minimum}'`, or where there is no such release "
        f"`pip install '{_tested(library)}'`. {SEE_DOCTOR}"
    )


def _installed(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _tested(library: str) -> str:
    """The releases of a library that this package was tested with, as `pip` reads it."""
    try:
        declared = map(Requirement, requires("diffusers-msfp") or ())
        return next(f"{each.name}{each.specifier}" for each in declared if each.name == library)
    except (PackageNotFoundError, StopIteration):  # run from a folder that was not installed
        return f"{library}<{_installed(library)}"

"""Installed packages against the ranges that this package's own metadata declares."""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, metadata, version

from packaging.requirements import Requirement
from packaging.specifiers import InvalidSpecifier, SpecifierSet
from packaging.version import InvalidVersion, Version

from ..results import OPTIONAL, Result

DISTRIBUTION = "diffusers-msfp"
DEVELOPMENT = frozenset({"all", "browser", "test"})
"""Extras that no use of the package needs."""
RUNTIMES = ("triton", "onnxruntime", "openvino")
"""Packages that are listed where they are installed, whatever the metadata says of them."""


@dataclass(frozen=True, kw_only=True)
class Package(Result):
    """A package that is needed, or that an extra brings.

    Args:
        name (`str`): of the distribution, or `python`.
        installed (`str`, *optional*): its version; None if it is not there.
        supported (`str`): range of versions as pip reads it; empty where none is declared.
        extras (`tuple[str, ...]`): that bring it; empty for what the package cannot be without.
        fits (`bool`): installed in the range, or not installed and brought by an extra.
        command (`str`, *optional*): that brings it, or brings it into the range.
    """

    name: str
    installed: str | None
    supported: str
    extras: tuple[str, ...] = ()
    fits: bool
    command: str | None = field(default=None, metadata=OPTIONAL)

    @property
    def required(self) -> bool:
        """Whether nothing works without it."""
        return not self.extras and self.name not in RUNTIMES


def packages() -> list[Package] | None:
    """Python, what is required, what extras bring, and runtimes that are installed; None without metadata.

    A folder of sources on the path that was never installed has no metadata, so its ranges are not known.
    """
    try:
        declared = metadata(DISTRIBUTION)
    except PackageNotFoundError:
        return None
    extras_of: dict[str, list[str]] = {}
    ranges: dict[str, str] = {}
    for text in declared.get_all("Requires-Dist") or ():
        wanted = Requirement(text)
        if wanted.name == DISTRIBUTION:  # extras of extras
            continue
        ranges.setdefault(wanted.name, str(wanted.specifier))
        if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
            extras_of[wanted.name] = []
            continue
        for extra in declared.get_all("Provides-Extra") or ():
            if extra not in DEVELOPMENT and wanted.marker.evaluate({"extra": extra}):
                extras_of.setdefault(wanted.name, []).append(extra)
    found = [_package(name, ranges[name], extras) for name, extras in extras_of.items()]
    runtimes = [name for name in RUNTIMES if name not in extras_of and installed_version(name) is not None]
    found += [_package(name, ranges.get(name, ""), []) for name in runtimes]
    python, supported = platform.python_version(), (declared.get_all("Requires-Python") or [""])[0]
    return [Package(name="python", installed=python, supported=supported, fits=_fits(python, supported)), *found]


def _package(name: str, supported: str, extras: list[str]) -> Package:
    installed = installed_version(name)
    fits = bool(extras) if installed is None else _fits(installed, supported)
    command = f'pip install "{DISTRIBUTION}[{extras[0]}]"' if extras else f'pip install "{name}{supported}"'
    needed = installed is None or not fits
    return Package(
        name=name,
        installed=installed,
        supported=supported,
        extras=tuple(extras),
        fits=fits,
        command=command if needed else None,
    )


def installed_version(name: str) -> str | None:
    """The version of an installed distribution; None if it is not there, empty where its metadata is damaged."""
    try:
        return version(name) or ""
    except PackageNotFoundError:
        return None
    except KeyError:  # metadata without a version
        return ""


def _fits(installed: str, supported: str) -> bool:
    """Whether a version lies in a range; local builds (`2.13.0+cpu`) and pre-releases count as what they are."""
    try:
        return SpecifierSet(supported).contains(Version(installed), prereleases=True)
    except (InvalidVersion, InvalidSpecifier):
        return False


def what_extras_bring(found: list[Package]) -> Mapping[str, list[Package]]:
    """Extra → its packages that are not installed."""
    missing: dict[str, list[Package]] = {}
    for package in found:
        if package.installed is None:
            for extra in package.extras:
                missing.setdefault(extra, []).append(package)
    return missing

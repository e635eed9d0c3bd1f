"""Internals of PEFT (all since 0.17)."""

from collections.abc import Mapping

from peft.utils.other import get_pattern_key  # which key of `rank_pattern` or `alpha_pattern` fits a module

__all__ = ["is_wrapped", "own_name", "pattern_value"]

_BASE = ".base_layer"


def own_name(name: str) -> str:
    """A module or tensor name without the level that PEFT puts between a layer and its place."""
    return name.replace(_BASE, "")


def is_wrapped(name: str) -> bool:
    """Whether a module of this name has adapters around it."""
    return name.endswith(_BASE)


def pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of a pattern table for a module."""
    return patterns.get(get_pattern_key(patterns.keys(), name), default)

"""Internals of PEFT (all since 0.17)."""

import sys
from collections.abc import Mapping
from types import FrameType

from peft.utils.other import get_pattern_key  # which key of `rank_pattern` or `alpha_pattern` fits a module

__all__ = ["asked_by_peft", "asked_to_average", "has_adapters", "is_wrapped", "name_inside", "pattern_value"]

_BASE = ".base_layer"
_OWN = ("diffusers_msfp.layers.logical", "diffusers_msfp.layers.quant_layer", "diffusers_msfp.layers.split")


def name_inside(name: str) -> str:
    """A module or tensor name without the levels that PEFT puts between a layer and its place."""
    return name.replace(_BASE, "").replace(".original_module", "")


def is_wrapped(name: str) -> bool:
    """Whether a module of this name has adapters around it."""
    return name.endswith(_BASE)


def has_adapters(model: object) -> bool:
    """Whether diffusers' or transformers' mixin has attached adapters to a model."""
    return bool(getattr(model, "_hf_peft_config_loaded", False))


def asked_by_peft() -> bool:
    """Whether PEFT's code copies a layer by `copy.deepcopy`, or makes another of its class, which asks this.

    PEFT trains copies of layers (`modules_to_save`), and makes a convolution's LoRA of layers of its class
    (`type(base_layer)(…)`); it has no hook for either.
    """
    return _asking().startswith("peft.")


def asked_to_average() -> bool:
    """Whether `torch.optim.swa_utils.AveragedModel` copies a layer by `copy.deepcopy`, which asks this."""
    return _asking() == "torch.optim.swa_utils"


def _asking() -> str:
    """The module whose code made the call that asks, two calls from here, but for `copy` and this package."""
    frame: FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_globals.get("__name__", "") in ("copy", *_OWN):
        frame = frame.f_back
    return "" if frame is None else frame.f_globals.get("__name__") or ""


def pattern_value(patterns: Mapping[str, float], name: str, default: float) -> float:
    """The value of a pattern table for a module."""
    return patterns.get(get_pattern_key([*patterns], name), default)

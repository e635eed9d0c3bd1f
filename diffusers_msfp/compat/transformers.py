"""Internals of transformers (all since 5.0)."""

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers.core_model_loading import ConversionOps, WeightRenaming  # how loading converts and renames tensors
from transformers.quantizers import auto

__all__ = [
    "ConversionOps",
    "WeightRenaming",
    "keep_own_names",
    "mark_initialised",
    "quantization_tables",
    "register",
    "unwatch_loading",
    "watch_loading",
]


def quantization_tables() -> tuple[dict, dict]:
    """Method → quantizer, and method → config; to see what stands under a name before it is registered."""
    return auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def register(method: str, quantizer: type, config: type) -> None:
    """Enter a method by transformers' own decorators, once."""
    quantizers, configs = quantization_tables()
    if method not in quantizers:
        auto.register_quantizer(method)(quantizer)
    if method not in configs:
        auto.register_quantization_config(method)(config)


def mark_initialised(*things: object) -> None:
    """Tell the loader that modules or parameters have their values; it would fill others with noise."""
    for thing in things:
        cast(Any, thing)._is_hf_initialized = True


def keep_own_names(model: nn.Module) -> None:
    """Let a model be saved under the names that its tensors have, not those that were renamed when it was loaded.

    Saving undoes the renaming of loading, such as the prefix `text_model.` that files of CLIP have: what else is stored
    of layers would be under other names then than their tensors. Loading takes both.
    """
    cast(Any, model)._weight_conversions = []


_FILL = "_move_missing_keys_from_meta_to_device"
_IGNORED = "_keys_to_ignore_on_load_unexpected"


def watch_loading(model: nn.Module, look: Callable[[list[str]], None], ignored: str | None = None) -> None:
    """Say what of a checkpoint's keys this model's loading is to look at, until `unwatch_loading`.

    Args:
        look (`Callable[[list[str]], None]`): gets the keys that are missing before the loader fills them with noise,
            and may raise.
        ignored (`str`, *optional*): pattern of keys that may have no counterpart in the model.
    """
    if ignored is not None:
        setattr(model, _IGNORED, {*(getattr(model, _IGNORED) or ()), ignored})
    fill = getattr(model, _FILL)

    def watched(missing_keys: list[str], *args: Any, **kwargs: Any) -> None:
        look(sorted(missing_keys))
        fill(missing_keys, *args, **kwargs)

    setattr(model, _FILL, watched)


def unwatch_loading(model: nn.Module) -> None:
    """Take off what `watch_loading` put on."""
    for name in (_FILL, _IGNORED):
        model.__dict__.pop(name, None)

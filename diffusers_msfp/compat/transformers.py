"""Internals of transformers (all since 5.0)."""

from collections.abc import Callable

from transformers.core_model_loading import ConversionOps, WeightRenaming  # how loading converts and renames tensors
from transformers.quantizers import auto

__all__ = [
    "ConversionOps",
    "WeightRenaming",
    "mark_initialised",
    "quantization_tables",
    "register",
    "watch_missing_keys",
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
        thing._is_hf_initialized = True


_FILL = "_move_missing_keys_from_meta_to_device"


def watch_missing_keys(model, look: Callable[[list[str]], None]) -> None:
    """Let `look` see, and refuse, the keys that a checkpoint lacks before the loader fills them with noise."""
    fill = getattr(model, _FILL)

    def watched(missing_keys, *args, **kwargs) -> None:
        look(sorted(missing_keys))
        fill(missing_keys, *args, **kwargs)

    setattr(model, _FILL, watched)


def unwatch_missing_keys(model) -> None:
    """Take off what `watch_missing_keys` put on."""
    model.__dict__.pop(_FILL, None)

"""Internals of diffusers (all in 0.40 to 0.42)."""

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path

from diffusers.models.modeling_utils import no_init_weights  # float models on the meta device, without drawing weights
from diffusers.quantizers import auto

__all__ = [
    "components_being_loaded",
    "no_init_weights",
    "progress_bar_config",
    "quantization_tables",
    "rename_old_keys",
    "set_config",
    "single_file_origin",
]


def quantization_tables() -> tuple[dict, dict]:
    """Method → quantizer, and method → config; a third-party quantizer can only be entered here."""
    return auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def components_being_loaded() -> Collection[str] | None:
    """The components of the pipeline that `from_pretrained` is loading right now; None where nothing is known.

    A pipeline's config is asked for one component at a time and never told which there are; only the loader's own frame
    knows. Where that frame looks different (another version of diffusers), None.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "from_pretrained":
        frame = frame.f_back
    components = frame.f_locals.get("init_dict") if frame is not None else None
    return list(components) if isinstance(components, Mapping) else None


def progress_bar_config(pipe) -> dict:
    """What `set_progress_bar_config` was last called with; there is no getter."""
    return dict(getattr(pipe, "_progress_bar_config", {}))


def rename_old_keys(model, names: dict) -> None:
    """Give attention weights of old checkpoints their new names, in place, as loading does it."""
    model._fix_state_dict_keys_on_load(names)


def set_config(model, config: Mapping) -> None:
    """Replace a model's config; `register_to_config` can add, but not remove."""
    model._internal_dict = type(model._internal_dict)(dict(config))


def single_file_origin(path: Path) -> str:
    """The Hub id of the pipeline whose layout a single file has.

    Raises:
        KeyError, ValueError, OSError: as diffusers raises them for a file that it does not know.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    return fetch_diffusers_config(load_single_file_checkpoint(str(path)))["pretrained_model_name_or_path"]

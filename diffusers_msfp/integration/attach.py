"""What both doors, diffusers' and transformers', do with a model that has quantized layers, and how it is undone."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..compat.peft import own_name
from ..errors import ConfigError, UnsupportedError
from ..nn import SplitLayer
from ..nn.split import is_complete
from ..nn.stored import name_in_files
from ..workflow.convert import revert
from ..workflow.engine import engine_from_environment, set_engine
from ..workflow.state import track, untrack
from ..workflow.temporal_model import detach_sets
from . import overrides


def attach(model: nn.Module, quantizer) -> None:
    """Make a model with quantized layers know that it is one; its config has the record already.

    Args:
        quantizer (`MSFPQuantizer` or `MSFPTransformersQuantizer`): the one that loads and saves it.
    """
    config = quantizer.quantization_config
    quantizer.pre_quantized = True
    model.is_quantized = True
    model.hf_quantizer = quantizer
    model.quantization_method = config.quant_method
    overrides.install(model)
    run = config.calibration or {}
    track(model, run.get("last_timestep"), run.get("has_fallen", False))
    set_engine(model, engine_from_environment())


def detach(model: nn.Module, dtype: torch.dtype) -> None:
    """Put float layers in place of the quantized ones; the model answers like any other again.

    Raises:
        UnsupportedError: users' adapters on a part of a split layer alone; nothing is changed then.
    """
    for name, module in model.named_modules():
        if isinstance(module, SplitLayer) and not is_complete(module):
            raise UnsupportedError(
                f"`{name}` is split, and its parts cannot be joined with adapters on one of them: unload these first."
            )
    set_engine(model, "reference")
    overrides.remove(model)
    detach_sets(model)
    untrack(model)
    revert(model, dtype)


def tensors_to_save(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The model alone, under the names of files, also while PEFT adapters are attached.

    Raises:
        ConfigError: tensors are offloaded.
    """
    own = {name_in_files(own_name(key)): value for key, value in state_dict.items() if ".lora_" not in key}
    meta = [key for key, value in own.items() if value.is_meta]
    if meta:
        raise ConfigError(
            f"All tensors must be in memory to be saved, but {len(meta)} are offloaded ({meta[0]}, …). Load the "
            f"model without `device_map` and offloading, then save it."
        )
    return own


def file_metadata(config) -> dict[str, str]:
    """What each weight file says about itself."""
    return {"quant_method": config.quant_method.value, "format_version": str(config.format_version)}

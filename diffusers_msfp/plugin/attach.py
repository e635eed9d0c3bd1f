"""What both quantizers do with a model that has quantized layers, and how it is undone."""

from typing import Any

import torch
from torch import nn

from ..engines.choose import set_engine, set_engine_of_environment
from ..layers.convert import decoded_layers, require_revertible, revert
from ..layers.incoming import unwatch_states, watch_states
from ..methods.method import parts
from ..sampling.observation import Calibration, track, untrack
from . import overrides


def attach(model: nn.Module, quantizer: Any, calibration: Calibration | None = None) -> None:
    """Make a model with quantized layers know that it is one.

    Args:
        quantizer (`MSFPQuantizer` or `MSFPTransformersQuantizer`): the one that loads and saves it.
        calibration (`Calibration`, *optional*): how far it had come when the model was saved.
    """
    config = quantizer.quantization_config
    quantizer.pre_quantized = True
    marked: Any = model
    marked.is_quantized = True
    marked.hf_quantizer = quantizer
    marked.quantization_method = config.quant_method
    overrides.install(model)
    for part in parts():
        if part.loaded is not None:
            part.loaded(model)
    watch_states(model)
    track(model, calibration)
    set_engine_of_environment(model)


def detach(model: nn.Module, dtype: torch.dtype) -> None:
    """Put float layers in place of the quantized ones; the model answers like any other again.

    Raises:
        UnsupportedError: a method has left something that no float model can have.
        StateError: a layer cannot be exchanged, see `require_revertible`. Nothing is changed after either.
    """
    require_revertible(model)
    for part in parts():
        if part.require_float is not None:
            part.require_float(model)
    decoded = decoded_layers(model, dtype)  # what may fail comes first
    set_engine(model, "reference")
    overrides.remove(model)
    unwatch_states(model)
    for part in parts():
        if part.detach is not None:
            part.detach(model)
    untrack(model)
    revert(model, decoded)

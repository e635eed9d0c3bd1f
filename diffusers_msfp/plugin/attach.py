"""What both doors, diffusers' and transformers', do with a model that has quantized layers, and how it is undone."""

import torch
from torch import nn

from ..engines.choose import engine_from_environment, set_engine
from ..errors import UnsupportedError
from ..layers import SplitLayer
from ..layers.convert import revert
from ..layers.incoming import unwatch_states, watch_states
from ..layers.split import is_complete
from ..methods.temporal.attach import detach_sets
from ..sampling.observation import RunTracker, track, untrack
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
    watch_states(model)
    run = config.calibration or {}
    track(model, RunTracker(*(run.get(key) for key in ("last_timestep", "has_fallen", "first_timestep"))))
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
    unwatch_states(model)
    detach_sets(model)
    untrack(model)
    revert(model, dtype)

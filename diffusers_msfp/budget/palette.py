"""Every layer of a denoiser in every form that it may get, with ranges observed once for all of them."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..errors import ConfigError
from ..layers import QUANT_LAYERS, QuantLayer
from ..layers.convert import layers_by_name
from ..plugin.calibrate import restart_observation
from ..plugin.config import MSFPConfig
from ..plugin.quantize import quantize_model
from ..results import OnProgress
from ..sampling.calls import batched_calls, call_arguments, counting_steps, quiet
from ..sampling.denoisers import denoiser_name, denoiser_of
from ..sampling.solvers import with_parts
from ..schemes import SCHEMES, LayerScheme, resolve, weights_only

CHOICES = ("w4a8", "w4g32a8", "w6a8", "w8a8")
"""What each layer may get by default. Fewer bits of an input save no byte of a file."""
STEP_CHOICES = ("w4a4", "w4a8", "w8a8", "w8a16")
"""What each layer may get where time counts: pairs of 4-bit numbers, bytes, floats."""
OBSERVED_AS = "w8a8"
"""Weights of the model while inputs are observed."""


@dataclass(frozen=True)
class Palette:
    """Quantized layers of one denoiser.

    Args:
        component (`str`): its name in the pipeline.
        choices (`tuple[str, ...]`): names of schemes.
        layers (`dict[str, dict[str, QuantLayer]]`): layer → scheme → the layer so quantized, frozen. The scheme of the
            layer that reads the noisy sample leaves its input float.
    """

    component: str
    choices: tuple[str, ...]
    layers: dict[str, dict[str, QuantLayer]]


def check_choices(choices: Sequence[str]) -> tuple[str, ...]:
    """Names of at least two different schemes.

    Raises:
        ConfigError: fewer, or an unknown one.
    """
    found = tuple(dict.fromkeys([choices] if isinstance(choices, str) else choices))
    for name in found:
        SCHEMES[name]
    if len(found) < 2:
        raise ConfigError(f"A budget is shared out among at least two schemes, but got {', '.join(found) or 'none'}.")
    return found


def scheme_for(name: str, choice: str) -> str:
    """What a choice means for a layer: the one that reads the noisy sample keeps a float input, as in every scheme."""
    reads_sample = not resolve(name, OBSERVED_AS, {}).activation
    return weights_only(choice) if reads_sample else choice


def make_palette(
    pipe: DiffusionPipeline,
    choices: Sequence[str],
    *,
    num_samples: int,
    num_inference_steps: int,
    seed: int,
    prompts: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> Palette:
    """Quantize every layer of a float pipeline's denoiser in every way; the pipeline is not changed.

    Args:
        pipe (`DiffusionPipeline`): float.
        choices (`Sequence[str]`): names of schemes.
        num_samples, num_inference_steps, seed, prompts, **arguments: of the runs in which inputs are observed, see
            `calibrate`.
        on_progress (`OnProgress`, *optional*): called with (done, total, stage=…).
    """
    choices, component, model = check_choices(choices), denoiser_name(pipe), cast(ModelMixin, denoiser_of(pipe))
    observed = copy.deepcopy(model)
    quantize_model(observed, MSFPConfig(OBSERVED_AS))
    narrow = next((SCHEMES[choice].inner for choice in choices if SCHEMES[choice].inner.residual), None)
    for layer in layers_by_name(observed).values():
        if narrow is not None and layer.observing:
            layer.scheme = narrow  # which must know what reads residual sums
    restart_observation(observed)
    runs = with_parts(pipe, **{component: observed})
    make = call_arguments(runs, prompts, num_inference_steps, arguments)
    calls = batched_calls(make, [observed], num_samples, seed)
    with quiet(runs), torch.no_grad(), counting_steps([observed], len(calls) * num_inference_steps, on_progress):
        for call in calls:
            call.run(runs)
    found: dict[str, dict[str, QuantLayer]] = {}
    for name, watched in layers_by_name(observed).items():
        module = model.get_submodule(name)
        found[name] = {}
        for choice in choices:
            scheme = scheme_for(name, choice)
            found[name][scheme] = _frozen(module, name, SCHEMES[scheme].inner, watched)
    return Palette(component, choices, found)


def _frozen(module: nn.Module, name: str, scheme: LayerScheme, watched: QuantLayer) -> QuantLayer:
    """A layer with the ranges that another one's observation gives."""
    layer = QUANT_LAYERS[type(module)].from_float(module, name, scheme)
    if scheme.activation and watched.observation is not None:
        layer.start_observing(scheme.activation, watched.observation)
        if scheme.residual and watched.input_is_sum is not None:
            layer.expect_sum(watched.input_is_sum)
        layer.freeze()
    return layer

"""Quantize a pipeline that is already in memory."""

from collections.abc import Collection, Iterable
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ..compat.wrappers import seen_through, sees_through, unwrap
from ..engines.choose import check_environment
from ..errors import ConfigError, StateError
from ..layers import QuantLayer
from ..layers.convert import Conversion, convert, quant_layers
from ..methods.method import parts
from ..results import OnProgress, in_stage
from ..sampling.calls import known_arguments
from ..sampling.denoisers import DENOISERS
from ..sampling.observation import calibration_state, quantized_models
from ..sampling.pictures import taken
from ..sampling.trial import refuse_upcast
from ..schemes import DEFAULT_SCHEME
from .calibrate import DEFAULT_SAMPLES, OF_CALIBRATION, check_calibration, observe_ranges, refuse_images
from .config import MSFPConfig, config_of
from .quantizer import MSFPQuantizer
from .transformers_quantizer import MSFPTransformersQuantizer


@sees_through
def quantize_model(
    model: ModelMixin | PreTrainedModel, config: MSFPConfig, on_progress: OnProgress | None = None
) -> None:
    """Quantize the weights of a float model in place; its activations are observed from now on.

    Args:
        model (`ModelMixin` or `PreTrainedModel`): any model of diffusers, or one of transformers, whose activations
            stay float.
        config (`MSFPConfig`): not changed; the model gets a copy with its record.
        on_progress (`OnProgress`, *optional*): called with (done, total) after each layer.
    """
    _quantize(model, *_planned(model, config, begun=_is_open(model)), on_progress)


Quantizer = MSFPQuantizer | MSFPTransformersQuantizer


def _planned(model: ModelMixin | PreTrainedModel, config: MSFPConfig, *, begun: bool) -> tuple[Quantizer, Conversion]:
    """What is to be done with a model, everything checked that can fail.

    Args:
        begun (`bool`): an earlier call with the same config may have quantized some of its layers, or all.
    """
    kind = MSFPQuantizer if isinstance(model, ModelMixin) else MSFPTransformersQuantizer
    check_environment()
    quantizer = kind(config.without_record(), pre_quantized=True)
    config = quantizer.quantization_config  # of text encoders without activations
    plan = config.plan(model, begun=begun and _was_asked_for(model, config))
    plan.check(model)
    return quantizer, plan


def _quantize(
    model: ModelMixin | PreTrainedModel,
    quantizer: Quantizer,
    plan: Conversion,
    on_progress: OnProgress | None = None,
) -> None:
    """Do it; what is stopped on the way knows itself, so that the same call goes on."""
    dtype = model.dtype
    try:
        convert(model, plan, on_progress)
    except BaseException:
        if any(True for _ in quant_layers(model)):
            _mark(model, quantizer, dtype)
            quantizer.unfinished = sum(not isinstance(model.get_submodule(name), QuantLayer) for name in plan.layers)
        raise
    _mark(model, quantizer, dtype)
    plan.report(model)


def _mark(model: ModelMixin | PreTrainedModel, quantizer: Quantizer, dtype: torch.dtype) -> None:
    cast(Any, quantizer).attach(model)
    if isinstance(model, ModelMixin):
        model.register_to_config(_pre_quantization_dtype=dtype)


def quantize_pipeline(
    pipe: DiffusionPipeline,
    scheme: str | MSFPConfig = DEFAULT_SCHEME,
    *,
    on_progress: OnProgress | None = None,
    **calibration: Any,
) -> DiffusionPipeline:
    """Quantize a float pipeline in place: weights, then activation ranges from its own samples or from pictures.

    All arguments are checked, and a first step of the float pipeline is tried, before a weight is replaced. Where the
    call is stopped, or the calibration fails all the same, the same call with corrected arguments goes on.

    Args:
        pipe (`DiffusionPipeline`): float, or left by a call that came to no end.
        scheme (`str` or `MSFPConfig`): a name in `SCHEMES`, or a config for more say.
        on_progress (`OnProgress`, *optional*): called with (done, total, stage=what is being done): after each layer of
            a component, then after each denoising step, there instead of the progress bar.
        **calibration: arguments of `calibrate`: `num_samples`, `num_inference_steps`, `prompts`, `images`, `seed` and
            those of the pipeline.

    Returns:
        `pipe`, quantized and frozen, ready to be saved.

    Raises:
        ConfigError: a model alone, no component to quantize, an unknown scheme, or arguments with which the pipeline
            does not run.
        StateError: it is quantized already.
        NonFiniteError: a weight, or what the sampler makes, holds NaN or infinity.

    Example:
        ```py
        pipe = quantize_pipeline(DDPMPipeline.from_pretrained("user/model"), "w4a4", num_samples=64)
        pipe.save_pretrained("model-w4a4")
        ```
    """
    if isinstance(pipe, nn.Module):
        raise ConfigError(
            f"`quantize_pipeline` calibrates with a pipeline's own sampler, but got a {type(pipe).__name__} alone. "
            f"Pass the pipeline that it belongs to, or load the model with `quantization_config=MSFPConfig()`."
        )
    config = scheme if isinstance(scheme, MSFPConfig) else MSFPConfig(scheme=scheme)
    with seen_through(pipe) as (bare,):
        _quantize_components(bare, config, calibration, on_progress)
    return pipe


def _quantize_components(
    pipe: DiffusionPipeline, config: MSFPConfig, calibration: dict, on_progress: OnProgress | None
) -> None:
    if "images" in calibration:  # an iterable can be read once
        images = taken(calibration["images"], calibration.get("num_samples", DEFAULT_SAMPLES))
        calibration = calibration | {"images": images}
    models = components_of(pipe, config)
    begun = any(map(_is_open, models.values()))
    plans = {name: _planned(model, config, begun=begun) for name, model in models.items()}
    plans = {name: planned for name, planned in plans.items() if planned[1].layers}  # the others are left
    refuse_upcast(pipe, models)
    schemes = [scheme for _, plan in plans.values() for scheme in plan.layers.values()]
    if _any_observes(models.values()) or any(scheme.activation for scheme in schemes):
        check_calibration(pipe, models, **calibration)
    else:
        refuse_images(calibration.get("images"), config.scheme)
        known_arguments(pipe, {name: value for name, value in calibration.items() if name not in OF_CALIBRATION})
    for name, (quantizer, plan) in plans.items():
        _quantize(models[name], quantizer, plan, in_stage(on_progress, f"weights of {name}"))
    for name in models.keys() - plans.keys():
        cast(Any, models[name]).hf_quantizer.unfinished = None
    if _any_observes(models.values()):
        observe_ranges(pipe, on_progress=in_stage(on_progress, "calibration"), **calibration)


def _any_observes(models: Iterable[nn.Module]) -> bool:
    """Whether any of these models, of which some may be float, observes its inputs."""
    return any(calibration_state(each) == "observing" for model in models for each in quantized_models(model))


def _is_open(model: nn.Module) -> bool:
    """Whether a model is float, or an earlier call has not come to its end with it."""
    quantized = list(quantized_models(model))
    return not quantized or _any_observes(quantized) or cast(Any, quantized[0]).hf_quantizer.unfinished is not None


def _was_asked_for(model: nn.Module, config: MSFPConfig) -> bool:
    """Whether a model has quantized layers, and by the same request."""
    return any(
        all(getattr(config, key) == getattr(config_of(each), key) for key in _REQUEST)
        for each in quantized_models(model)
    )


_REQUEST = ("scheme", "modules_to_not_convert", "scheme_overrides")


def components_of(pipe: DiffusionPipeline, config: MSFPConfig) -> dict[str, ModelMixin | PreTrainedModel]:
    """The components that a config selects, by name.

    Raises:
        ConfigError: there are none, or one that was named is no model.
    """
    components = {name: part for name, part in getattr(pipe, "components", {}).items() if part is not None}
    components |= {name: unwrap(part) for name, part in components.items() if isinstance(part, nn.Module)}
    kinds = {name: type(part) for name, part in components.items()}
    found = {name: components[name] for name in config.choose_components(kinds, type(pipe).__name__)}
    for name, component in found.items():
        if not isinstance(component, (ModelMixin, PreTrainedModel)):
            raise ConfigError(
                f"`components_to_quantize` may name models of diffusers and transformers only, but `{name}` is "
                f"{type(component).__name__}."
            )
        if getattr(component, "config", None) is None:
            refuse_several(name, type(component).__name__, components)
    return found


def refuse_several(name: str, kind: str, present: Collection[str]) -> None:
    """Refuse a component that holds several models, each with a config of its own.

    Args:
        name (`str`), kind (`str`): of the component, and its class.
        present (`Collection[str]`): components of its pipeline.

    Raises:
        ConfigError: always.
    """
    others = [other for other in (*DENOISERS, "controlnet") if other in present and other != name]
    raise ConfigError(
        f"Each component to quantize must be one model, but `{name}` is a {kind}, which holds several. Leave it float: "
        f"`components_to_quantize={others}`."
    )


@sees_through
def dequantize(model: nn.Module | DiffusionPipeline) -> None:
    """Make all quantized layers float again, in place, with the weights that they compute with.

    Args:
        model (`nn.Module` or `DiffusionPipeline`): with quantized layers; of a pipeline all components that have some.

    Raises:
        StateError: it has none.
        UnsupportedError: a model has no single float weight for each layer; none is changed then.

    Example:
        ```py
        dequantize(pipe)  # as pipe.unet.dequantize() and its like
        ```
    """
    models = list(quantized_models(model))
    if not models:
        raise StateError(f"A quantized model is needed to make it float, but {type(model).__name__} has none.")
    for each in models:
        for part in parts():
            if part.require_float is not None:
                part.require_float(each)
    for each in models:
        cast(Any, each).dequantize()

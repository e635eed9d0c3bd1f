"""Quantize a pipeline that is already in memory."""

from collections.abc import Callable

from diffusers import ModelMixin
from torch import nn
from transformers import PreTrainedModel

from ..errors import ConfigError
from ..nn.wrappers import sees_through, unwrap
from ..schemes import DEFAULT_SCHEME
from ..workflow import calibrate, calibration_state, convert
from .config import MSFPConfig
from .quantizer import MSFPQuantizer
from .transformers_quantizer import MSFPTransformersQuantizer


@sees_through
def quantize_model(
    model: ModelMixin | PreTrainedModel, config: MSFPConfig, on_layer: Callable[[int, int], None] | None = None
) -> None:
    """Quantize the weights of a float model in place; its activations are observed from now on.

    Args:
        model (`ModelMixin` or `PreTrainedModel`): any model of diffusers, or one of transformers, whose activations
            stay float.
        config (`MSFPConfig`): not changed; the model gets a copy with its record.
        on_layer (`Callable[[int, int], None]`, *optional*): called after each layer with (done, total).
    """
    door = MSFPQuantizer if isinstance(model, ModelMixin) else MSFPTransformersQuantizer
    quantizer = door(config.without_record(), pre_quantized=True)
    plan = quantizer.quantization_config.plan(model)
    dtype = model.dtype
    convert(model, plan, on_layer)
    quantizer.attach(model)
    if isinstance(model, ModelMixin):
        model.register_to_config(_pre_quantization_dtype=dtype)
    plan.report(model)


def quantize_pipeline(pipe, scheme: str | MSFPConfig = DEFAULT_SCHEME, **calibration):
    """Quantize a float pipeline in place: weights, then activation ranges from its own samples.

    Args:
        pipe (`DiffusionPipeline`): float.
        scheme (`str` or `MSFPConfig`): a name in `SCHEMES`, or a config for more say.
        **calibration: arguments of `calibrate`.

    Returns:
        `pipe`, quantized and frozen, ready to be saved.

    Raises:
        ConfigError: no component to quantize, or an unknown scheme.

    Example:
        ```py
        pipe = quantize_pipeline(DDPMPipeline.from_pretrained("user/model"), "w4a4", num_samples=64)
        pipe.save_pretrained("model-w4a4")
        ```
    """
    config = scheme if isinstance(scheme, MSFPConfig) else MSFPConfig(scheme=scheme)
    models = components_of(pipe, config).values()
    for model in models:
        quantize_model(model, config)
    if any(calibration_state(model) == "observing" for model in models):
        calibrate(pipe, **calibration)
    return pipe


def components_of(pipe, config: MSFPConfig) -> dict[str, ModelMixin | PreTrainedModel]:
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
    return found

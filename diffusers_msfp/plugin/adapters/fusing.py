"""A LoRA into packed weights: decoded, fused as PEFT fuses it, searched and packed again."""

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...compat.torch import bias_of, put_bias, weight_of
from ...compat.wrappers import sees_through
from ...errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    StateError,
    UnsupportedError,
)
from ...layers import QUANT_LAYERS, QuantLayer, SplitLayer
from ...layers.convert import require_own_methods
from ...methods.method import parts
from ...results import OnProgress, Result, in_stage
from ...sampling.denoisers import is_quantized
from ...schemes import resolve
from ..calibrate import calibrate, check_calibration, named_quantized
from ..config import config_of
from .attaching import all_or_nothing
from .lora_files import attach_whole, place_of, tuned_layers

logger = logging.getLogger(__name__)

NAME = "to_be_fused"
"""The LoRA's name while it is beside the weights."""


@dataclass(frozen=True, kw_only=True)
class FusedLoRA(Result):
    """What `fuse_lora` did.

    Args:
        lora (`str`), weight (`float`): as they were given.
        components (`Mapping[str, int]`): name → quantized layers that were packed anew; `.` is a model alone.
        float_layers (`int`): others that the LoRA changed.
        formats_changed (`int`): packed layers whose weight has another format now.
        weight_rel_mse (`float`, *optional*): error of the packed weights against the fused ones, pooled over layers;
            None where no layer is packed.
        taken_off (`Sequence[str]`): what had been fitted to the old weights and is gone, by key in the checkpoint.
        calibrated (`bool`): activation ranges were set anew; they are the old ones otherwise.
    """

    lora: str
    weight: float
    components: Mapping[str, int]
    float_layers: int
    formats_changed: int
    weight_rel_mse: float | None
    taken_off: Sequence[str]
    calibrated: bool


@dataclass
class _Fused:
    """One layer before it is put in place: `made` has the new weight, packed or float."""

    component: str
    layer: nn.Module
    made: nn.Module
    energy: float = 0.0
    reformatted: bool = False


@sees_through
def fuse_lora(
    model: nn.Module | DiffusionPipeline,
    lora: str | Path,
    weight: float = 1.0,
    *,
    calibration: Mapping[str, Any] | None = None,
    on_progress: OnProgress | None = None,
) -> FusedLoRA:
    """Fuse a LoRA into the weights of a quantized pipeline, in place, all of them or none.

    Each layer that the LoRA changes is decoded to float32, gets what PEFT's own `merge` adds (linears, convolutions,
    DoRA), and its weight is searched and packed again; all other layers keep their bits. Float layers and float
    components, such as a text encoder, get it as diffusers' `fuse_lora` gives it. Files, names and kinds are those that
    the pipeline's `load_lora_weights` takes; a pipeline or model without that method takes PEFT's and diffusers' names.

    Decoded weights already have an error, to which the second search adds: where the float model is at hand, fuse the
    LoRA into that and quantize it.

    Args:
        model (`DiffusionPipeline` or `nn.Module`): a pipeline, or a denoiser alone.
        lora (`str` or `Path`): a safetensors file or a folder with one.
        weight (`float`): that the LoRA is multiplied by, as `lora_scale` of diffusers' `fuse_lora`; may be negative.
        calibration (`Mapping[str, Any]`, *optional*): arguments of `calibrate`, which sets the activation ranges anew
            then; by default they stay as they are.
        on_progress (`OnProgress`, *optional*): called with (done, total, stage=…, part=layer) after each layer.

    Returns:
        `FusedLoRA`. An output correction was fitted to the old weights and is taken off; `correct_output` fits one.

    Raises:
        CheckpointError: no such file, a pickle, or a damaged one.
        ConfigError: a weight that is no finite number or 0; a LoRA that fits nothing, of which a part fits nothing, or
            that is more than what PEFT merges.
        StateError: adapters are attached already, or something is on the model that the fused weights would not fit.
        NonFiniteError: the fused weights hold NaN or infinity.
        UnsupportedError: a LoRA that widens layers. Nothing is changed after any of these, unless it comes from the
            calibration: that follows the fusing, which a warning then says is done.

    Example:
        ```py
        fuse_lora(pipe, "style.safetensors", 0.8)
        pipe.save_pretrained("sd-w4a8-style")
        ```
    """
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < abs(weight) < float("inf"):
        raise ConfigError(f"A LoRA's weight must be a finite number other than 0, but got {weight!r}.")
    place = place_of(lora)
    models = _models(model)
    for each in models.values():
        if any(isinstance(module, BaseTunerLayer) for module in each.modules()):
            raise StateError(
                f"A LoRA is fused into a {type(each).__name__} without adapters, but this one has some. "
                f"{_way_to_unload(model, each)} first."
            )
    quantized = named_quantized(model) if isinstance(model, DiffusionPipeline) else {}
    if calibration is not None:
        if not quantized:
            raise ConfigError("Calibration needs a quantized pipeline, but this is none. Leave `calibration` out.")
        check_calibration(cast(DiffusionPipeline, model), quantized, **calibration)
    with ExitStack() as stack:
        for each in models.values():
            stack.enter_context(all_or_nothing(each, only_try=True))
        attach_whole(model, models, place, NAME)
        fused = _fuse(models, float(weight), in_stage(on_progress, "fusing"))
    taken_off = _put_in_place(models, fused)
    if calibration is not None:
        try:
            progress = in_stage(on_progress, "calibration")
            calibrate(cast(DiffusionPipeline, model), on_progress=progress, **calibration)
        except BaseException:
            logger.warning(
                "The LoRA is in the weights, but the ranges are not set. Go on with `calibrate(pipe, …)`; fused again, "
                "the LoRA would count twice."
            )
            raise
    return _result(str(lora), float(weight), fused, taken_off, calibrated=calibration is not None)


def _way_to_unload(owner: object, model: nn.Module) -> str:
    if hasattr(owner, "unload_lora_weights"):
        return "Call `pipe.unload_lora_weights()`"
    return "Call `model.unload_lora()`" if hasattr(model, "unload_lora") else "Load it anew"


def _models(owner: nn.Module | DiffusionPipeline) -> dict[str, nn.Module]:
    if isinstance(owner, nn.Module):
        return {".": owner}
    return {name: part for name, part in owner.components.items() if isinstance(part, nn.Module)}


def _fuse(models: Mapping[str, nn.Module], weight: float, on_progress: OnProgress | None) -> list[_Fused]:
    """All layers with the LoRA in their weights; the model's own are not written."""
    tuned = list(tuned_layers(models))
    quantized: dict[str, dict[str, nn.Module]] = {component: {} for component, _, _ in tuned}
    for component, name, wrapped in tuned:
        if isinstance(base := wrapped.get_base_layer(), QuantLayer):
            quantized[component][name] = base
    for component, layers in quantized.items():
        _require_fusible(models[component])
        require_own_methods(models[component], layers, "fused")
    found = []
    for done, (component, name, wrapped) in enumerate(tuned, start=1):
        found.append(_fused_layer(models[component], component, name, wrapped, weight))
        if on_progress is not None:
            on_progress(done, len(tuned), part=name)
    return found


def _require_fusible(model: nn.Module) -> None:
    for part in parts():
        if part.forbids_fusing is not None and part.record_of(model) is not None:
            raise StateError(f"No LoRA can be fused into this {type(model).__name__}. {part.forbids_fusing}")


@torch.no_grad()
def _fused_layer(model: nn.Module, component: str, name: str, wrapped: Any, weight: float) -> _Fused:
    layer = wrapped.get_base_layer()
    if isinstance(layer, SplitLayer):
        raise UnsupportedError(f"`{name}` is split into parts, which a LoRA cannot be fused into.")
    if wrapped.lora_bias.get(NAME) and bias_of(layer) is None:
        raise UnsupportedError(f"The LoRA has a bias for `{name}`, which must have one to take it, but has none.")
    if isinstance(layer, QuantLayer):
        plain, bias = layer.to_float(torch.float32), bias_of(layer)
        put_bias(plain, None if bias is None else nn.Parameter(bias.detach().clone()))
    else:
        plain = copy.deepcopy(layer)
    wrapped.base_layer = plain
    try:
        wrapped.scale_layer(weight)
        wrapped.merge(safe_merge=True, adapter_names=[NAME])
    except ValueError as error:  # PEFT's, for what is not finite
        raise NonFiniteError(f"`{name}` must be finite with the LoRA in it, but it is not: damaged file.") from error
    finally:
        wrapped.base_layer = layer
    bias = bias_of(plain)
    if bias is not None and not torch.isfinite(bias).all():
        raise NonFiniteError(f"The bias of `{name}` must be finite with the LoRA in it, but it is not: damaged file.")
    if not isinstance(layer, QuantLayer):
        return _Fused(component, layer, plain)
    config = config_of(model)
    scheme = resolve(layer.module_name, config.scheme, config.scheme_overrides, config.format_version)
    made = QUANT_LAYERS[layer.float_class].from_float(plain, layer.module_name, scheme)
    if made.packed_weight.shape != layer.packed_weight.shape:
        raise CheckpointError(
            f"`{name}` must have as many bits as its scheme says, but has {layer.weight_format}: damaged config."
        )
    energy = weight_of(plain).square().sum().item()
    return _Fused(component, layer, made, energy, made.weight_format != layer.weight_format)


@torch.no_grad()
def _put_in_place(models: Mapping[str, nn.Module], fused: Sequence[_Fused]) -> list[str]:
    """Write the new tensors into the layers, which are the model's own again; keys of the parts that are gone."""
    for each in fused:
        layer: Any = each.layer
        if isinstance(layer, QuantLayer):
            made = cast(QuantLayer, each.made)
            layer.weight_format = made.weight_format
            layer.weight_scale.copy_(made.weight_scale)
            if layer.group_size:
                layer.group_scale.copy_(made.group_scale)
            layer.put_weight(made.packed_weight, made.weight_error)
        else:
            layer.weight.copy_(weight_of(each.made))
        bias = bias_of(each.made)
        if bias is not None:
            cast(Tensor, layer.bias).copy_(bias)
    gone = []
    for component in dict.fromkeys(each.component for each in fused):
        model = models[component]
        for part in parts() if is_quantized(model) else ():
            if part.detach is not None and part.record_of(model) is not None:
                part.detach(model)
                gone.append(part.key)
    if gone:
        logger.warning("Taken off, since it was fitted to the weights without the LoRA: %s.", ", ".join(gone))
    return gone


def _result(
    lora: str, weight: float, fused: Sequence[_Fused], taken_off: Sequence[str], *, calibrated: bool
) -> FusedLoRA:
    packed = [each for each in fused if isinstance(each.layer, QuantLayer)]
    errors = [cast(QuantLayer, each.layer).weight_error.item() * each.energy for each in packed]
    energy = sum(each.energy for each in packed)
    return FusedLoRA(
        lora=lora,
        weight=weight,
        components=dict(Counter(each.component for each in packed)),
        float_layers=len(fused) - len(packed),
        formats_changed=sum(each.reformatted for each in packed),
        weight_rel_mse=sum(errors) / energy if energy else None,
        taken_off=list(taken_off),
        calibrated=calibrated,
    )

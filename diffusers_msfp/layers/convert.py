"""Replace a model's float layers by quantized ones, and back."""

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import CustomDtype
from torch import nn

from ..compat.diffusers import kept_in_float32, offloaded_groups
from ..compat.modules import exchanged_methods
from ..compat.peft import is_wrapped, name_inside
from ..compat.torch import StatefulModule, is_hooked, replace_children, tensors_of, weight_of
from ..compat.wrappers import own_name
from ..errors import ConfigError, StateError
from ..formats import FORMATS
from ..numerics.rounding import check_finite
from ..schemes import SCHEMES, LayerScheme, check_patterns, matches, resolve
from . import QUANT_LAYERS, QuantLayer, SplitLayer

logger = logging.getLogger(__name__)

# What people expect to see quantized; anything of these kinds that is not converted is reported.
_WEIGHTED = (nn.Linear, nn.modules.conv._ConvNd, nn.Embedding)


@dataclass(frozen=True)
class Conversion:
    """What to do with each layer of a model.

    Args:
        layers (`Mapping[str, LayerScheme]`): module name → candidate formats.
        skipped (`Mapping[str, str]`): module name → why it stays float.
    """

    layers: Mapping[str, LayerScheme]
    skipped: Mapping[str, str]

    def stored_dtypes(self, model: nn.Module, dtype: torch.dtype) -> dict[str, Any]:
        """What accelerate is to count each tensor of a model as that has no weights yet; packed ones count as they are.

        Args:
            model (`nn.Module`): float, or with quantized layers already.
            dtype (`torch.dtype`): of what stays float.
        """
        found: dict[str, Any] = {}
        for module_name, module in model.named_modules():
            exact = dict(module.exact_tensors()) if isinstance(module, StatefulModule) else {}
            for tensor_name, tensor in tensors_of(module).items():
                name = f"{module_name}.{tensor_name}".removeprefix(".")
                if tensor_name == "weight" and module_name in self.layers and not isinstance(module, QuantLayer):
                    widest = max(FORMATS[fmt].bits for fmt in self.layers[module_name].weight)
                    found[name] = CustomDtype.INT4 if widest <= 4 else torch.int8
                elif tensor.is_floating_point():
                    found[name] = tensor.dtype if tensor_name in exact else dtype
        return found

    @classmethod
    def plan(
        cls,
        model: nn.Module,
        scheme: str,
        keep: Sequence[str] = (),
        overrides: Mapping[str, str] | None = None,
        format_version: int | None = None,
        begun: bool = False,
    ) -> "Conversion":
        """Decide by name and kind.

        Args:
            scheme (`str`): name in `SCHEMES`.
            keep (`Sequence[str]`): patterns of modules that stay float.
            overrides (`Mapping[str, str]`): pattern → scheme.
            format_version (`int`, *optional*): of the checkpoint that names the schemes, see `schemes.scheme_of`.
            begun (`bool`): some layers are quantized already; the plan is for the others, and may be empty.

        Raises:
            ConfigError: unknown scheme, a pattern that matches nothing, or nothing to convert.
            StateError: quantized already, with adapters or image prompts, or with layers that run another `forward`
                than their own.
        """
        overrides = overrides or {}
        for name in (scheme, *overrides.values()):
            SCHEMES[name]
        weighted = {name: module for name, module in model.named_modules() if isinstance(module, _WEIGHTED)}
        already = [name for name, module in weighted.items() if isinstance(module, QuantLayer)]
        if already and not begun:
            raise StateError(
                f"A model can be quantized once, but {len(already)} layers already are ({already[0]}, …). "
                f"Call `model.dequantize()` first."
            )
        if any(is_wrapped(name) for name in weighted):
            raise StateError(
                "A model must be quantized before adapters are attached, but this one has some. Fuse them "
                "(`fuse_lora`, then `unload_lora`) or unload them first."
            )
        loaded = next((name for name in weighted if "processor" in name.split(".")), None)
        if loaded is not None:
            way = "pipe.unload_ip_adapter()" if "_ip." in loaded else "model.set_attn_processor(AttnProcessor())"
            raise StateError(
                f"A model must be quantized before image prompts and the like are loaded, but its attention has layers "
                f"of such ({loaded}, …), which no checkpoint of it has. Unload them (`{way}`), quantize, and load them "
                f"again."
            )
        check_patterns([*overrides], list(weighted), "scheme_overrides")
        check_patterns(list(keep), [name for name, _ in model.named_modules() if name], "modules_to_not_convert")
        weighted = {name: module for name, module in weighted.items() if name not in already}
        shared = Counter(id(module.weight) for module in weighted.values())
        layers, skipped = {}, {}
        for name, module in weighted.items():
            pattern = next((p for p in keep if matches(p, name)), None)
            if kept_in_float32(model) & set(name.split(".")):
                skipped[name] = f"{type(model).__name__} keeps it in float32"
            elif pattern is not None:
                skipped[name] = f"matches {pattern!r} in modules_to_not_convert"
            elif type(module) not in QUANT_LAYERS:
                skipped[name] = f"no quantized counterpart for {type(module).__name__}"
            elif "weight" not in dict(module.named_parameters(recurse=False)):
                skipped[name] = "its weight is computed anew in each call (weight norm, pruning)"
            elif module.bias is not None and "bias" not in dict(module.named_parameters(recurse=False)):
                skipped[name] = "its bias is computed anew in each call (pruning)"
            elif shared[id(module.weight)] > 1:
                skipped[name] = "shares its weight with another layer"
            elif not module.weight.is_floating_point():
                skipped[name] = f"its weight is {module.weight.dtype}: already quantized by something else"
            else:
                layers[name] = resolve(name, scheme, overrides, format_version)
        if not (layers or begun):
            kinds = ", ".join(cls.__name__ for cls in QUANT_LAYERS)
            raise ConfigError(f"A model must have a layer to quantize ({kinds}), but {type(model).__name__} has none.")
        require_own_methods(model, {name: weighted[name] for name in layers}, "quantized")
        return cls(layers, skipped)

    def check(self, model: nn.Module) -> None:
        """Refuse weights that cannot be quantized.

        Raises:
            NonFiniteError: a weight holds NaN or infinity.
        """
        for name in self.layers:
            check_finite(weight_of(model.get_submodule(name)), f"The weight of layer `{name}`")

    def report(self, model: nn.Module) -> None:
        """Say once what stays float and why."""
        if self.skipped:
            listed = "; ".join(f"{name}: {reason}" for name, reason in self.skipped.items())
            logger.warning("%s: %d layers stay float: %s.", type(model).__name__, len(self.skipped), listed)


def quant_layers(model: nn.Module) -> Iterator[tuple[str, QuantLayer]]:
    """Quantized layers with the names they have without adapters around them."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLayer):
            yield plain_name(name), module


def layers_by_name(model: nn.Module) -> dict[str, QuantLayer]:
    """Quantized layers by their plain names."""
    return dict(quant_layers(model))


def base_fingerprint(model: nn.Module) -> str:
    """What tells one quantized model from another: SHA-256 of names, formats, weights and their scales."""
    digest = hashlib.sha256()
    for name, layer in sorted(layers_by_name(model).items()):
        digest.update(f"{name}:{layer.weight_format}:{layer.input_format}".encode())
        for tensor in (layer.packed_weight, layer.weight_scale, *([layer.group_scale] if layer.group_size else [])):
            digest.update(tensor.detach().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def prepare_layers(model: nn.Module) -> None:
    """Let engines make all layers ready that changed; a model must be ready before it is compiled."""
    for _, layer in quant_layers(model):
        layer.prepare()


def plain_name(name: str) -> str:
    """A module or tensor name without the levels that PEFT and `torch.compile` put between a layer and its place."""
    return name_inside(own_name(name))


def replace_module(model: nn.Module, name: str, new: nn.Module) -> None:
    """Put `new` wherever the module called `name` stands in the model, also where it stands twice."""
    replace_modules(model, {name: new})


def replace_modules(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """`replace_module` for many names at once, in one walk over the model."""
    instead = {id(model.get_submodule(name)): module for name, module in new.items()}
    for parent in list(model.modules()):  # as it is now: a new module may hold an old one
        replace_children(parent, instead)


def convert(model: nn.Module, plan: Conversion, on_layer: Callable[[int, int], None] | None = None) -> None:
    """Quantize the weights of a float model in place, layer by layer, each float weight freed before the next.

    Args:
        on_layer (`Callable[[int, int], None]`, *optional*): called after each layer with (done, total).

    Raises:
        NonFiniteError: a weight holds NaN or infinity; checked for all layers before the first is changed.
    """
    plan.check(model)
    for done, (name, scheme) in enumerate(plan.layers.items(), start=1):
        module = model.get_submodule(name)
        replace_module(model, name, QUANT_LAYERS[type(module)].from_float(module, name, scheme))
        if on_layer is not None:
            on_layer(done, len(plan.layers))


def require_tensors(model: nn.Module, done: str, *, changes: bool = True) -> None:
    """Refuse what reads or writes a model's tensors while they are somewhere else.

    Args:
        done (`str`): what is to be done with the model, for the message.
        changes (`bool`): it is written to, also where group offload has copies of its own, which overwrite that.

    Raises:
        StateError: weights are offloaded, or group offload keeps them on disk or in copies.
    """
    grouped = offloaded_groups(model)
    away = changes and (grouped == "pinned" or any(layer.packed_weight.is_meta for _, layer in quant_layers(model)))
    if away or grouped == "disk":
        raise StateError(
            f"The tensors of a {type(model).__name__} must be in memory for it to be {done}, but they are offloaded, "
            f"and it is as it was. Load it anew; it can be offloaded afterwards."
        )


def require_own_methods(model: nn.Module, layers: Mapping[str, nn.Module], done: str) -> None:
    """Refuse to put others in place of layers that somebody has bound something to.

    Args:
        model (`nn.Module`): that they are in.
        layers (`Mapping[str, nn.Module]`): by name.
        done (`str`): what is to be done with them, for the message.

    Raises:
        StateError: a layer has another `forward`, or another method, than its class, or group offload knows it.
    """
    if layers and offloaded_groups(model) is not None:
        first = next(iter(layers))
        raise StateError(
            f"A layer must run its own `forward` to be {done}, but `{first}` and {len(layers) - 1} others are moved by "
            f"group offload. Nothing was changed. Load the model anew; it can be put on afterwards."
        )
    exchanged = {name: methods[0] for name, layer in layers.items() if (methods := exchanged_methods(layer))}
    if exchanged:
        name, method = next(iter(exchanged.items()))
        raise StateError(
            f"A layer must run its own `{method}` to be {done}, but `{name}` and {len(exchanged) - 1} others have "
            f"another one: group or sequential offload, layerwise casting, an adapter of another library, or a patch. "
            f"Nothing was changed. Take that off, or load the model anew; it can be put on afterwards."
        )


def require_revertible(model: nn.Module) -> None:
    """Refuse to put float layers in place of quantized ones where that would lose something.

    Raises:
        StateError: a layer runs another `forward` than its own, or somebody's hook is on a part of a split layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer | SplitLayer)}
    require_own_methods(model, layers, "made float")
    for name, layer in layers.items():
        if getattr(layer, "columns", None) is not None and is_hooked(layer):
            raise StateError(
                f"A split layer must have no hooks on its parts to be made float, but `{name}` has one, which the "
                f"whole layer has no place for. Nothing was changed. Remove it (`handle.remove()`)."
            )


def decoded_layers(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """Float layers with decoded weights for all quantized ones, by name; the model is not changed."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    return {name: layer.to_float(dtype) for name, layer in layers.items()}


def revert(model: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Put `decoded_layers` in place of all quantized ones; activations are float again."""
    replace_modules(model, layers)
    split = {name: module for name, module in model.named_modules() if isinstance(module, SplitLayer)}
    replace_modules(model, {name: layer.merged() for name, layer in split.items()})

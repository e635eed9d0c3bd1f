"""LoRA files: where one lies, what it holds, and putting it on a model that has no loader of its own."""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from ...checkpoint.opening import opened
from ...errors import CheckpointError, ConfigError, MSFPError, UnsupportedError, first_line
from ...layers.convert import plain_name
from .exchange import DIFFUSERS_FILE, METADATA, PEFT_CONFIG, PEFT_FILE, PEFT_PREFIX, require_pairs_alone

_ENDS = {
    "A": (".lora_A.weight", ".lora_down.weight", ".down.weight", ".lora_embedding_A"),
    "B": (".lora_B.weight", ".lora_up.weight", ".up.weight", ".lora_embedding_B"),
    "bias": (".lora_B.bias",),
    "magnitudes": (".lora_magnitude_vector", ".lora_magnitude_vector.weight"),
}
"""What PEFT merges, and how files and models call it."""
_OF_PIPELINES = ("use_dora", "lora_bias")
_DROPPED = "dora_scale"
"""In names of tensors that diffusers leaves out, with a warning."""


def place_of(lora: str | Path) -> Path:
    """The one safetensors file that a user names, itself or by its folder.

    Raises:
        CheckpointError: there is none, there are several, or it is of another kind or damaged.
    """
    path = Path(lora)
    if path.is_dir():
        known = [path / name for name in (DIFFUSERS_FILE, PEFT_FILE) if (path / name).is_file()]
        found = known or sorted(path.glob("*.safetensors"))
        if len(found) != 1:
            names = ", ".join(file.name for file in found) or "none"
            raise CheckpointError(f"A LoRA's folder must hold one safetensors file, but {path} holds {names}. Name it.")
        path = found[0]
    if path.suffix != ".safetensors" or not path.is_file():
        raise CheckpointError(
            f"A LoRA must be a safetensors file, or a folder with one, but {lora} is none; pickles are not read. "
            f"Download it first, or convert it with `safetensors.torch.save_file`."
        )
    with opened(path) as handle:
        keys = list(handle.keys())
    if not any("lora" in name.lower() or kind_of(name) for name in keys):
        raise CheckpointError(f"{path} must hold pairs of factors, but none of its {len(keys)} tensors is of a LoRA.")
    return path


def attach_whole(owner: Any, models: Mapping[str, nn.Module], place: Path, adapter_name: str) -> None:
    """Put a LoRA beside the weights, as the pipeline does it where it has a loader.

    Args:
        owner (`DiffusionPipeline` or `nn.Module`), models (`Mapping[str, nn.Module]`): whose these are.

    Raises:
        ConfigError: a part of it fits nothing.
        UnsupportedError: the pipeline has put wider layers into the places of others.
    """
    known = {id(module) for model in models.values() for module in model.modules()}
    try:
        expected = _tensors_in_file(owner, place)
        if isinstance(owner, DiffusionPipeline) and hasattr(owner, "load_lora_weights"):
            where = {"pretrained_model_name_or_path_or_dict": str(place.parent), "weight_name": place.name}
            cast(Any, owner).load_lora_weights(**where, adapter_name=adapter_name, use_safetensors=True)
        else:
            _attach_directly(models, place, adapter_name)
    except MSFPError:
        raise
    except Exception as error:  # diffusers' converters fail in any way on a file that they do not know
        raise ConfigError(
            f"A LoRA must be of a kind that fits {type(owner).__name__}, but {place} cannot be put on it: "
            f"{first_line(error)}"
        ) from error
    widened = [name for _, name, wrapped in tuned_layers(models) if id(wrapped.get_base_layer()) not in known]
    if widened:
        raise UnsupportedError(
            f"A LoRA must fit the layers that it adapts, but this one reads more channels than `{widened[0]}` has: a "
            f"control LoRA, or one for another model. Leave it beside the weights (`pipe.load_lora_weights(…)`)."
        )
    names = [name for model in models.values() for name, _ in model.named_parameters() if f".{adapter_name}" in name]
    attached = Counter(kind_of(name.replace(f".{adapter_name}", "")) for name in names)
    kind = next((each for each in ("A", *expected) if not attached["A"] or attached[each] < expected[each]), None)
    if kind is not None:
        what = "layers" if kind == "A" else f"tensors `{kind}`"
        raise ConfigError(
            f"A LoRA must fit the model as a whole, but {attached[kind]} of its {expected[kind]} {what} fit one of "
            f"{', '.join(type(each).__name__ for each in models.values())}: made for another model."
        )


def tuned_layers(models: Mapping[str, nn.Module]) -> Iterator[tuple[str, str, Any]]:
    """Component, name and PEFT's wrapper of each layer with adapters."""
    for component, model in models.items():
        for name, module in model.named_modules():
            if isinstance(module, BaseTunerLayer):
                yield component, plain_name(name), module


def _tensors_in_file(owner: Any, place: Path) -> Counter[str]:
    """Tensors of each kind in a file, after the pipeline's own renaming, which may split one into several.

    Raises:
        ConfigError: tensors or settings that no fusion would take along.
    """
    if not hasattr(owner, "lora_state_dict"):
        return Counter(part for pair in _pairs(place).values() for part in pair if part != "alpha")
    for key, value in _metadata(place).items():
        require_pairs_alone({key.rpartition(".")[2]: value}, allowed=_OF_PIPELINES)
    with opened(place) as handle:
        dropped = [key for key in handle.keys() if _DROPPED in key]
    unet = getattr(owner, "unet", None)
    known = {} if unet is None else {"unet_config": unet.config}
    found = owner.lora_state_dict(str(place.parent), weight_name=place.name, use_safetensors=True, **known)
    state = found[0] if isinstance(found, tuple) else found
    kinds = {key: kind_of(key) for key in state if not key.endswith(".alpha")}
    foreign = sorted([*dropped, *(key for key, kind in kinds.items() if kind is None)])
    if foreign:
        raise _more_than_pairs(foreign)
    counts = Counter(kind for kind in kinds.values() if kind is not None)
    if counts["A"] != counts["B"]:
        raise ConfigError(
            f"A LoRA must have a pair of factors for each layer, but {place} has {counts['A']} first ones and "
            f"{counts['B']} second ones: damaged file."
        )
    return counts


def kind_of(name: str) -> str | None:
    """Which part of a LoRA a tensor of this name is; None for any other tensor."""
    return next((kind for kind, ends in _ENDS.items() if name.endswith(ends)), None)


def _more_than_pairs(names: Iterable[str]) -> ConfigError:
    first, *others = names
    more = f" and {len(others)} other tensors" if others else ""
    return ConfigError(
        f"A LoRA must be no more than pairs of factors, but it has `{first}`{more}, which would be left out. Merge it "
        f"into the float model, and quantize that."
    )


def _attach_directly(models: Mapping[str, nn.Module], place: Path, adapter_name: str) -> None:
    """Put a LoRA on the models whose layers it names, in PEFT's or diffusers' names, without a pipeline's loader.

    Raises:
        ConfigError: a pair of which one half is missing, or another kind of adapter.
    """
    pairs, metadata, config = _pairs(place), _metadata(place), _peft_config(place)
    for component, model in models.items():
        layers = {name for name, _ in model.named_modules()}
        own = {name: pair for name, pair in pairs.items() if _inside(component, name) in layers}
        if not own:
            continue
        state: dict[str, Tensor] = {}
        ranks, alphas = {}, {}
        for name, pair in own.items():
            if set(pair) - {"alpha"} != {"A", "B"}:
                raise ConfigError(f"A LoRA must have a pair of factors for `{name}`, but one is missing: damaged file.")
            inside = _inside(component, name)
            state |= {f"{inside}.lora_A.weight": pair["A"], f"{inside}.lora_B.weight": pair["B"]}
            ranks[inside] = len(pair["A"])
            alphas[inside] = pair["alpha"].item() if "alpha" in pair else None
        said = config or _of_component(metadata, component)
        require_pairs_alone(said)
        inject_adapter_in_model(_config(said, ranks, alphas), model, adapter_name=adapter_name, state_dict=state)
        set_peft_model_state_dict(model, state, adapter_name=adapter_name)


def _config(said: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float | None]) -> LoraConfig:
    """Ranks as the tensors have them; factors as the file says, which is the rank where it says nothing."""
    if "lora_alpha" in said and said.get("r"):
        named = {key: said[key] for key in ("lora_alpha", "alpha_pattern", "use_rslora") if key in said}
        return LoraConfig(r=said["r"], rank_pattern=_exact(ranks), target_modules=sorted(ranks), **named)
    factors = {name: rank if alphas[name] is None else alphas[name] for name, rank in ranks.items()}
    return LoraConfig(
        r=max(ranks.values()),
        lora_alpha=max(ranks.values()),
        rank_pattern=_exact(ranks),
        alpha_pattern=_exact(factors),
        target_modules=sorted(ranks),
    )


def _exact(values: Mapping[str, Any]) -> dict[str, Any]:
    return {f"^{name}$".replace(".", "\\."): value for name, value in values.items()}


def _inside(component: str, name: str) -> str:
    """A layer's name in its model: files name the component before it, also those for a model alone."""
    first, _, rest = name.partition(".")
    return rest if first == component or (component == "." and first in ("unet", "transformer", "prior")) else name


def _of_component(metadata: Mapping[str, Any], component: str) -> dict[str, Any]:
    """What a file says of a component's LoRA."""
    own = {_inside(component, key): value for key, value in metadata.items()}
    return {key: value for key, value in own.items() if "." not in key}


def _pairs(place: Path) -> dict[str, dict[str, Tensor]]:
    """Layer → its factors `A` and `B`, and `alpha` where there is one.

    Raises:
        ConfigError: other tensors, or a factor twice.
    """
    found: dict[str, dict[str, Tensor]] = {}
    ends = {
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora.down.weight": "A",
        ".lora.up.weight": "B",
        ".alpha": "alpha",
    }
    foreign = []
    with opened(place) as handle:
        for key in handle.keys():
            end = next((end for end in ends if key.endswith(end)), None)
            if end is None:
                foreign.append(key)
                continue
            pair = found.setdefault(key.removesuffix(end).removeprefix(PEFT_PREFIX), {})
            if ends[end] in pair:
                raise ConfigError(f"A LoRA must have each factor once, but has that of `{key}` twice: damaged file.")
            pair[ends[end]] = handle.get_tensor(key).to(torch.float32)
    if foreign:
        raise _more_than_pairs(foreign)
    return found


def _metadata(place: Path) -> dict[str, Any]:
    """What diffusers writes beside the tensors."""
    with opened(place) as handle:
        said = (handle.metadata() or {}).get(METADATA)
    return _object(said, place) if said else {}


def _peft_config(place: Path) -> dict[str, Any]:
    file = place.parent / PEFT_CONFIG
    return _object(file.read_text(encoding="utf-8"), file) if place.name == PEFT_FILE and file.is_file() else {}


def _object(text: str, where: Path) -> dict[str, Any]:
    try:
        said = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"What {where} says of its LoRA must be JSON, but it is not ({error}).") from error
    if not isinstance(said, dict):
        raise CheckpointError(f"What {where} says of its LoRA must be an object, but it is {type(said).__name__}.")
    return said

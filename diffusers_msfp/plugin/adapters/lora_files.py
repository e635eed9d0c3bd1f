"""LoRA files: where one lies, how many layers it is for, and putting it on a model that has no loader of its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model, set_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ...errors import CheckpointError, ConfigError
from .exchange import DIFFUSERS_FILE, METADATA, PEFT_CONFIG, PEFT_FILE, PEFT_PREFIX

_DOWN = (".lora_A.weight", ".lora_down.weight", ".down.weight")
"""How files call the first factor of a layer's pair, one for each layer."""


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
    try:
        with safe_open(path, framework="pt") as handle:
            keys = list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} must be a safetensors file, but it is not ({error}).") from error
    if not any("lora" in name.lower() or name.endswith(_DOWN) for name in keys):
        raise CheckpointError(f"{path} must hold pairs of factors, but none of its {len(keys)} tensors is of a LoRA.")
    return path


def pairs_in_file(owner: Any, place: Path) -> int:
    """Layers that a file is for, after the pipeline's own renaming, which may split one into several."""
    if not hasattr(owner, "lora_state_dict"):
        return len(_pairs(place))
    unet = getattr(owner, "unet", None)
    known = {} if unet is None else {"unet_config": unet.config}
    found = owner.lora_state_dict(str(place.parent), weight_name=place.name, use_safetensors=True, **known)
    state = found[0] if isinstance(found, tuple) else found
    return sum(key.endswith(_DOWN) for key in state)


def attach_directly(models: Mapping[str, nn.Module], place: Path, adapter_name: str) -> None:
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
        said = config or {_inside(component, key): value for key, value in metadata.items()}
        inject_adapter_in_model(_config(said, ranks, alphas), model, adapter_name=adapter_name, state_dict=state)
        set_peft_model_state_dict(model, state, adapter_name=adapter_name)


def _config(said: Mapping[str, Any], ranks: Mapping[str, int], alphas: Mapping[str, float | None]) -> LoraConfig:
    """Ranks as the tensors have them; factors as the file says, which is the rank where it says nothing."""
    if said.get("use_dora"):
        raise ConfigError("A LoRA without a pipeline's loader must be a plain one, but this is a DoRA.")
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


def _pairs(place: Path) -> dict[str, dict[str, Tensor]]:
    """Layer → its factors `A` and `B`, and `alpha` where there is one."""
    found: dict[str, dict[str, Tensor]] = {}
    ends = {
        ".lora_A.weight": "A",
        ".lora_B.weight": "B",
        ".lora.down.weight": "A",
        ".lora.up.weight": "B",
        ".alpha": "alpha",
    }
    with safe_open(place, framework="pt") as handle:
        for key in handle.keys():  # noqa: SIM118
            for end, part in ends.items():
                if key.endswith(end):
                    name = key.removesuffix(end).removeprefix(PEFT_PREFIX)
                    found.setdefault(name, {})[part] = handle.get_tensor(key).to(torch.float32)
    return found


def _metadata(place: Path) -> dict[str, Any]:
    """What diffusers writes beside the tensors."""
    with safe_open(place, framework="pt") as handle:
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

"""Single timestep-aware adapters to and from PEFT's and diffusers' LoRA files.

What travels is the low-rank pair of every layer. The activation ranges that were trained with the adapters, and the
router's table, do not: on another base an exported adapter is an ordinary LoRA, which reads floats there. Files say in
their metadata what it was trained to read (`READ`).
"""

import json
import logging
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import cast

import torch
from peft import LoraConfig
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ...compat.peft import pattern_value
from ...compat.wrappers import sees_through
from ...errors import CheckpointError, ConfigError, NonFiniteError, ShapeError, UnsupportedError
from ...layers.convert import layers_by_name, require_tensors
from ...layers.split import whole_name
from ...methods.correction.attach import detach_correction
from ...methods.correction.table import correction_of
from ...methods.talora import AdapterBank
from ...methods.talora.attach import refuse_merged
from .talora_files import require_plan

logger = logging.getLogger(__name__)

PEFT_FILE, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
DIFFUSERS_FILE, METADATA = "pytorch_lora_weights.safetensors", "lora_adapter_metadata"
PEFT_PREFIX = "base_model.model."
FORMATS = ("peft", "diffusers")
READ = "msfp_trained_to_read"
"""Key of a file's metadata."""
_READS = {
    "codes": "codes: the layer's quantized input, with weight and update rounded to 8 bits together; PEFT reads floats",
    "float": "float: the layer's input before it is quantized, as PEFT does",
}
_SAYS_OF_PAIRS = {
    *("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "target_modules", "exclude_modules"),
    *("layers_to_transform", "layers_pattern", "lora_dropout", "fan_in_fan_out", "task_type", "auto_mapping"),
    *("peft_version", "base_model_name_or_path", "revision", "inference_mode", "megatron_core", "qalora_group_size"),
    *("runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}
"""Keys of PEFT's config that concern the pairs, or nothing that is left when they are trained."""
_SAYS_NO_MORE = {
    "peft_type": ("LORA", None),
    "bias": ("none", None),
    "init_lora_weights": (True, False, None, "gaussian", "eva", "orthogonal"),  # others change the weight, too
}


@sees_through
def export_adapter(
    model: nn.Module, adapter: int, folder: str | Path, format: str = "peft", prefix: str = "unet"
) -> Path:
    """Write one timestep-aware adapter as a LoRA.

    Args:
        model (`ModelMixin`): with adapters beside its weights.
        adapter (`int`): which, from 0.
        folder (`str` or `Path`): to write to.
        format (`str`): `"peft"` (`adapter_config.json`, `adapter_model.safetensors`) or `"diffusers"`
            (`pytorch_lora_weights.safetensors`, for `load_lora_weights`). The file's metadata says what the adapter was
            trained to read: with PEFT all read floats.
        prefix (`str`): the component's name in diffusers' format.

    Returns:
        `Path`: the file with the tensors.

    Raises:
        ConfigError: no such adapter or format.
        UnsupportedError: merged adapters, or a grouped convolution or split layer, for which PEFT has no counterpart.

    Example:
        ```py
        export_adapter(pipe.unet, 0, "adapter-0")  # a folder that PEFT loads
        ```
    """
    ranks = _require(model, adapter, format)
    layers, tensors = layers_by_name(model), {}
    for name in ranks:
        layer = layers[name]
        if getattr(layer, "groups", 1) > 1:
            raise UnsupportedError(
                f"PEFT has no adapter for grouped convolutions like `{name}`: it cannot be exported."
            )
        if whole_name(name, layer) != name:
            raise UnsupportedError(
                f"Adapters on parts of a split layer like `{name}` fit no other model: they cannot be exported."
            )
        bank = cast(AdapterBank, layer.adapters)
        down, up = (tensor[adapter].contiguous() for tensor in (bank.down, bank.up))
        tensors[f"{name}.lora_A.weight"] = down
        tensors[f"{name}.lora_B.weight"] = up.view(*up.shape, *[1] * (down.ndim - 2)).contiguous()
    most = max(ranks.values())
    pattern = {f"^{name}$".replace(".", "\\."): rank for name, rank in ranks.items() if rank != most}
    config = LoraConfig(
        r=most, lora_alpha=most, target_modules=sorted(ranks), rank_pattern=pattern, alpha_pattern=dict(pattern)
    )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    metadata = {"format": "pt", READ: _READS[require_plan(model).reads]}
    if format == "peft":
        config.save_pretrained(str(folder))
        save_file({PEFT_PREFIX + key: value for key, value in tensors.items()}, folder / PEFT_FILE, metadata)
        return folder / PEFT_FILE
    record = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    metadata |= {METADATA: json.dumps({f"{prefix}.{key}": value for key, value in record.items()})}
    save_file({f"{prefix}.{key}": value for key, value in tensors.items()}, folder / DIFFUSERS_FILE, metadata)
    return folder / DIFFUSERS_FILE


@sees_through
def import_adapter(model: nn.Module, adapter: int, folder: str | Path, prefix: str = "unet") -> None:
    """Read a LoRA into one timestep-aware adapter; layers that it does not have get none there.

    A correction of the output that was fitted to the adapters is taken off, with a warning.

    Args:
        model (`ModelMixin`): with adapters beside its weights.
        adapter (`int`): which to replace, from 0.
        folder (`str` or `Path`): in PEFT's or diffusers' format.
        prefix (`str`): the component's name in diffusers' format.

    Raises:
        CheckpointError: no such files, or damaged ones.
        ConfigError: layers that have no adapters here.
        ShapeError: another rank or shape.
        NonFiniteError: NaN or infinity. The model is unchanged after any of these.

    Example:
        ```py
        import_adapter(pipe.unet, 0, "adapter-0")
        ```
    """
    ranks = _require(model, adapter, "peft")
    tensors, config = _read(Path(folder), prefix)
    layers, pairs = layers_by_name(model), {}
    foreign = sorted(key for key in tensors if not key.endswith((".lora_A.weight", ".lora_B.weight")))
    if foreign:
        raise ConfigError(f"Only plain LoRA pairs can be imported, but got {foreign[0]}: another kind of adapter.")
    require_pairs_alone(config)
    unknown = sorted({key.rpartition(".lora_")[0] for key in tensors} - set(ranks))
    if unknown:
        raise ConfigError(
            f"A LoRA for this hub may only have layers with adapters, but it has {len(unknown)} others "
            f"({unknown[0]}, …): not made for {type(model).__name__}."
        )
    for name, rank in ranks.items():
        bank = cast(AdapterBank, layers[name].adapters)
        down, up = (tensors.get(f"{name}.lora_{part}.weight") for part in "AB")
        if down is None and up is None:
            pairs[name] = (torch.zeros_like(bank.down[adapter]), torch.zeros_like(bank.up[adapter]))
            continue
        if down is None or up is None or down.shape != bank.down.shape[1:] or up.flatten(1).shape != bank.up.shape[1:]:
            actual = [tuple(part.shape) if part is not None else None for part in (down, up)]
            raise ShapeError(
                f"The adapter of `{name}` must have rank {rank} (shapes {tuple(bank.down.shape[1:])} and "
                f"{tuple(bank.up.shape[1:])}), but got {actual[0]} and {actual[1]}."
            )
        alpha = _for_layer(config, "alpha", name, config.get("lora_alpha", rank))
        scaling = alpha / (rank**0.5 if config.get("use_rslora") else rank)
        pairs[name] = (down.to(bank.down.dtype), (up.flatten(1) * scaling).to(bank.up.dtype))
        if not all(torch.isfinite(part).all() for part in pairs[name]):
            raise NonFiniteError(f"The adapter of `{name}` must be finite, but got NaN or infinity: damaged file.")
    with torch.no_grad():
        for name, (down, up) in pairs.items():
            bank = cast(AdapterBank, layers[name].adapters)
            bank.down[adapter].copy_(down)
            bank.up[adapter].copy_(up)
    if correction_of(model) is not None:
        detach_correction(model)
        logger.warning(
            "%s: the output correction was fitted to the model with its adapters as they were, and is taken off. "
            "`correct_output` fits one to the model as it is.",
            type(model).__name__,
        )


def _require(model: nn.Module, adapter: int, format: str) -> dict[str, int]:
    """Layers with adapters and their ranks, if the request makes sense."""
    plan = require_plan(model)
    refuse_merged(model, "Exchanging adapters")
    require_tensors(model, "given or asked for an adapter")
    if not 0 <= adapter < plan.num_adapters:
        raise ConfigError(f"`adapter` must lie in 0 … {plan.num_adapters - 1}, but got {adapter}.")
    if format not in FORMATS:
        raise ConfigError(f"`format` must be one of {', '.join(FORMATS)}, but got {format!r}.")
    return plan.rank_of()


def require_pairs_alone(said: Mapping, *, allowed: Collection[str] = ()) -> None:
    """Refuse a LoRA of which its pairs of factors are a part only.

    Args:
        said (`Mapping`): PEFT's config of it.
        allowed (`Collection[str]`): further keys that are taken care of.

    Raises:
        ConfigError: a value that means more, or a key that is not known here.
    """
    for key, value in said.items():
        if (
            key in _SAYS_OF_PAIRS
            or key in allowed
            or (value in _SAYS_NO_MORE[key] if key in _SAYS_NO_MORE else not value)
        ):
            continue
        raise ConfigError(
            f"A LoRA must be no more than pairs of factors, but its config says `{key}`: {value!r}. Merge it into the "
            f"float model with PEFT, or convert it there to a plain one."
        )


def _for_layer(config: Mapping, what: str, name: str, default: float) -> float:
    """A value of PEFT's `rank_pattern` or `alpha_pattern` for one layer."""
    return pattern_value(config.get(f"{what}_pattern") or {}, name, default)


def _read(folder: Path, prefix: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors by `<layer>.lora_A.weight`, and the LoRA's config."""
    peft, stock = folder / PEFT_FILE, folder / DIFFUSERS_FILE
    file = peft if peft.is_file() else stock
    if not file.is_file():
        raise CheckpointError(f"{folder} must hold {PEFT_FILE} or {DIFFUSERS_FILE}, but it holds neither.")
    head = PEFT_PREFIX if file == peft else f"{prefix}."
    try:
        with safe_open(file, framework="pt") as handle:
            tensors = {key.removeprefix(head): handle.get_tensor(key) for key in handle.keys()}
            metadata = handle.metadata() or {}
        if file == peft:
            return tensors, json.loads((folder / PEFT_CONFIG).read_text(encoding="utf-8"))
        record = json.loads(metadata.get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{folder} is no complete LoRA: {error}.") from error
    return tensors, {key.removeprefix(head): value for key, value in record.items()}

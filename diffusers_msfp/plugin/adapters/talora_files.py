"""Adapters beside the weights as files of their own: saved, loaded onto their base, taken off again.

A folder holds `talora_config.json` (see `talora.AdapterPlan`, and `digest`) and `talora.safetensors`, whose tensors
have the names that they have in the model.
"""

import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from safetensors.torch import save_file
from torch import Tensor, nn

from ...checkpoint.describe import WEIGHTS, read_config, weight_files
from ...checkpoint.digest import Digest, checking
from ...checkpoint.opening import opened
from ...compat.diffusers import offloaded_groups
from ...compat.torch import device_of
from ...compat.wrappers import seen_through, sees_through
from ...errors import CheckpointError, ConfigError, ShapeError, StateError
from ...layers import QuantLayer
from ...layers.convert import base_fingerprint, layers_by_name, require_tensors
from ...methods.correction.attach import attach_correction, detach_correction, set_aside
from ...methods.correction.table import COEFFICIENTS, CORRECTION, CorrectionTable, base_correction_of, correction_of
from ...methods.method import read_part
from ...methods.routes import ROUTER, require_full_strength, routing_of
from ...methods.talora import AdapterBank, AdapterPlan, RoutingTable
from ...methods.talora.adapters import CODES
from ...methods.talora.attach import (
    adapter_tensors,
    connect,
    disconnect,
    goes_with_adapters,
    plan_of,
    refuse_merged,
)
from ...sampling.observation import calibration_state
from ...sampling.timestep import require_timesteps
from ..config import MSFPConfig

logger = logging.getLogger(__name__)

CONFIG, TENSORS = "talora_config.json", "talora.safetensors"


def require_plan(model: nn.Module) -> AdapterPlan:
    """The model's timestep-aware adapters.

    Raises:
        StateError: it has none.
    """
    plan = plan_of(model)
    if plan is None:
        raise StateError(
            f"This {type(model).__name__} must have timestep-aware adapters, but it has none: load them with "
            f"`load_talora`, or fine-tune."
        )
    return plan


def require_storable(model: nn.Module) -> AdapterPlan:
    """The model's adapters, if they can be written without it; see `save_talora`."""
    plan = require_plan(model)
    refuse_merged(model, "Saving adapters without their model")
    require_full_strength(model, "Saving")
    require_tensors(model, "saved", changes=False)
    return plan


@sees_through
def save_talora(model: nn.Module, folder: str | Path) -> None:
    """Write a model's adapters without the model, with the correction of the output that was fitted with them.

    Raises:
        StateError: it has none, or they are disabled or scaled.
        UnsupportedError: they are merged into the weights.
    """
    plan, folder = require_storable(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: tensor.detach().contiguous() for name, tensor in adapter_tensors(model).items()}
    save_file(tensors, folder / TENSORS, metadata={"format": "pt"})
    record = plan.to_dict() | {"digest": Digest.of(tensors).to_dict()}
    (folder / CONFIG).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


@sees_through
def load_talora(model: nn.Module, source: str | Path, **hub: Any) -> None:
    """Put saved adapters beside the weights of the quantized model that they were trained for.

    A correction of the output that the model has was fitted without them, and rests until they are unloaded; one that
    was saved with them is put on the model.

    Args:
        model (`ModelMixin`): quantized and calibrated, without adapters.
        source (`str` or `Path`): folder or Hub id of saved adapters, or of a whole checkpoint that has some.
        **hub: for `snapshot_download`, e.g. `revision` and `token`.

    Raises:
        CheckpointError: damaged or incomplete files.
        ConfigError: adapters for another base.
        StateError: the model is observing, or has adapters already. It is unchanged after any of these.
    """
    _require_free(model)
    _prepared(model, _folder(source, **hub), source)()


def load_by_name(models: Mapping[str, nn.Module], source: str | Path, **hub: Any) -> None:
    """`load_talora` for the quantized denoisers of a pipeline: onto all for which there are adapters, or onto none.

    Args:
        models (`Mapping[str, nn.Module]`): by name. Of several the adapters lie in folders of their names.
        source (`str` or `Path`), **hub: see `load_talora`.

    Raises:
        CheckpointError: there are no folders of these names, and see `load_talora`.
    """
    for model in models.values():
        _require_free(model)
    folder = _folder(source, **hub)
    places = {name: folder / name for name in models if _holds_adapters(folder / name)}
    if not places and len(models) == 1:
        places = dict.fromkeys(models, folder)
    if not places:
        raise CheckpointError(
            f"Adapters for a pipeline with several quantized denoisers must lie in folders of their names "
            f"({', '.join(models)}), but {source} has none of these with adapters. Put each into its folder."
        )
    with seen_through(*(models[name] for name in places)):
        ready = [_prepared(models[name], place, source) for name, place in places.items()]
        for put in ready:  # only now are models changed
            put()


def _require_free(model: nn.Module) -> None:
    if routing_of(model) is not None:
        raise StateError("This model has timestep-aware adapters already. Call `unload_talora` first.")
    require_timesteps(model)
    require_tensors(model, "given adapters")
    if offloaded_groups(model) is not None:
        raise StateError(
            f"Adapters must be loaded before a model is offloaded by groups, none of which has them, but this "
            f"{type(model).__name__} is. Load it anew; it can be offloaded afterwards."
        )
    if calibration_state(model) == "observing":
        raise StateError("Adapters need a calibrated model, but this one observes: call `calibrate(pipe)` first.")


def _holds_adapters(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or bool((read_config(folder).get("quantization_config") or {}).get("adapters"))


def _prepared(model: nn.Module, folder: Path, source: str | Path) -> Callable[[], None]:
    """All that is read and checked; the function that is returned changes the model."""
    plan, tensors = _read(folder)
    if plan.placement != "side":
        raise ConfigError(
            f"{source} holds adapters that are merged into packed weights: there is nothing to load onto another "
            f"model. Load the whole pipeline from there."
        )
    layers = layers_by_name(model)
    unknown = sorted(set(plan.rank_of()) - set(layers))
    if unknown or plan.base != base_fingerprint(model):
        reason = f"it has no quantized layer `{unknown[0]}`" if unknown else "its packed weights or formats differ"
        raise ConfigError(
            f"Adapters fit only the quantized model that they were trained for, but {reason}. Load the checkpoint that "
            f"`finetune` started from."
        )
    taken = sorted(name for name in plan.rank_of() if layers[name].routing is not None)
    if taken:
        raise StateError(
            f"Layers have adapters or follow a set of timesteps, not both, but `{taken[0]}` would do both. Load the "
            f"checkpoint that `finetune` started from."
        )
    banks = {name: _bank(layers[name], name, rank, plan, tensors) for name, rank in plan.rank_of().items()}
    table = tensors.pop(f"{ROUTER}.table", None)
    if table is None:
        raise CheckpointError(f"{source} must hold the router's table (`{ROUTER}.table`), but it does not.")
    if tuple(table.shape) != (plan.groups, plan.num_timesteps):
        raise CheckpointError(
            f"The router's table must have shape {(plan.groups, plan.num_timesteps)}, but got {tuple(table.shape)}."
        )
    RoutingTable(table, plan.num_adapters)  # refuses a bad one before the model is touched
    correction = _correction(tensors)

    def put() -> None:
        before = correction_of(model)
        detach_correction(model)
        for name, bank in banks.items():
            layers[name].adapters = bank
        connect(model, plan, table.to(device_of(model)))
        set_aside(model, before)
        if correction is not None:
            attach_correction(model, correction.to(device_of(model)))

    return put


@sees_through
def unload_talora(model: nn.Module) -> None:
    """Take adapters beside the weights off; the model is bit for bit what it was without them.

    A correction of the output that was fitted with them goes too, and that of the model without them comes back.

    Raises:
        StateError: there are none.
        UnsupportedError: they are merged into the weights.
    """
    require_plan(model)
    refuse_merged(model, "Unloading")
    base = base_correction_of(model)
    if correction_of(model) is not None:
        detach_correction(model)
        logger.warning(
            "%s: the output correction was fitted to the model with its adapters, and is taken off with them.",
            type(model).__name__,
        )
    disconnect(model)
    if base is not None:
        device = device_of(model)
        attach_correction(model, base if device.type == "meta" else base.to(device))  # offloaded: in its own time


def _correction(tensors: Mapping[str, Tensor]) -> CorrectionTable | None:
    """The correction of the output among the tensors of adapters."""
    parts = {name: tensors.get(f"{CORRECTION}.{name}") for name in ("timesteps", *COEFFICIENTS)}
    known = [part for part in parts.values() if part is not None]
    if not known:
        return None
    if len(known) < len(parts):
        missing = next(name for name, part in parts.items() if part is None)
        raise CheckpointError(f"Adapters must hold `{CORRECTION}.{missing}`, but it is missing: incomplete file.")
    return CorrectionTable(*known)


def _bank(layer: QuantLayer, name: str, rank: int, plan: AdapterPlan, tensors: Mapping[str, Tensor]) -> AdapterBank:
    quantized = layer.input_format is not None
    bank = AdapterBank(layer.logical_shape, plan.num_adapters, rank, quantized, torch.float16, reads=plan.reads)
    for key, expected in bank.state_dict().items():
        value = tensors.get(f"{name}.adapters.{key}")
        if value is None:
            raise CheckpointError(f"The adapters of `{name}` must hold `{key}`, but it is missing: incomplete file.")
        if value.shape != expected.shape or value.dtype != expected.dtype:
            raise ShapeError(
                f"`{name}.adapters.{key}` must be {expected.dtype} of shape {tuple(expected.shape)} (rank {rank}), but "
                f"got {value.dtype} of shape {tuple(value.shape)}."
            )
    if f"{name}.adapters.{CODES}" in tensors and not bank.reads_codes:
        raise CheckpointError(
            f"The record must say that the adapters of `{name}` read codes, as the file does, but it says that they "
            f"read floats (`reads`): not of one checkpoint."
        )
    own = {key: tensors[f"{name}.adapters.{key}"].to(layer.packed_weight.device) for key in bank.state_dict()}
    bank.load_state_dict(own, assign=True)
    bank.requires_grad_(False)
    bank.check_values(name)
    return bank


def _folder(source: str | Path, **hub: Any) -> Path:
    path = Path(source)
    if path.is_dir():
        return path
    if path.exists() or str(source).count("/") != 1:
        raise ConfigError(f"{source} must be a folder or a Hub id like `user/adapters`, but it is neither.")
    names = (CONFIG, TENSORS, "config.json", f"{WEIGHTS}*.safetensors", f"{WEIGHTS}*.index.json")
    patterns = ["model_index.json", *names, *(f"*/{name}" for name in names)]  # of a pipeline or of a model alone
    return Path(snapshot_download(str(source), allow_patterns=patterns, **hub))


def _read(folder: Path) -> tuple[AdapterPlan, dict[str, Tensor]]:
    """Plan and tensors of a folder of adapters, or of a checkpoint that holds some."""
    if (folder / CONFIG).is_file():
        try:
            record = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        except ValueError as error:
            raise CheckpointError(f"{folder / CONFIG} must be JSON, but it is not ({error}).") from error
        files = [folder / TENSORS]
    else:
        parts = [folder, *sorted(p for p in folder.iterdir() if p.is_dir())]
        found = [(p, read_config(p).get("quantization_config") or {}) for p in parts]
        part, checkpoint = next(((p, r) for p, r in found if r.get("adapters")), (None, {}))
        if part is None:
            raise CheckpointError(f"{folder} must hold {CONFIG}, or a checkpoint with adapters, but it holds neither.")
        config = MSFPConfig.from_dict(checkpoint)
        kept = config.record.to_dict()
        record, files = kept["adapters"] | {"digest": kept.get("digest")}, weight_files(part)
    if not isinstance(record, Mapping):
        raise CheckpointError(f"{CONFIG} must be a JSON object, but got {type(record).__name__}.")
    tensors: dict[str, Tensor] = {}
    for file in files:
        with opened(file) as handle:
            tensors |= {key: handle.get_tensor(key) for key in handle.keys() if goes_with_adapters(key)}
    plan = read_part(AdapterPlan, "adapters", {key: value for key, value in record.items() if key != "digest"})
    if record.get("digest") is not None and checking():  # files of before version 2 have none
        Digest.from_dict(record["digest"]).check(tensors)
    return plan, tensors

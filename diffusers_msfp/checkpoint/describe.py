"""What a quantized checkpoint holds, read from its files alone."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from ..engines import tuning
from ..engines.choose import engine_named
from ..errors import CheckpointError
from ..layers import QuantLayer
from ..methods.method import parts
from ..results import Result, plain
from ..schemes import resolve
from .opening import opened
from .record import ModelRecord
from .stored_layer import StoredLayer

WEIGHTS = "diffusion_pytorch_model"
TRANSFORMERS_WEIGHTS = "model"
INDEX = f"{WEIGHTS}.safetensors.index.json"
_WEIGHTS_OF = re.compile(
    rf"(?:{WEIGHTS}|{TRANSFORMERS_WEIGHTS}|pytorch_model)(?:\.([\w-]+?))?(?:-\d{{5}}-of-\d{{5}})?(?:\.([\w-]+))?"
    r"\.(safetensors|bin)"
)
OBSERVING = "its input is being observed, which the reference does"


@dataclass(frozen=True, kw_only=True)
class LayerDescription(Result):
    """A stored layer.

    Args:
        name, weight_format (`str`), weight_bits (`int`): of the layer and its weight.
        group_size (`int`, *optional*): weights that share a multiplier of their channel's scale; None without groups.
        weight_scale_min, weight_scale_max (`float`, *optional*): over output channels; None for an empty layer.
        weight_rel_mse (`float`): error of the weight.
        input_format (`str`, *optional*): None if float, `"observing"` before calibration.
        input_signed (`bool`, *optional*), input_scale, input_zero_point, input_rel_mse (`float`, *optional*): of a
            quantized input; scales and zero points are lists where there are several.
        reads_residual (`bool`): it has the formats that its scheme has for residual sums, not for other inputs.
        engine (`str`): that `auto` would take on this machine's CPU.
        engine_refusals (`Mapping[str, str]`): those before it → why not.
        measured (`Mapping[str, Mapping[str, float]]`): what this machine has measured for layers of its size and
            formats, if anything: geometry, shape of the input and dtype → way of computing it → seconds.
        weight_bytes (`int`): of all banks.
    """

    name: str
    weight_format: str
    weight_bits: int
    group_size: int | None
    weight_scale_min: float | None
    weight_scale_max: float | None
    weight_rel_mse: float
    input_format: str | None
    input_signed: bool | None
    input_scale: float | list[float] | None
    input_zero_point: float | list[float] | None
    input_rel_mse: float | None
    reads_residual: bool
    engine: str
    engine_refusals: Mapping[str, str]
    measured: Mapping[str, Mapping[str, float]]
    weight_bytes: int


@dataclass(frozen=True, kw_only=True)
class ComponentDescription(Result):
    """A quantized component of a checkpoint.

    Args:
        scheme (`str`, *optional*), calibration_state (`str`, *optional*), format_version (`int`): as its config says.
        bytes_quantized (`int`): weight files.
        layers (`list[LayerDescription]`): in the record's order.
        parts (`Mapping[str, dict | None]`): what methods left, by key, which `to_dict` puts beside the fields:
            `adapters`: `placement`, `reads` (None for merged ones), `num_adapters` and the router's `intervals`
            (`[group][(first timestep, last timestep, adapter), …]`); `temporal`: see `TemporalPlan.summary`;
            `output_correction`: `timesteps`, `channels`, `bytes`.
    """

    scheme: str | None
    calibration_state: str | None
    format_version: int
    bytes_quantized: int
    layers: list[LayerDescription]
    parts: Mapping[str, dict | None]

    def to_dict(self) -> dict[str, Any]:
        """See `Result.to_dict`; what methods left stands beside the fields."""
        found = super().to_dict()
        return found | found.pop("parts")


@dataclass(frozen=True, kw_only=True)
class CheckpointDescription(Result):
    """What `describe_checkpoint` found.

    Args:
        components (`Mapping[str, ComponentDescription]`): by name; `.` is a component's own folder.
    """

    components: Mapping[str, ComponentDescription]

    def to_dict(self) -> dict[str, Any]:
        """Component → its description, see `Result.to_dict`."""
        return plain(self.components)


def component_dirs(path: Path) -> dict[str, Path]:
    """Folders of a checkpoint that hold a quantized model: name → folder; a component's own folder is called `.`."""
    folders = {".": path} | {p.name: p for p in sorted(path.iterdir()) if p.is_dir()} if path.is_dir() else {}
    found = {}
    for name, folder in folders.items():
        config = read_config(folder)
        if config.get("quantization_config", {}).get("quant_method") == "msfp":
            found[name] = folder
    if not found:
        raise CheckpointError(
            f"{path} must be the folder of an MSFP-quantized pipeline or model, but no config.json in it says "
            f"`quant_method: msfp`. Make one with `diffusers-msfp quantize`."
        )
    return found


def read_config(folder: Path, name: str = "config.json") -> dict:
    """A component's `config.json`, or another such file; empty if there is none."""
    file = folder / name
    if not file.is_file():
        return {}
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} must be JSON, but it is not ({error}).") from error
    return config if isinstance(config, dict) else {}


def config_of_origin(file: Path, origin: str | None) -> bytes:
    """A config's content as it is published: with this origin, or none, in place of where the model was loaded from."""
    config = read_config(file.parent, file.name)
    config.pop("_name_or_path", None)
    config |= {} if origin is None else {"_name_or_path": origin}
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()


def weights_by_variant(folder: Path) -> dict[str | None, list[Path]]:
    """Variant → weight files in a model's folder, safetensors where there are some; None stands for the plain ones."""
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if match := _WEIGHTS_OF.fullmatch(path.name):
            found.setdefault(match[1] or match[2], []).append(path)
    safe = {variant: [file for file in files if file.suffix == ".safetensors"] for variant, files in found.items()}
    return {variant: safe[variant] or files for variant, files in found.items()}


def weight_files(folder: Path, variant: str | None = None, *, variants: bool = True) -> list[Path]:
    """The weight files that a load of this component reads: one file, or its shards.

    Args:
        folder (`Path`): a model's.
        variant (`str`, *optional*): read it where the model has it, else the plain files, as diffusers does.
        variants (`bool`): where there are no plain files, take those of variants.
    """
    if variant is not None and (own := weights_by_variant(folder).get(variant)):
        return own
    for stem in (WEIGHTS, TRANSFORMERS_WEIGHTS):
        index = folder / f"{stem}.safetensors.index.json"
        whole = stem == TRANSFORMERS_WEIGHTS and (folder / f"{stem}.safetensors").is_file()  # read before an index
        if index.is_file() and not whole:
            try:
                names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
                files = sorted(folder / name for name in names)
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
                raise CheckpointError(f"{index} must be JSON with a `weight_map`, but it is not.") from error
            if elsewhere := [file for file in files if file.parent != folder or ".." in file.name]:
                raise CheckpointError(f"Weights must lie in the model's folder, but {index.name} names {elsewhere[0]}.")
            return files
        for suffix in ("safetensors", "bin"):
            single = folder / f"{stem}.{suffix}"
            shards = sorted(folder.glob(f"{stem}-?????-of-?????.{suffix}"))
            if single.is_file() or shards:
                return [single] if single.is_file() else shards
    return sorted(folder.glob(f"{WEIGHTS}*.safetensors")) if variants else []


def file_bytes(folder: Path, variant: str | None = None) -> int:
    """Size of a component's weights on disk."""
    return sum(file.stat().st_size for file in weight_files(folder, variant))


def describe_checkpoint(path: str | Path, variant: str | None = None) -> CheckpointDescription:
    """Layers of a quantized checkpoint with formats, scales and errors.

    Args:
        path (`str` or `Path`): folder of a pipeline or of one of its components.
        variant (`str`, *optional*): see `weight_files`.

    Raises:
        CheckpointError: no such checkpoint, or a damaged one.
    """
    described = {}
    for name, folder in component_dirs(Path(path)).items():
        try:
            described[name] = _describe_component(folder, variant)
        except (KeyError, TypeError) as error:
            raise CheckpointError(f"{folder} is no complete checkpoint: {error} is missing or malformed.") from error
    return CheckpointDescription(components=described)


def _describe_component(folder: Path, variant: str | None) -> ComponentDescription:
    config = read_config(folder)["quantization_config"]
    record = ModelRecord.from_dict(config)
    tensors, shapes = _small_tensors(folder, variant)
    layers, auto, adapters = [], engine_named("auto"), record.parts.get("adapters")
    summed = set() if adapters is None or adapters.reads == "float" else set(adapters.rank_of())
    for group in record.layers or ():
        for name in group.modules:
            fmt, read = group.weight_format, group.input_format
            scale = tensors[f"{name}.weight_scale"]
            rows, *_, row_bytes = shape = shapes[f"{name}.weight"]
            stored = StoredLayer.of(shape, scale.numel(), group, name in summed)
            engine, refusals = auto.choose(cast(QuantLayer, stored))
            candidates = resolve(name, config["scheme"], config.get("scheme_overrides") or {}, record.format_version)
            if group.observing:
                *others, engine = auto.engines
                refusals = {other.name: OBSERVING for other in others}
            layers.append(
                LayerDescription(
                    name=name,
                    weight_format=fmt.name,
                    weight_bits=fmt.bits,
                    group_size=group.group_size,
                    weight_scale_min=scale.min().item() if scale.numel() else None,
                    weight_scale_max=scale.max().item() if scale.numel() else None,
                    weight_rel_mse=tensors[f"{name}.weight_error"].item(),
                    input_format=group.input,
                    input_signed=read.signed if read else None,
                    input_scale=tensors[f"{name}.input_scale"].tolist() if read else None,
                    input_zero_point=tensors[f"{name}.input_zero_point"].tolist() if read else None,
                    input_rel_mse=tensors[f"{name}.input_error"].item() if read else None,
                    reads_residual=group.input in set(candidates.residual) - set(candidates.activation),
                    engine=engine.name,
                    engine_refusals=refusals,
                    measured=tuning.measured_for(stored.matrix_shape, fmt, read, group.group_size),
                    weight_bytes=rows * row_bytes,
                )
            )
    return ComponentDescription(
        scheme=config.get("scheme"),
        calibration_state=record.calibration.state if record.calibration else None,
        format_version=record.format_version,
        bytes_quantized=file_bytes(folder, variant),
        layers=layers,
        parts={
            part.key: part.describe(record.parts[part.key], tensors) if part.key in record.parts else None
            for part in parts()
            if part.describe is not None
        },
    )


def _small_tensors(folder: Path, variant: str | None) -> tuple[dict, dict]:
    """Scales, zero points and errors, and the shapes of the packed weights; packed weights are not read."""
    tensors, shapes = {}, {}
    for file in weight_files(folder, variant):
        with opened(file) as handle:
            for key in handle.keys():
                if key.endswith(".weight"):
                    shapes[key] = handle.get_slice(key).get_shape()
                elif key.rpartition(".")[2].startswith(("weight_", "input_", "table", "timesteps")):
                    tensors[key] = handle.get_tensor(key)
    return tensors, shapes

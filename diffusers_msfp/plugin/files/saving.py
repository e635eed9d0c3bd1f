"""What a quantized model writes into files: its own tensors, what each file says of itself, and the digest of all."""

import inspect
import json
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from huggingface_hub import HfApi
from safetensors import safe_open
from torch import Tensor, nn
from transformers.utils.hub import create_and_tag_model_card

from ...checkpoint.describe import TRANSFORMERS_WEIGHTS, WEIGHTS
from ...checkpoint.digest import Digest, checksum, dtype_name, recorded_digest
from ...checkpoint.record import ModelRecord
from ...compat.peft import has_adapters
from ...errors import ConfigError, UnsupportedError
from ...layers.convert import plain_name, quant_layers, require_tensors
from ...layers.stored import FORMATS_TENSOR, name_in_files
from ...methods.correction.table import base_correction_of
from ...methods.method import parts
from ...outputs import write_whole
from ...sampling.observation import require_finished
from ..config import MSFPConfig, config_of

logger = logging.getLogger(__name__)

_WRAPPED = ("base_layer", "original_module")
"""What PEFT's wrappers call the layer that was there before."""


def tensors_to_save(state_dict: Mapping[str, Any], config: MSFPConfig) -> dict[str, Any]:
    """The model alone, under the names of files, also while PEFT adapters are attached.

    Args:
        config (`MSFPConfig`): files of format version 1 do not say the layers' formats.

    Raises:
        ConfigError: tensors are offloaded.
    """
    own = {name_in_files(plain_name(key)): value for key, value in without_adapters(state_dict).items()}
    if config.format_version == 1:
        own = {key: value for key, value in own.items() if not key.endswith(f".{FORMATS_TENSOR}")}
    meta = [key for key, value in own.items() if value.is_meta]
    if meta:
        raise ConfigError(
            f"All tensors must be in memory to be saved, but {len(meta)} are offloaded ({meta[0]}, …). Load the "
            f"model without `device_map` and offloading, then save it."
        )
    return own


def without_adapters(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """What was there before adapters of any kind: PEFT's wrappers keep it under names of their own."""
    steps = {key: [(key[:i], key[i + 1 :].split(".")[0]) for i, c in enumerate(key) if c == "."] for key in state_dict}
    wrappers = {module_name for walk in steps.values() for module_name, child in walk if child in _WRAPPED}
    added = {key for key, walk in steps.items() if any(p in wrappers and c not in _WRAPPED for p, c in walk)}
    return {key: value for key, value in state_dict.items() if key not in added}


def file_metadata(config: MSFPConfig) -> dict[str, str]:
    """What each weight file says about itself."""
    return {"quant_method": config.quant_method.value, "format_version": str(config.format_version)}


def save_config(model: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """As `ModelMixin.save_config`, with the digest of what the model holds; variants in the same folder keep theirs.

    Raises:
        ConfigError: tensors are offloaded; nothing is written then.
    """
    config = config_of(model)
    _raise_version(model)
    record = ModelRecord.of(model, config.format_version)
    if config.format_version > 1:
        made = Digest.of(tensors_to_save(model.state_dict(), config))
        record = record.with_digest(made.joined(recorded_digest(save_directory)))
    save_record(model, save_directory, record, *args, **kwargs)


def _raise_version(model: nn.Module) -> None:
    """Let a model that was loaded from an older format version be saved as the one that knows all that it has."""
    config = config_of(model)
    needed = [part.since(record) for part in parts() if (record := part.record_of(model)) is not None]
    needed += [2 for _, layer in quant_layers(model) if layer.group_size is not None]
    config.format_version = max(config.format_version, *needed, 1)


def save_record(model: nn.Module, save_directory: str | Path, record: ModelRecord, *args: Any, **kwargs: Any) -> None:
    """As `ModelMixin.save_config`, with this record beside the request."""
    with recorded(model, record):
        cast(Any, type(model)).save_config(model, save_directory, *args, **kwargs)


@contextmanager
def recorded(model: nn.Module, record: ModelRecord) -> Iterator[None]:
    """While this lasts, a model's config has a record, which libraries write."""
    config = config_of(model)
    config.record = record
    try:
        yield
    finally:
        config.record = None


def save_pretrained(model: nn.Module, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
    """As the model's own method.

    Raises:
        UnsupportedError: other files than safetensors are asked for; nothing is written then.
        StateError: quantizing it was stopped, or something on it would not be as it is after loading; nor then.
    """
    for part in parts():
        if part.require_whole is not None:
            part.require_whole(model)
    require_finished(model, "saved")
    require_tensors(model, "saved", changes=False)
    own: Any = type(model)
    given = inspect.signature(own.save_pretrained).bind(model, save_directory, *args, **kwargs).arguments
    given |= given.get("kwargs", {})
    others = [name for name in ("use_flashpack", "distributed_checkpoint") if given.get(name)]
    if given.get("safe_serialization") is False or others:
        raise UnsupportedError(
            f"Packed weights are stored as safetensors, which can be checked when they are loaded, but the quantized "
            f"{type(model).__name__} was to be saved as something else. Leave `safe_serialization`, `use_flashpack` "
            f"and `distributed_checkpoint` out."
        )
    if base_correction_of(model) is not None:
        logger.warning(
            "%s: the output correction of the model without its adapters rests, and is not saved. Once they are "
            "unloaded from what is saved, `correct_output` fits it again.",
            type(model).__name__,
        )
    arguments = {key: value for key, value in given.items() if key not in ("self", "save_directory", "kwargs")}
    if not hasattr(own, "save_config"):
        _save_transformer(model, Path(save_directory), arguments)
        return
    folder = str(save_directory)  # diffusers cannot push from a `Path`
    for upload in (False, True) if given.get("push_to_hub") else (False,):  # which uploads all that lies there
        own.save_pretrained(model, folder, **arguments | {"push_to_hub": upload})  # calls our `save_config`
        if given.get("is_main_process", True):
            _remove_former(Path(save_directory), WEIGHTS, given.get("variant"))


def _save_transformer(model: nn.Module, folder: Path, arguments: dict[str, Any]) -> None:
    """As `PreTrainedModel.save_pretrained`, which may give tensors other names: digested as they lie in the files.

    Until config.json has the digest, the folder counts as one that was not saved to its end.

    Args:
        arguments (`dict[str, Any]`): of that method but for the folder, by their names.
    """
    before = recorded_digest(folder)
    _raise_version(model)
    upload = arguments.pop("push_to_hub", False)
    hub = {key: arguments.pop(key) for key in ("repo_id", "commit_message", "private", "create_pr") if key in arguments}
    times = _times(folder)
    with recorded(model, ModelRecord.of(model, config_of(model).format_version)):
        cast(Any, type(model)).save_pretrained(model, folder, **arguments)
    if not arguments.get("is_main_process", True):
        return
    removed: list[str] = []
    if not has_adapters(model):  # then these alone are saved
        variant = arguments.get("variant")
        removed = _remove_former(folder, TRANSFORMERS_WEIGHTS, variant)
        if config_of(model).format_version > 1:
            files = files_of(folder, TRANSFORMERS_WEIGHTS, variant)
            write_digest(folder, digest_of_files(files).joined(before))
    if upload:
        token = arguments.get("token")
        api, name, private = HfApi(token=token), hub.pop("repo_id", folder.name), hub.pop("private", None)
        repo_id = api.create_repo(name, private=private, exist_ok=True).repo_id
        create_and_tag_model_card(repo_id, cast(Any, model).model_tags, token=token).save(folder / "README.md")
        changed = [name for name, time in _times(folder).items() if times.get(name) != time]
        hub["commit_message"] = hub.get("commit_message") or f"Upload {type(model).__name__}"
        api.upload_folder(
            repo_id=repo_id, folder_path=folder, allow_patterns=changed, delete_patterns=removed or None, **hub
        )


def _times(folder: Path) -> dict[str, int]:
    """When each file of a folder was written; none of one that is not there yet."""
    return {file.name: file.stat().st_mtime_ns for file in folder.glob("*") if file.is_file()}


def _remove_former(folder: Path, stem: str, variant: str | None) -> list[str]:
    """Of weights in one file and in shards, keep the newest: libraries leave a file, or an index, and then load that.

    Returns:
        `list[str]`: names of what is gone. Former shards are taken away by the libraries themselves.
    """
    between = f".{variant}" if variant else ""
    whole = f"{stem}{between}.safetensors"
    indices = {f"{stem}.safetensors.index{between}.json", f"{stem}.safetensors{between}.index.json"}
    files = {file.name for file in files_of(folder, stem, variant)}
    former = indices if files == {whole} else {whole}
    removed = sorted(name for name in former if (folder / name).is_file())
    for name in removed:
        (folder / name).unlink()
    return removed


def files_of(folder: Path, stem: str, variant: str | None = None) -> list[Path]:
    """A model's weight files of one variant, whole or in shards."""
    name = re.compile(rf"{re.escape(f'{stem}.{variant}' if variant else stem)}(-\d{{5}}-of-\d{{5}})?\.safetensors")
    return sorted(path for path in folder.iterdir() if name.fullmatch(path.name))


def digest_of_files(files: list[Path]) -> Digest:
    """Of the tensors in safetensors files."""
    sums = {}
    for file in files:
        with safe_open(file, framework="pt") as handle:
            for name in handle.keys():
                tensor: Tensor = handle.get_tensor(name)
                sums[name, dtype_name(tensor)] = checksum(name, tensor)
    return Digest(sums)


def write_digest(folder: Path, digest: Digest, record: Mapping | None = None) -> None:
    """Put a digest into a folder's `config.json`, in one step.

    Args:
        record (`Mapping`, *optional*): instead of the one that is there.
    """
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["quantization_config"] = dict(record or config["quantization_config"]) | {"digest": digest.to_dict()}
    write_whole(file, json.dumps(config, indent=2, sort_keys=True) + "\n")

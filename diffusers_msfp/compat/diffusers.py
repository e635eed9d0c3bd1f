"""Internals of diffusers (all in 0.40 to 0.42)."""

import copy
import inspect
import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from diffusers import DiffusionPipeline
from diffusers.models.modeling_utils import no_init_weights  # float models on the meta device, without drawing weights
from diffusers.quantizers import auto
from torch import nn

__all__ = [
    "Scheduler",
    "checkpointing",
    "components_being_loaded",
    "execution_device",
    "forget_widened_weights",
    "in_single_file_pipeline",
    "keep_labels",
    "kept_in_float32",
    "labels_by_name",
    "no_init_weights",
    "offloaded_groups",
    "only_offloads",
    "pipeline_being_saved",
    "progress_bar_config",
    "quantization_tables",
    "rename_old_keys",
    "saves_averages",
    "scheduler_as_set",
    "set_checkpointing",
    "set_config",
    "set_progress_bar_config",
    "single_file_origin",
    "single_file_part",
    "single_file_tensors",
    "source_of",
    "widened_weights",
]

Scheduler: TypeAlias = Any
"""A scheduler of diffusers; its classes share no base that declares what is used of them."""


def quantization_tables() -> tuple[dict, dict]:
    """Method → quantizer, and method → config; a third-party quantizer can only be entered here."""
    return auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING


def components_being_loaded() -> dict | None:
    """The components of the pipeline that `from_pretrained` is loading right now: name → `[library, class]`.

    A pipeline's config is asked for one component at a time and never told which there are; only the loader's own frame
    knows. Where that frame looks different (another version of diffusers), None.
    """
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "from_pretrained":
        frame = frame.f_back
    components = frame.f_locals.get("init_dict") if frame is not None else None
    return dict(components) if isinstance(components, Mapping) else None


def pipeline_being_saved() -> DiffusionPipeline | None:
    """The pipeline that is saving its components right now, which are not told; its config it writes after them."""
    frame = inspect.currentframe()
    while frame is not None:
        owner = frame.f_locals.get("self") if frame.f_code.co_name == "save_pretrained" else None
        if isinstance(owner, DiffusionPipeline):
            return owner
        frame = frame.f_back
    return None


def labels_by_name(pipe: object) -> dict[str, int]:
    """Class labels by name, as `DiTPipeline` has them of its `id2label`; empty where a pipeline has none."""
    named = getattr(pipe, "labels", None)
    return dict(named) if isinstance(named, Mapping) else {}


def keep_labels(pipe: DiffusionPipeline | None) -> None:
    """Have `save_pretrained` write the names of a pipeline's labels, which diffusers reads but does not keep."""
    named = labels_by_name(pipe)
    if pipe is not None and named and not pipe.config.get("id2label"):
        names: dict[str, list[str]] = {}
        for name, label in named.items():
            names.setdefault(str(label), []).append(name)
        pipe.register_to_config(id2label={label: ", ".join(found) for label, found in names.items()})


def progress_bar_config(pipe: DiffusionPipeline) -> dict:
    """What `set_progress_bar_config` was last called with; there is no getter."""
    return dict(getattr(pipe, "_progress_bar_config", {}))


def set_progress_bar_config(pipe: Any, config: Mapping) -> None:
    """Replace it; pipelines that are combined override the public method, and one of them turns on offloading there."""
    pipe._progress_bar_config = dict(config)


def rename_old_keys(model: Any, names: dict) -> None:
    """Give attention weights of old checkpoints their new names, in place, as loading does it."""
    model._fix_state_dict_keys_on_load(names)


def saves_averages() -> bool:
    """Whether the caller of the calling function is `EMAModel.save_pretrained`, which makes a model of a config."""
    caller = sys._getframe(2)
    return caller.f_code.co_name == "save_pretrained" and type(caller.f_locals.get("self")).__name__ == "EMAModel"


def execution_device(pipe: object) -> torch.device | None:
    """Where a pipeline computes while parts of it are offloaded; None where it does not say."""
    return getattr(pipe, "_execution_device", None)


def offloaded_groups(model: nn.Module) -> str | None:
    """Where `enable_group_offload` keeps a model's tensors between calls: `"disk"`, `"pinned"` copies, or `"memory"`.

    None where it does not. What is on disk has only room in memory, with anything in it; pinned copies overwrite what
    is written to the tensors themselves.
    """
    registries = (vars(module).get("_diffusers_hook") for module in model.modules())
    hooks = [registry.get_hook("group_offloading") for registry in registries if registry is not None]
    groups = [hook.group for hook in hooks if hook is not None]
    if any(group.offload_to_disk_path is not None for group in groups):
        return "disk"
    return "pinned" if any(group.stream is not None for group in groups) else "memory" if groups else None


def only_offloads(module: nn.Module) -> bool:
    """Whether a module's `forward` is its class's with nothing but hooks of group offload around."""
    registry = vars(module).get("_diffusers_hook")
    if registry is None or not registry.hooks or not registry.hooks.keys() <= _OFFLOADING:
        return False
    return getattr(registry._fn_refs[0].forward, "__func__", None) is type(module).forward


_OFFLOADING = {"group_offloading", "lazy_prefetch_group_offloading", "layer_execution_tracker"}


def checkpointing(module: nn.Module) -> Callable | None:
    """What a module calls its parts by while it computes activations anew for their gradients: `(part, *args)`."""
    on = getattr(module, "gradient_checkpointing", False)
    return getattr(module, "_gradient_checkpointing_func", None) if on else None


def set_checkpointing(module: Any, function: Callable) -> None:
    """Let it call them by another function."""
    module._gradient_checkpointing_func = function


def kept_in_float32(model: nn.Module) -> frozenset[str]:
    """Names of modules whose weights a model of diffusers or transformers keeps in float32."""
    return frozenset(getattr(model, "_keep_in_fp32_modules", None) or ())


def widened_weights(model: nn.Module) -> dict:
    """Weights for which a control LoRA of Flux has just put wider layers in place, by name."""
    return dict(getattr(model, "_overwritten_params", None) or {})


def forget_widened_weights(model: Any) -> None:
    """Let the pipeline believe that it has widened nothing."""
    del model._overwritten_params


def source_of(thing: object) -> str | None:
    """The code of a pipeline's class, module or method; None where there is none to read, as in a frozen program."""
    try:
        return inspect.getsource(cast(Any, thing))
    except (OSError, TypeError):
        return None


def set_config(model: Any, config: Mapping) -> None:
    """Replace a model's config; `register_to_config` can add, but not remove."""
    before = model._internal_dict
    model._internal_dict = type(before)(dict(config))
    for name in before.keys() & config.keys():
        since = getattr(before, name, before[name])  # saving adds entries that are no attributes
        if since is not before[name]:  # IP-Adapters set attributes that are no entries
            setattr(model._internal_dict, name, since)


def single_file_origin(path: Path) -> str:
    """The Hub id of the pipeline whose layout a single file has.

    Raises:
        KeyError, ValueError, OSError: as diffusers raises them for a file that it does not know.
    """
    from diffusers.loaders.single_file_utils import fetch_diffusers_config, load_single_file_checkpoint

    return fetch_diffusers_config(load_single_file_checkpoint(str(path)))["pretrained_model_name_or_path"]


def single_file_tensors(cls: Any, path: Path, config: Mapping) -> dict[str, str | torch.Tensor] | None:
    """A model's tensors in a single file, by the model's own names: each as its name in the file.

    Args:
        cls (`type[ModelMixin]`), config (`Mapping`): the model.
        path (`Path`): the file, in the original layout or in diffusers' own.

    Returns:
        `dict`: a tensor itself where diffusers' mapping makes it of others, or the file is a pickle; None for a class
        that diffusers does not read from single files.

    Raises:
        KeyError, ValueError, OSError, …: as diffusers raises them for a file that it does not know.
    """
    from accelerate import init_empty_weights
    from diffusers.loaders import single_file_model
    from diffusers.loaders.single_file_utils import load_single_file_checkpoint

    table: Any = single_file_model.SINGLE_FILE_LOADABLE_CLASSES
    name = single_file_model._get_single_file_loadable_mapping_class(cls)
    if name is None:
        return None
    checkpoint = load_single_file_checkpoint(str(path))
    original = dict(checkpoint)
    with no_init_weights(), init_empty_weights():
        own = cls.from_config(config).state_dict()
    if own.keys() == checkpoint.keys():
        found = checkpoint
    else:
        mapping = table[name]["checkpoint_mapping_fn"]
        found = mapping(config=dict(config), checkpoint=checkpoint)
    keys = {id(value): key for key, value in original.items()} if path.suffix == ".safetensors" else {}
    return {key: keys.get(id(value), value) for key, value in found.items() if value is not None}


def single_file_part(error: Exception) -> str | None:
    """The component that `from_single_file` misses in a file; None for another error."""
    found = re.search(r"^(\w+) = \w+\.from_pretrained", str(error), re.MULTILINE)
    return found[1] if type(error).__name__ == "SingleFileComponentError" and found else None


def in_single_file_pipeline() -> bool:
    """Whether a pipeline's `from_single_file` is loading a model right now, which no model is told."""
    frame = inspect.currentframe()
    while frame is not None and frame.f_code.co_name != "load_single_file_sub_model":
        frame = frame.f_back
    return frame is not None


def scheduler_as_set(scheduler: Scheduler, **changes: Any) -> Scheduler:
    """A copy of a scheduler on the CPU, with the timesteps and sigmas that a pipeline has set, before its first step.

    Args:
        scheduler (`SchedulerMixin`): not changed.
        **changes: of its settings.
    """
    copied = copy.deepcopy(scheduler)
    copied.register_to_config(**changes)
    state = vars(copied)
    state.update({name: value for name, value in changes.items() if name in state})
    state.update({"_step_index": None} if "_step_index" in state else {})
    state.update({name: value.cpu() for name, value in state.items() if isinstance(value, torch.Tensor)})
    return copied

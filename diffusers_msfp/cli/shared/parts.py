"""What of a folder or a single file is to be quantized: streams of weights still unread, and what is loaded first."""

from collections.abc import Collection
from pathlib import Path
from typing import Any, cast

import diffusers
from diffusers import ControlNetModel, DiffusionPipeline, ModelMixin
from torch import nn

from ...checkpoint.describe import read_config
from ...checkpoint.tensor_files import TensorFile
from ...compat.diffusers import single_file_origin, single_file_tensors
from ...errors import ConfigError
from ...plugin.components import class_named
from ...plugin.config import MSFPConfig
from ...plugin.files.streaming import StreamedModel
from ...plugin.quantize import refuse_several
from .load import SourceError, load_pipeline, open_component, reading_single_file

Parts = tuple[dict[str, StreamedModel], list[str]]
"""Models of diffusers by name, a model on its own called `.`; and names of those that are quantized once loaded."""


def teacher_beside(
    loaded: DiffusionPipeline, quantized: Collection[str], source: str, config: str | None, variant: str | None
) -> DiffusionPipeline:
    """The float original of a quantized pipeline; what both leave alone, such as an autoencoder, is there once.

    Args:
        loaded (`DiffusionPipeline`): quantized.
        quantized (`Collection[str]`): names of its quantized components.
        source, config, variant: see `load_pipeline`.
    """
    models = {name: part for name, part in loaded.components.items() if isinstance(part, nn.Module)}
    same = {name: part for name, part in models.items() if name not in quantized}
    return load_pipeline(source, config=config, variant=variant, **same)


def parts_of(
    path: Path, request: MSFPConfig, max_shard_size: int | str, variant: str | None, config: str | None
) -> Parts:
    """What a config selects.

    Args:
        path (`Path`): folder of a pipeline or of one model, or a single file.
        request (`MSFPConfig`): what to quantize.
        max_shard_size (`int` or `str`), variant (`str`, *optional*): see `quantize`.
        config (`str`, *optional*): folder or Hub id with the configs of a single file.

    Raises:
        ConfigError: nothing to quantize.
        SourceError: it cannot be read.
    """
    if path.is_file():
        with reading_single_file(path):
            return _of_file(path, request, max_shard_size, config)
    index = read_config(path, "model_index.json")
    names = _chosen(index, path, request)
    encoders = [name for name in names if index and index[name][0] == "transformers"]
    folders = {name: path / name for name in names if name not in encoders}
    streams = {name: open_component(location, request, max_shard_size, variant) for name, location in folders.items()}
    return streams, encoders


def _chosen(index: dict, path: Path, request: MSFPConfig) -> list[str]:
    """Names of the components that a config selects; `.` for a model alone, which has no index."""
    if not index:
        if request.components_to_quantize:
            raise ConfigError(f"`components` selects parts of a pipeline, but {path} is a single model.")
        return ["."]
    listed = {name: part for name, part in index.items() if isinstance(part, list) and part[0] is not None}
    present = {name: class_named(part) for name, part in listed.items()}
    names = request.choose_components(present, str(index.get("_class_name")))
    for name in names:
        if "Multi" in index[name][1]:
            refuse_several(name, index[name][1], present)
    return names


def _of_file(path: Path, request: MSFPConfig, max_shard_size: int | str, config: str | None) -> Parts:
    where = single_file_origin(path) if config is None else config
    index = _index(where)
    streams: dict[str, StreamedModel] = {}
    others = []
    for name in _chosen(index, path, request):
        model_config: Any = None
        if name == ".":
            model_config = ControlNetModel.load_config(where)
            cls = getattr(diffusers, str(model_config.get("_class_name")), None)
        else:
            cls = class_named(index[name])
        if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
            if name == ".":
                raise SourceError(f"{where} must hold the config of a model of diffusers, but it names {cls!r}.")
            others.append(name)
            continue
        model_config = model_config or cast(Any, cls).load_config(where, subfolder=name)
        tensors = single_file_tensors(cls, path, model_config)
        if tensors is None:
            others.append(name)
            continue
        if not tensors:
            raise SourceError(f"{path} must hold the weights of {cls.__name__}, but none of its tensors is one.")
        stored = TensorFile(path, tensors)
        streams[name] = StreamedModel(cls, model_config, stored, [path], request, max_shard_size)
    return streams, others


def _index(where: str) -> dict:
    """A pipeline's index in a folder or on the Hub; empty for a model's own folder."""
    folder = Path(where)
    if folder.is_dir():
        index = read_config(folder, "model_index.json")
        if not index and not read_config(folder):
            raise SourceError(
                f"`--config` must be a folder with model_index.json or a model's config.json, but {where} has neither."
            )
        return index
    try:
        return dict(cast(Any, DiffusionPipeline.load_config(where)))
    except OSError:
        ControlNetModel.load_config(where)
        return {}

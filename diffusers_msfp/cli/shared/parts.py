"""What of a float checkpoint is to be quantized, and by which road: from file to file, or while it is loaded."""

from pathlib import Path

from diffusers import DiffusionPipeline, ModelMixin

from ...checkpoint.describe import read_config
from ...errors import ConfigError
from ...plugin.components import class_named
from ...plugin.config import MSFPConfig
from ...plugin.files.streaming import StreamedModel
from ...plugin.quantize import components_of, refuse_several
from .load import open_component


def parts_to_quantize(
    path: Path,
    loaded: DiffusionPipeline | None,
    request: MSFPConfig,
    max_shard_size: int | str,
    variant: str | None,
) -> tuple[dict[str, StreamedModel], list[str]]:
    """What is to be quantized: diffusers' components by name, or a model on its own, called `.`; and transformers'."""
    if loaded is not None:
        found = components_of(loaded, request)
        streams = {
            name: StreamedModel(type(model), model.config, model.state_dict(), [path], request, max_shard_size)
            for name, model in found.items()
            if isinstance(model, ModelMixin)
        }
        return streams, [name for name in found if name not in streams]
    index = read_config(path, "model_index.json")
    if index:
        listed = {name: part for name, part in index.items() if isinstance(part, list) and part[0] is not None}
        present = {name: class_named(part) for name, part in listed.items()}
        names = request.choose_components(present, str(index.get("_class_name")))
    elif request.components_to_quantize:
        raise ConfigError(f"`components` selects parts of a pipeline, but {path} is a single model.")
    else:
        names = ["."]
    for name in names if index else ():
        if "Multi" in index[name][1]:
            refuse_several(name, index[name][1], present)
    encoders = [name for name in names if index and index[name][0] == "transformers"]
    folders = {name: path / name for name in names if name not in encoders}
    streams = {name: open_component(location, request, max_shard_size, variant) for name, location in folders.items()}
    return streams, encoders

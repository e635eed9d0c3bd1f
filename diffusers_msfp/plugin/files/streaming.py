"""Quantize a model from file to file: in memory is one layer at a time.

A scheme says how many bits each layer gets, so every packed tensor has its place in the output before the search
begins. Layers are written as they come, and a journal beside the output says which are there: a run that was killed
goes on with the next one.
"""

import logging
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import Tensor

from ...checkpoint.digest import Digest, dtype_name
from ...checkpoint.journal import Journal
from ...checkpoint.record import ModelRecord
from ...checkpoint.tensor_files import MAX_SHARD_SIZE, TensorFolder, TensorLayout
from ...compat.diffusers import no_init_weights, rename_old_keys
from ...errors import CheckpointError, ConfigError
from ...formats import FORMATS
from ...layers import QUANT_LAYERS, QuantLayer
from ...layers.convert import quant_layers
from ...layers.skeleton import OBSERVING, LayerGroup, convert_skeleton
from ...layers.stored import FORMATS_TENSOR, name_in_files
from ...results import OnProgress
from ..config import MSFPConfig
from ..quantizer import MSFPQuantizer
from .saving import file_metadata, save_record

logger = logging.getLogger(__name__)


class StreamedModel:
    """A float model on its way from stored tensors to a packed checkpoint.

    Args:
        cls (`type[ModelMixin]`), model_config (`Mapping`): what model it is.
        tensors (`Mapping[str, Tensor]`): its weights, read one by one.
        sources (`Sequence[Path]`): the files they come from.
        config (`MSFPConfig`): not changed.
        max_shard_size (`int` or `str`): of the output, as in `save_pretrained`.

    Attributes:
        model (`ModelMixin`): with quantized layers on the meta device; its formats are right after `write`.

    Raises:
        ConfigError: see `Conversion.plan`; a scheme whose formats for one layer differ in width.
        CheckpointError: tensors are missing, or have other shapes than the model's.
    """

    def __init__(
        self,
        cls: type[ModelMixin],
        model_config: Mapping,
        tensors: Mapping[str, Tensor],
        sources: Sequence[Path],
        config: MSFPConfig,
        max_shard_size: int | str = MAX_SHARD_SIZE,
    ) -> None:
        with no_init_weights(), init_empty_weights():
            self.model = cast(Any, cls).from_config(model_config).eval()
        self._tensors, self._names = tensors, _stored_names(self.model, tensors)
        config = config.without_record()
        self._plan = config.plan(self.model)
        self._floats = {name: self.model.get_submodule(name) for name in self._plan.layers}
        for name, scheme in self._plan.layers.items():
            if len({FORMATS[fmt].bits for fmt in scheme.weight}) > 1:
                raise ConfigError(f"Formats of one layer must be equally wide, but got {scheme.weight} for `{name}`.")
            group = LayerGroup(scheme.weight[0], OBSERVING if scheme.activation else None, (name,), scheme.group_size)
            convert_skeleton(self.model, [group], self._plan.layers)
            layer = self.model.get_submodule(name)
            if layer.observing:
                layer.observation.sample = layer.observation.sample.to("meta")
        MSFPQuantizer(config, pre_quantized=True).attach(self.model)
        self._state = _with_formats(self.model)
        self._layout = TensorLayout(self._state, file_metadata(config), max_shard_size)
        self._identity = {
            "arguments": config.to_dict() | {"max_shard_size": max_shard_size},
            "source files": [[str(p.resolve()), p.stat().st_size, p.stat().st_mtime_ns] for p in sources],
        }

    @property
    def source_bytes(self) -> int:
        """Size of the float weights as they are stored."""
        return sum(self._tensors[name].nbytes for name in set(self._names.values()) & set(self._tensors))

    @classmethod
    def from_folder(
        cls, model_class: type[ModelMixin], folder: Path, *arguments: Any, variant: str | None = None, **named: Any
    ) -> "StreamedModel":
        """A model that lies in a folder, of `variant` where it has that; arguments as above."""
        tensors = TensorFolder(folder, variant)
        sources = [folder / "config.json", *tensors.files]
        streamed = cls(model_class, cast(Any, model_class).load_config(folder), tensors, sources, *arguments, **named)
        streamed.model.register_to_config(_name_or_path=str(folder))
        return streamed

    def write(self, folder: Path, on_progress: OnProgress | None = None) -> None:
        """Quantize and write the checkpoint, or what is not there yet.

        Args:
            folder (`Path`): where the checkpoint grows; the journal is a file beside it, `<folder>.jsonl`. What an
                earlier run with the same arguments and source files has written is kept, as far as its checksums are
                right; what another run has left is removed.
            on_progress (`OnProgress`, *optional*): called with (done, total) after each layer.

        Raises:
            NonFiniteError: a weight holds NaN or infinity.
        """
        journal = Journal(folder.parent / f"{folder.name}.jsonl", self._identity)
        if journal.differs:
            logger.warning("%s was left by a run with other %s: starting anew.", folder, " and ".join(journal.differs))
            shutil.rmtree(folder, ignore_errors=True)
        self._layout.create(folder)
        module_names: dict[str, list[str]] = {}
        for name in self._state:
            module_names.setdefault(name.rpartition(".")[0], []).append(name)
        done = {
            entry["place"]: entry
            for entry in journal.entries
            if self._layout.checksums(folder, module_names[entry["place"]]) == entry["checksums"]
        }
        journal.keep(list(done.values()))
        layers = {
            module_name: module
            for module_name in module_names
            if isinstance(module := self.model.get_submodule(module_name), QuantLayer)
        }
        if done:
            found = len(done.keys() & layers.keys())
            logger.warning("Going on after %d of %d layers, found in %s.", found, len(layers), folder)
        self._plan.report(self.model)
        finished = 0
        for module_name, names in module_names.items():
            layer = layers.get(module_name)
            if module_name not in done:
                done[module_name] = self._write_module(folder, module_name, names, layer)
                journal.add(done[module_name])
            if layer is not None:
                layer.weight_format = FORMATS[done[module_name]["format"]]
                finished += 1
                if on_progress is not None:
                    on_progress(finished, len(layers))
        self._layout.finish(folder)
        sums = {name: value for entry in done.values() for name, value in entry["checksums"].items()}
        digest = Digest({(name, dtype_name(self._state[name])): value for name, value in sums.items()})
        save_record(self.model, folder, ModelRecord.of(self.model).with_digest(digest))

    def load(self, folder: Path) -> ModelMixin:
        """The written model; it remembers the folder of the float one as its own, not one that is moved later."""
        model = type(self.model).from_pretrained(folder)
        if (origin := self.model.config.get("_name_or_path")) is not None:
            model.register_to_config(_name_or_path=origin)
        return model

    def _write_module(self, folder: Path, module_name: str, names: Sequence[str], empty: QuantLayer | None) -> dict:
        """Write one module's own tensors; its entry in the journal."""
        packed, chosen = {}, None
        if empty is not None:
            module = self._floats[empty.module_name]
            weight = self._read(f"{empty.module_name}.weight", module.weight)
            layer = QUANT_LAYERS[type(module)].from_float(
                module, empty.module_name, self._plan.layers[empty.module_name], weight
            )
            own = layer.state_dict(prefix=f"{module_name}.")
            packed = {name_in_files(name): tensor for name, tensor in own.items() if not tensor.is_meta}
            chosen = layer.weight_format.name
        tensors = {name: packed[name] if name in packed else self._read(name, self._state[name]) for name in names}
        return {"place": module_name, "checksums": self._layout.write(folder, tensors), "format": chosen}

    def _read(self, name: str, like: Tensor) -> Tensor:
        """A stored tensor in the model's dtype; a buffer that is not stored is as the model made it."""
        return self._tensors[self._names[name]].to(like.dtype) if name in self._names else like


def _with_formats(model: ModelMixin) -> dict[str, Tensor]:
    """The state of a model without weights, as files have it, with room for formats, which the search will choose."""
    layers, state, before = dict(quant_layers(model)), {}, ""
    for key, value in [*model.state_dict().items(), ("", None)]:
        module_name = key.rpartition(".")[0]
        if module_name != before and before in layers:
            state[f"{before}.{FORMATS_TENSOR}"] = layers[before].formats_tensor()
        if key:
            state[name_in_files(key)] = value
        before = module_name
    return state


def _stored_names(model: ModelMixin, tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """What the model's tensors are called where they are stored."""
    names = {name: name for name in tensors}
    rename_old_keys(model, names)  # of attention blocks, as old checkpoints call them
    for name, expected in model.state_dict().items():
        if name not in names:
            if expected.is_meta:
                raise CheckpointError(f"The weights of {type(model).__name__} must hold `{name}`, but they do not.")
            continue
        shape = tensors[names[name]].shape
        if shape != expected.shape:
            raise CheckpointError(
                f"`{name}` of {type(model).__name__} must have shape {tuple(expected.shape)}, but got {tuple(shape)}."
            )
    return names

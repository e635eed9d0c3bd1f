"""diffusers' hooks for loading and saving, and nothing else.

Loading a float checkpoint quantizes each weight as it arrives, so memory holds one float shard and the packed layers.
Loading a packed checkpoint makes room from `config.json` first; every tensor then loads alone, in any order.
"""

import logging
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import ModelMixin
from diffusers.quantizers.base import DiffusersQuantizer
from torch import nn

from ..checkpoint.file_checks import check_floats, check_formats, check_places, formats_of, without_formats
from ..checkpoint.record import ModelRecord
from ..compat.diffusers import keep_labels, pipeline_being_saved, set_config
from ..compat.torch import put_tensor, tensors_of
from ..errors import CheckpointError, UnsupportedError
from ..layers import QUANT_LAYERS, QuantLayer
from ..layers.convert import Conversion, replace_module
from ..layers.skeleton import convert_skeleton
from ..layers.stored import (
    FORMATS_TENSOR,
    INPUT_TENSORS,
    OBSERVED,
    PACKED_WEIGHT,
    WEIGHT_TENSORS,
    name_in_files,
    name_in_state,
)
from ..methods.method import parts
from ..sampling.observation import calibration_state
from .attach import attach, detach
from .config import MSFPConfig
from .files.saving import file_metadata, tensors_to_save
from .files.single_file import require_float_file

logger = logging.getLogger(__name__)


class MSFPQuantizer(DiffusersQuantizer):
    """Connects `MSFPConfig` with `ModelMixin.from_pretrained` and `save_pretrained`; diffusers makes it.

    Args:
        quantization_config (`MSFPConfig`): the request; of a checkpoint with its record.
        **kwargs: diffusers' own.

    Example:
        >>> from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING
        >>> AUTO_QUANTIZER_MAPPING["msfp"] is MSFPQuantizer
        True
    """

    use_keep_in_fp32_modules = True
    requires_calibration = False
    unfinished: int | None = None  # layers still float where quantizing its model was stopped on the way
    quantization_config: MSFPConfig

    def __init__(self, quantization_config: MSFPConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._plan: Conversion | None = None
        self._dtype = torch.float32
        self._loaded_keys: list[str] = []
        self._read: set[str] = set()
        self._record: ModelRecord | None = quantization_config.record if self.pre_quantized else None
        self._packed = frozenset() if self._record is None else self._record.names()
        self._formats: dict[str, torch.Tensor] = {}
        self._kept: dict[type, tuple[str, ...]] = {}

    def _stored(self, module: nn.Module) -> tuple[str, ...]:
        """Tensors that a checkpoint keeps of a module beside float ones."""
        return next((names for kind, names in self._kept.items() if isinstance(module, kind)), ())

    def update_torch_dtype(self, torch_dtype: torch.dtype | None) -> torch.dtype:
        """float32 where nothing is asked for."""
        self._dtype = torch.float32 if torch_dtype is None else torch_dtype
        return self._dtype

    def validate_environment(self, *args: Any, device_map: Any = None, **kwargs: Any) -> None:  # noqa: ARG002
        """Refuse what diffusers would do behind our back: tensors on disk are cast and never shown to us.

        Raises:
            UnsupportedError: disk offload in another dtype than float32, or of weights that are still to be quantized.
        """
        devices = device_map.values() if isinstance(device_map, dict) else ()
        if "disk" in devices and not self.pre_quantized:
            raise UnsupportedError("Quantize without offloading to disk, which leaves layers float; offload it later.")
        if "disk" in devices and self._dtype != torch.float32:
            raise UnsupportedError(
                f"Disk offload keeps scales exact only in float32, but got `dtype={self._dtype}`. Leave "
                f"`dtype` out, or offload to the CPU."
            )

    def get_special_dtypes_update(self, model: nn.Module, torch_dtype: torch.dtype) -> dict[str, torch.dtype]:
        """What each tensor will take when devices are shared out; packed ones take what they are."""
        return cast(Conversion, self._plan).stored_dtypes(model, torch_dtype)

    def get_cuda_warm_up_factor(self) -> int:
        """Four-bit weights take an eighth of the allocation that float weights would."""
        return 8

    def maybe_update_loaded_keys(self, loaded_keys: list[str], checkpoint_files: list[str] | None) -> list[str]:
        """The names of a model's tensors for those of its files; packed weights from pickles or elsewhere are refused.

        Raises:
            CheckpointError: a file that is no safetensors file, or an index that leads elsewhere.
        """
        self._loaded_keys = [name_in_state(key, self._packed) for key in loaded_keys]
        if not self.pre_quantized:
            return loaded_keys
        check_places([Path(file) for file in checkpoint_files or ()])
        return without_formats(self._loaded_keys, self.quantization_config)

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:
        if "state_dict" in kwargs:  # `from_single_file` alone gives it
            require_float_file(model, kwargs["state_dict"])
            self.pre_quantized = False
        if not self.pre_quantized:
            self.quantization_config = self.quantization_config.without_record()
        config = self.quantization_config
        if self.pre_quantized:
            self._record = config.take_record()
        self._plan = config.plan(model)
        self._kept = {QuantLayer: (PACKED_WEIGHT, *WEIGHT_TENSORS, *INPUT_TENSORS, *OBSERVED)}
        for part in parts():
            self._kept |= part.stored
        if self._record is not None:
            kept = self._record.parts
            found = [(part, kept[part.key]) for part in parts() if part.key in kept]
            for part, record in found:
                if part.reshape is not None:
                    part.reshape(model, record)
            convert_skeleton(model, self._record.layers or (), self._plan.layers)
            for part, record in found:
                if part.attach is not None:
                    part.attach(model, record)
            self._formats = formats_of(model)

    def maybe_update_state_dict(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Check packed tensors as they lie in the file, before any is cast, and call them as the model does.

        Of a float file, cut what stays float loose: a bias that is a view would keep a whole float shard mapped.
        """
        if self._record is self._plan is None:  # not planned yet
            return state_dict
        if self.pre_quantized:
            if self._record is not None and (digest := self._record.digest_to_check()) is not None:
                digest.check(state_dict)
            self._read |= state_dict.keys()
            self._formats |= check_formats(state_dict, self._formats)
            names = without_formats(state_dict, self.quantization_config)
            return {name_in_state(name, self._packed): state_dict[name] for name in names}
        ours = {f"{name}.weight" for name in cast(Conversion, self._plan).layers}
        return {key: value if key in ours else value.clone() for key, value in state_dict.items()}

    def check_if_quantized_param(
        self, model: nn.Module, param_value: torch.Tensor, param_name: str, state_dict: dict[str, Any], **__: Any
    ) -> bool:
        """Whether a tensor is ours to place."""
        module_name, _, tensor = param_name.rpartition(".")
        if self.pre_quantized:
            module, value = model.get_submodule(module_name), state_dict.get(param_name, param_value)
            if tensor in self._stored(module):
                return True
            if getattr(module, tensor).is_floating_point() and not value.is_floating_point():  # it would be cast
                raise CheckpointError(f"`{param_name}` must hold floats, but got {value.dtype}: damaged file.")
            return False
        return tensor == "weight" and module_name in cast(Conversion, self._plan).layers

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: torch.Tensor,
        param_name: str,
        target_device: torch.device,
        state_dict: dict[str, Any],
        unexpected_keys: list[str] | None = None,  # noqa: ARG002
        **kwargs: Any,  # noqa: ARG002
    ) -> Any:
        """Place a packed tensor, or quantize a float weight; read from `state_dict`, where nothing is cast yet."""
        module_name, _, tensor = param_name.rpartition(".")
        module = model.get_submodule(module_name)
        value = state_dict.get(param_name, param_value)
        if not self.pre_quantized:
            if isinstance(module, QuantLayer):
                return  # the same module under a second name
            scheme = cast(Conversion, self._plan).layers[module_name]
            layer = QUANT_LAYERS[type(module)].from_float(module, module_name, scheme, value)
            for name, stored in tensors_of(layer).items():
                if name != "bias":
                    put_tensor(layer, name, stored.to(target_device))
            replace_module(model, module_name, layer)
            return
        if tensor in OBSERVED:
            cast(QuantLayer, module).load_observed(tensor, value)
            return
        expected = tensors_of(module)[tensor]
        if value.dtype != expected.dtype or value.shape != expected.shape:
            raise CheckpointError(
                f"`{name_in_files(param_name)}` must be {expected.dtype} of shape {tuple(expected.shape)}, but got "
                f"{value.dtype} of shape {tuple(value.shape)}: damaged file, or not this model's."
            )
        put_tensor(module, tensor, value.to(target_device))

    def check_quantized_param_shape(
        self, param_name: str, current_param: torch.Tensor, loaded_param: torch.Tensor
    ) -> None:
        """Refuse a shape that the skeleton does not expect; an observer's sample has no fixed length."""
        if param_name.endswith(OBSERVED):
            return  # checked when it is placed
        raise CheckpointError(
            f"`{name_in_files(param_name)}` must have shape {tuple(current_param.shape)}, but got "
            f"{tuple(loaded_param.shape)}: damaged file, or not this model's."
        )

    def update_missing_keys(self, model: nn.Module, missing_keys: list[str], prefix: str) -> list[str]:  # noqa: ARG002
        """Refuse a packed checkpoint that lacks tensors, or has some of ours that its record knows nothing of."""
        if not self.pre_quantized:
            return missing_keys
        if missing_keys:
            missing = name_in_files(sorted(missing_keys)[0])
            raise CheckpointError(f"A checkpoint must hold `{missing}`, but it does not: damaged or incomplete file.")
        ours = {FORMATS_TENSOR, *(name for names in self._kept.values() for name in names)} - {PACKED_WEIGHT}
        known = model.state_dict() | (self._formats if self.quantization_config.format_version > 1 else {})
        for key in known.keys() & self._formats.keys():
            if key not in self._loaded_keys:
                raise CheckpointError(f"A checkpoint must hold `{key}`, but it does not: damaged or incomplete file.")
        for key in self._loaded_keys:
            if key.rpartition(".")[2] in ours and key not in known:
                raise CheckpointError(f"config.json records no `{key}`, which the files hold: not its weights.")
        return missing_keys

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:  # noqa: ARG002
        for name, module in model.named_modules():
            if isinstance(module, QuantLayer) and not module.weight_scale.is_meta:
                module.take_formats(self._formats.get(f"{name}.{FORMATS_TENSOR}"))
                module.check_stored()
            elif hasattr(module, "check") and self._stored(module):
                module.check(name)
        if self.pre_quantized:
            if self._record is not None and (digest := self._record.digest_to_check()) is not None:
                digest.check_complete(self._read)  # what `update_missing_keys` is told of shards is their index
            check_floats(model)
        on_the_fly = not self.pre_quantized
        self.attach(model)
        if on_the_fly:
            cast(Conversion, self._plan).report(model)
            if calibration_state(model) == "observing":
                logger.warning(
                    "%s: activations stay float during the first complete denoising run, which sets their ranges; or "
                    "call `diffusers_msfp.calibrate(pipe)` now.",
                    type(model).__name__,
                )

    def attach(self, model: nn.Module) -> None:
        """Make a model with quantized layers know that it is one."""
        cast(Any, model).register_to_config(quantization_config=self.quantization_config)
        attach(model, self, None if self._record is None else self._record.calibration)
        self._record = None

    def get_state_dict_and_metadata(
        self,
        state_dict: dict[str, Any],
        safe_serialization: bool = False,  # noqa: ARG002
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """The model alone, under its own names, also while adapters are attached; its pipeline keeps `id2label`."""
        keep_labels(pipeline_being_saved())
        config = self.quantization_config
        return tensors_to_save(state_dict, config), file_metadata(config)

    def _dequantize(self, model: nn.Module) -> nn.Module:
        detach(model, cast(ModelMixin, model).dtype)
        ours, config = ("quantization_config", "_pre_quantization_dtype"), cast(Any, model).config
        set_config(model, {key: value for key, value in config.items() if key not in ours})
        del model.quantization_method
        return model

    @property
    def supports_parallel_loading(self) -> bool:
        """Every tensor loads alone."""
        return True

    @property
    def is_serializable(self) -> bool:
        """Packed tensors are plain uint8."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through to adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Frozen models compile without graph breaks."""
        return True

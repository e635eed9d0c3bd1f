"""transformers' hooks for loading and saving, for text encoders, whose weights alone are quantized.

A text encoder runs once per picture, so quantized activations would save next to no time, and there is no denoising
run to set their ranges: schemes that name any count as their weights-only counterparts here. Layers, packing and the
record in `config.json` are those of `quantizer`.
"""

from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.quantizers.base import HfQuantizer

from ..checkpoint.file_checks import check_files, formats_of
from ..checkpoint.record import ModelRecord
from ..compat.peft import has_adapters
from ..compat.transformers import (
    ConversionOps,
    WeightRenaming,
    keep_own_names,
    mark_initialised,
    unwatch_loading,
    watch_loading,
)
from ..errors import CheckpointError, MSFPError
from ..layers import QUANT_LAYERS, QuantLayer
from ..layers.convert import Conversion, quant_layers, replace_module
from ..layers.skeleton import convert_skeleton
from ..layers.stored import FORMATS_TENSOR, PACKED_WEIGHT, name_in_files
from .attach import attach, detach
from .config import MSFPConfig
from .files.saving import file_metadata, tensors_to_save


class MSFPTransformersQuantizer(HfQuantizer):
    """Connects `MSFPConfig` with `PreTrainedModel.from_pretrained` and `save_pretrained`.

    Args:
        quantization_config (`MSFPConfig`): not changed.
    """

    requires_calibration = False
    unfinished: int | None = None  # layers still float where quantizing its model was stopped on the way
    quantization_config: MSFPConfig

    def __init__(self, quantization_config: MSFPConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config.weights_only(), **kwargs)
        self._plan: Conversion | None = None
        self._record: ModelRecord | None = self.quantization_config.record if self.pre_quantized else None
        self.failure: MSFPError | None = None

    # ── loading ──────────────────────────────────────────────────────────────────────────────────────────────

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: list[str] | None = None,
        **kwargs: Any,  # noqa: ARG002
    ) -> None:
        config = self.quantization_config
        if not self.pre_quantized:
            self._plan = config.plan(model)
            return
        self._record = config.take_record()
        digest = self._record.digest_to_check()
        convert_skeleton(model, self._record.layers or (), {})
        if config.format_version > 1:
            check_files([Path(file) for file in checkpoint_files or ()], digest, formats_of(model))

        def refuse_missing(missing_keys: list[str]) -> None:
            for key in missing_keys:
                if isinstance(model.get_submodule(key.rpartition(".")[0]), QuantLayer):
                    raise CheckpointError(
                        f"A checkpoint must hold `{name_in_files(key)}`, but it does not: damaged or incomplete file."
                    )

        checked = rf"\.{FORMATS_TENSOR}$" if config.format_version > 1 else None
        watch_loading(model, refuse_missing, ignored=checked)

    def param_needs_quantization(self, model: PreTrainedModel, param_name: str, **kwargs: Any) -> bool:  # noqa: ARG002
        """Whether a float tensor is the weight of a layer to quantize."""
        module_name, _, tensor = param_name.rpartition(".")
        return self._plan is not None and tensor == "weight" and module_name in self._plan.layers

    def get_quantize_ops(self) -> ConversionOps:
        """What transformers does with such a weight."""
        return _QuantizeWeight(self)

    def get_weight_conversions(self) -> list[WeightRenaming]:
        """The names of a model's packed tensors for those of its files."""
        names = sorted(self._record.names()) if self._record is not None else ()
        return [WeightRenaming(f"^{name}.weight", f"{name}.{PACKED_WEIGHT}") for name in names]

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """What a stored tensor is cast to; floats where bytes should be stay what they are, to be found out."""
        return None if dtype == torch.uint8 else super().get_new_dtype(converter, param, dtype)

    def quantize_weight(self, model: PreTrainedModel, module_name: str, weight: torch.Tensor) -> None:
        """Put a packed layer where the weight's float one is; an error waits until transformers has loaded the rest."""
        module, plan = model.get_submodule(module_name), cast(Conversion, self._plan)
        try:
            layer = QUANT_LAYERS[type(module)].from_float(module, module_name, plan.layers[module_name], weight)
        except MSFPError as error:
            self.failure = self.failure or error
            return
        mark_initialised(layer.packed_weight, layer)
        replace_module(model, module_name, layer)

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:  # noqa: ARG002
        if self.failure is not None:
            raise self.failure
        unwatch_loading(model)
        for name, layer in quant_layers(model):
            if layer.packed_weight.dtype != torch.uint8:
                raise CheckpointError(
                    f"`{name}.weight` must be torch.uint8, but got {layer.packed_weight.dtype}: damaged file, or not "
                    f"this model's."
                )
            layer.check_stored()
        if self._plan is not None:
            self._plan.report(model)
        self.attach(model)

    def attach(self, model: PreTrainedModel) -> None:
        """Make a model with quantized layers know that it is one."""
        model.config.quantization_config = self.quantization_config
        keep_own_names(model)
        attach(model, self, None if self._record is None else self._record.calibration)
        self._record = None

    # ── saving, and back to float ────────────────────────────────────────────────────────────────────────────

    def get_state_dict_and_metadata(self, model: PreTrainedModel) -> tuple[dict | None, dict[str, str]]:
        """Packed tensors; with PEFT adapters attached, transformers saves these alone."""
        if has_adapters(model):
            return None, {}
        config = self.quantization_config
        return tensors_to_save(model.state_dict(), config), file_metadata(config)

    def dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        """As transformers', which would take the dtype from a config that casting and saving leave another one in."""
        self._dequantize(model, dtype)
        self.remove_quantization_config(model)
        return model

    def _dequantize(self, model: PreTrainedModel, dtype: torch.dtype | None = None) -> nn.Module:
        detach(model, dtype or model.dtype)
        return model

    # ── what it can do ───────────────────────────────────────────────────────────────────────────────────────

    def is_serializable(self) -> bool:
        """Packed tensors are plain uint8."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through to adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Quantized layers are one operator each."""
        return True


class _QuantizeWeight(ConversionOps):
    """Quantizes each weight as it arrives, so that no more than one layer is float."""

    def __init__(self, quantizer: MSFPTransformersQuantizer) -> None:
        self._quantizer = quantizer

    def convert(  # type: ignore[override]  # transformers gives all but the first by name
        self, input_dict: dict, *, full_layer_name: str, model: PreTrainedModel, missing_keys: set[str], **_: Any
    ) -> dict:
        """Nothing is left for transformers to place."""
        (value,) = input_dict.values()
        weight = value[0] if isinstance(value, list) else value
        self._quantizer.quantize_weight(model, full_layer_name.rpartition(".")[0], weight)
        missing_keys.discard(full_layer_name)
        return {}

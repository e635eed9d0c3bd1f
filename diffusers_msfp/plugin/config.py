"""`MSFPConfig`: what the user asks for; of a checkpoint also what its `config.json` says was done."""

import copy
import json
import logging
from collections.abc import Mapping, Sequence, Set
from enum import Enum
from typing import Any, cast

from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from ..checkpoint.record import REQUEST, ModelRecord
from ..checkpoint.version2 import FORMAT_VERSION, check_version
from ..errors import CheckpointError, ConfigError
from ..layers.convert import Conversion
from ..sampling.denoisers import DENOISERS, is_denoiser, warn_of_float
from ..schemes import DEFAULT_SCHEME, SCHEMES, weights_only
from .components import components_being_loaded

logger = logging.getLogger(__name__)


class MSFPMethod(str, Enum):
    """The name of the method; diffusers reads `.value`."""

    MSFP = "msfp"


class MSFPConfig(QuantizationConfigMixin, TransformersConfigMixin, PipelineQuantizationConfig):
    """Quantize a diffusion model with mixup-sign floating point, at pipeline or at model level.

    Text encoders and other models of transformers take it too; of a scheme they take the weights' part.

    Args:
        scheme (`str`): a name in `SCHEMES`: bits of weights and activations, e.g. `"w4a8"` or `"w4a4"`.
        modules_to_not_convert (`Sequence[str]`, *optional*): patterns of modules that stay float. A plain name
            matches as a substring of a module's name, one with `*` as a glob over the whole name.
        scheme_overrides (`Mapping[str, str]`, *optional*): pattern → scheme for single layers; the last match wins.
        components_to_quantize (`Sequence[str]`, *optional*): components of a pipeline, e.g. `["unet", "text_encoder"]`;
            by default all its denoisers (`unet`, `transformer`, `transformer_2`, `prior`, …) and `controlnet`.
        quant_method (`str`): `"msfp"`; this and what follows is written by the package, not by hand.
        format_version (`int`): that the model is saved as, 1 or 2; one that was loaded from version 1 stays so.
        record (`ModelRecord`, *optional*): what was done, where this was read from a checkpoint or is written to one.
            The config of a model in memory has none: `ModelRecord.of(model)` says it.

    Raises:
        ConfigError: an unknown scheme, or arguments of the wrong kind.
        CheckpointError: a newer format version.

    Example:
        >>> MSFPConfig(scheme="w4a4", modules_to_not_convert=["conv_out"]).scheme
        'w4a4'
    """

    quant_mapping: Any = None
    quant_method: Any

    def __init__(
        self,
        scheme: str = DEFAULT_SCHEME,
        modules_to_not_convert: Sequence[str] | None = None,
        scheme_overrides: Mapping[str, str] | None = None,
        components_to_quantize: Sequence[str] | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = MSFPMethod.MSFP.value,
        record: ModelRecord | None = None,
    ) -> None:
        # PipelineQuantizationConfig.__init__ is left out on purpose: it wants a backend's name or a mapping.
        if quant_method != MSFPMethod.MSFP.value:
            raise CheckpointError(f"`quant_method` must be 'msfp', but got {quant_method!r}: another method's config.")
        self.quant_method = MSFPMethod.MSFP
        self.format_version = check_version(format_version)
        SCHEMES[scheme]
        self.scheme = scheme
        self.modules_to_not_convert = _names(modules_to_not_convert, "modules_to_not_convert")
        if not isinstance(scheme_overrides or {}, Mapping):
            raise ConfigError(f"`scheme_overrides` must map patterns to schemes, but got {scheme_overrides!r}.")
        self.scheme_overrides = dict(scheme_overrides or {})
        for override in self.scheme_overrides.values():
            SCHEMES[override]
        self.components_to_quantize = _names(components_to_quantize, "components_to_quantize") or None
        self.record = record

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Read a record: unknown keys get a warning in version 1 and are refused in version 2; newer ones are too.

        Raises:
            CheckpointError: see above; malformed, or of a kind that this package cannot execute.
        """
        version = config_dict.get("format_version", 1)
        own = {key: config_dict[key] for key in REQUEST & config_dict.keys()} | {"format_version": version}
        config = cls(**own | kwargs)
        record = ModelRecord.from_dict(config_dict)
        config.record = record if config_dict.keys() & ModelRecord.keys() else None
        known = REQUEST | ModelRecord.keys() - ({"digest"} if version == 1 else set())
        if version == 1 and (unknown := sorted(set(config_dict) - known)):
            logger.warning("Unknown keys in an MSFP config of version %s are ignored: %s.", version, ", ".join(unknown))
        return (config, {}) if return_unused_kwargs else config

    def to_dict(self) -> dict:
        """The request, and the record where there is one, in types that JSON knows."""
        return {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            "scheme": self.scheme,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "scheme_overrides": dict(self.scheme_overrides),
            "components_to_quantize": self.components_to_quantize,
        } | ({} if self.record is None else self.record.to_dict())

    def to_diff_dict(self) -> dict:
        """What differs from a default config; the method's name and version always."""
        default = MSFPConfig().to_dict()
        always = ("quant_method", "format_version", "scheme")
        return {key: value for key, value in self.to_dict().items() if key in always or value != default.get(key)}

    def for_one_model(self) -> "MSFPConfig":
        """A copy of its own."""
        return copy.deepcopy(self)

    def without_record(self) -> "MSFPConfig":
        """A copy that says only what is wanted, for a model that is quantized anew."""
        config = self.for_one_model()
        config.record, config.format_version = None, FORMAT_VERSION
        return config

    def weights_only(self) -> "MSFPConfig":
        """A copy whose schemes leave activations float."""
        config = self.for_one_model()
        config.scheme = weights_only(self.scheme)
        config.scheme_overrides = {pattern: weights_only(name) for pattern, name in self.scheme_overrides.items()}
        if config.scheme != self.scheme:
            logger.warning("Activations of text encoders stay float: `%s` counts as `%s`.", self.scheme, config.scheme)
        return config

    def plan(self, model: nn.Module, *, begun: bool = False) -> Conversion:
        """What to do with each layer of a model, or with those that are left of it; see `Conversion.plan`."""
        asked = self.scheme, self.modules_to_not_convert, self.scheme_overrides, self.format_version
        return Conversion.plan(model, *asked, begun=begun)

    def take_record(self) -> ModelRecord:
        """The record of a checkpoint that is being loaded, which the model's config does not keep.

        Raises:
            CheckpointError: it is not complete.
        """
        record, self.record = self.record or ModelRecord(None, format_version=self.format_version), None
        record.require_complete()
        return record

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None) -> "MSFPConfig | None":  # noqa: ARG002
        """Called by diffusers for each component of a pipeline: this config or None."""
        components = components_being_loaded()
        if components is not None:
            self.choose_components(components, "this one", named=module_name)
        kind = (components or {}).get(module_name or "")
        return self.for_one_model() if self.selects(module_name, kind) else None

    def selects(self, name: str | None, kind: type | None) -> bool:
        """Whether a component of this name and class (None: unknown) is to be quantized."""
        if self.components_to_quantize:
            return name in self.components_to_quantize
        return name is not None and (name == "controlnet" or is_denoiser(name, kind))

    def choose_components(
        self, present: Mapping[str, type | None], owner: str, *, named: str | None = None
    ) -> list[str]:
        """Of the components that a pipeline has, those that are to be quantized; denoisers left float are warned of.

        Args:
            present (`Mapping[str, type]`): name → class, None where it is not known.
            owner (`str`): whose they are, for the message.
            named (`str`, *optional*): the only one that may be warned of.

        Raises:
            ConfigError: there are none.
        """
        found = [name for name, kind in present.items() if self.selects(name, kind)]
        if not found:
            wanted = self.components_to_quantize or ("unet", "transformer", "prior", "controlnet", "…")
            raise ConfigError(
                f"A pipeline must have a component to quantize ({', '.join(wanted)}), but {owner} has "
                f"{', '.join(present) or 'none'}. Name one with `components_to_quantize=[…]`."
            )
        if any(is_denoiser(name, present[name]) for name in found):
            left = [name for name, kind in present.items() if is_denoiser(name, kind) and name not in found]
            warn_of_float(owner, [name for name in left if named in (None, name)])
        return sorted(found, key=[*(self.components_to_quantize or DENOISERS), "controlnet"].index)

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_diff_dict(), indent=2)}"


def config_of(model: nn.Module) -> MSFPConfig:
    """The config that a quantized model has."""
    return cast(Any, model).config.quantization_config


def _names(value: Sequence[str] | None, what: str) -> list[str]:
    """A list of strings; one string stands for a list of one."""
    if value is not None and not isinstance(value, str | Sequence | Set):
        raise ConfigError(f"`{what}` must be a list of non-empty strings, but got {value!r}.")
    names = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"`{what}` must be a list of non-empty strings, but got {value!r}.")
    return names

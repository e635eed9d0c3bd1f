"""`MSFPConfig`: what the user asks for, and what a checkpoint's `config.json` says."""

import copy
import inspect
import json
import logging
from collections.abc import Mapping, Sequence, Set
from enum import Enum

from diffusers.quantizers import PipelineQuantizationConfig
from diffusers.quantizers.quantization_config import QuantizationConfigMixin
from torch import nn
from transformers.utils.quantization_config import QuantizationConfigMixin as TransformersConfigMixin

from ..checkpoint.digest import VARIABLE, Digest, checking
from ..checkpoint.version2 import check_version_1, check_version_2
from ..errors import CheckpointError, ConfigError
from ..layers.convert import Conversion
from ..methods.talora import AdapterPlan
from ..methods.temporal import TemporalPlan
from ..sampling.denoisers import DENOISERS, is_denoiser, warn_of_float
from ..schemes import DEFAULT_SCHEME, SCHEMES, weights_only
from .components import components_being_loaded

logger = logging.getLogger(__name__)

FORMAT_VERSION = 2
MAX_DEPTH = 8


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

    The remaining arguments are the record that a checkpoint carries; they are written by the package, not by hand:

        layers (`list[dict]`): `{"weight": format, "input": format | None | "observing", "modules": [names]}`.
        calibration (`dict`): `state` (`"observing"` or `"frozen"`), and while observing the run's last timestep.
        adapters (`dict`, *optional*): see `talora.AdapterPlan`; None where there are none.
        temporal (`dict`, *optional*): see `temporal.TemporalPlan`; None without temporal maintenance.
        split (`dict`, *optional*): split layer → input channels of each part.
        digest (`dict`, *optional*): see `digest.Digest`; only in files, a model has none.
        format_version (`int`): of the checkpoint, 1 or 2; see `version2` for what 2 adds. A model that was loaded from
            version 1 is saved as such.

    Raises:
        ConfigError: an unknown scheme, or arguments of the wrong kind.
        CheckpointError: a newer format version.

    Example:
        >>> MSFPConfig(scheme="w4a4", modules_to_not_convert=["conv_out"]).scheme
        'w4a4'
    """

    quant_mapping = None

    def __init__(
        self,
        scheme: str = DEFAULT_SCHEME,
        modules_to_not_convert: Sequence[str] | None = None,
        scheme_overrides: Mapping[str, str] | None = None,
        components_to_quantize: Sequence[str] | None = None,
        layers: list[dict] | None = None,
        calibration: dict | None = None,
        adapters: dict | None = None,
        temporal: dict | None = None,
        split: dict | None = None,
        digest: dict | None = None,
        format_version: int = FORMAT_VERSION,
        quant_method: str = MSFPMethod.MSFP.value,
    ) -> None:
        # PipelineQuantizationConfig.__init__ is left out on purpose: it wants a backend's name or a mapping.
        if quant_method != MSFPMethod.MSFP.value:
            raise CheckpointError(f"`quant_method` must be 'msfp', but {quant_method!r} came: another method's config.")
        self.quant_method = MSFPMethod.MSFP
        if not isinstance(format_version, int) or isinstance(format_version, bool) or format_version < 1:
            raise CheckpointError(f"`format_version` must be a whole number ≥ 1, but {format_version!r} came.")
        if format_version > FORMAT_VERSION:
            raise CheckpointError(
                f"This package reads checkpoints up to format version {FORMAT_VERSION}, but {format_version} came. "
                f"Upgrade it: `pip install -U diffusers-msfp`."
            )
        _check_record(layers, calibration, adapters, temporal, split)
        self.format_version = format_version
        SCHEMES[scheme]
        self.scheme = scheme
        self.modules_to_not_convert = _names(modules_to_not_convert, "modules_to_not_convert")
        if not isinstance(scheme_overrides or {}, Mapping):
            raise ConfigError(f"`scheme_overrides` must map patterns to schemes, but {scheme_overrides!r} came.")
        self.scheme_overrides = dict(scheme_overrides or {})
        for override in self.scheme_overrides.values():
            SCHEMES[override]
        self.components_to_quantize = _names(components_to_quantize, "components_to_quantize") or None
        self.layers = layers
        self.calibration = calibration
        self.adapters = adapters
        self.temporal = temporal
        self.split = split
        if digest is not None:
            Digest.from_dict(digest)
        self.digest = digest

    @classmethod
    def from_dict(cls, config_dict: dict, return_unused_kwargs: bool = False, **kwargs):
        """Read a record: unknown keys get a warning in version 1 and are refused in version 2; newer ones are too.

        Raises:
            CheckpointError: see above; malformed, or of a kind that this package cannot execute.
        """
        known = set(inspect.signature(cls.__init__).parameters) - {"self"}
        version = config_dict.get("format_version", 1)
        own = {key: value for key, value in config_dict.items() if key in known} | {"format_version": version}
        if version == FORMAT_VERSION:
            check_version_2(config_dict, known)
        elif version == 1:
            check_version_1(config_dict)
            own.pop("digest", None)
        config = cls(**own, **kwargs)
        if unknown := sorted(set(config_dict) - (known - {"digest"} if version == 1 else known | set(config_dict))):
            logger.warning("Unknown keys in an MSFP config of version %s are ignored: %s.", version, ", ".join(unknown))
        return (config, {}) if return_unused_kwargs else config

    def to_dict(self) -> dict:
        """Everything, in types that JSON knows; what is younger than the format only where there is some."""
        younger = {"temporal": self.temporal, "split": self.split, "digest": self.digest}
        return {
            "quant_method": self.quant_method.value,
            "format_version": self.format_version,
            "scheme": self.scheme,
            "modules_to_not_convert": list(self.modules_to_not_convert),
            "scheme_overrides": dict(self.scheme_overrides),
            "components_to_quantize": self.components_to_quantize,
            "layers": copy.deepcopy(self.layers),
            "calibration": copy.deepcopy(self.calibration),
            "adapters": copy.deepcopy(self.adapters),
        } | {key: copy.deepcopy(value) for key, value in younger.items() if value is not None}

    def to_diff_dict(self) -> dict:
        """What differs from a default config; the method's name and version always."""
        default = MSFPConfig().to_dict()
        always = ("quant_method", "format_version", "scheme")
        return {key: value for key, value in self.to_dict().items() if key in always or value != default.get(key)}

    def for_one_model(self) -> "MSFPConfig":
        """A copy that one model may write its record into."""
        return copy.deepcopy(self)

    def without_record(self) -> "MSFPConfig":
        """A copy that says only what is wanted, for a model that is quantized anew."""
        config = self.for_one_model()
        config.layers = config.calibration = config.adapters = config.temporal = config.split = config.digest = None
        config.format_version = FORMAT_VERSION
        return config

    def weights_only(self) -> "MSFPConfig":
        """A copy whose schemes leave activations float."""
        config = self.for_one_model()
        config.scheme = weights_only(self.scheme)
        config.scheme_overrides = {pattern: weights_only(name) for pattern, name in self.scheme_overrides.items()}
        if config.scheme != self.scheme:
            logger.warning("Activations of text encoders stay float: `%s` counts as `%s`.", self.scheme, config.scheme)
        return config

    def plan(self, model: nn.Module) -> Conversion:
        """What to do with each layer of a model."""
        return Conversion.plan(model, self.scheme, self.modules_to_not_convert, self.scheme_overrides)

    def quantized_layers(self) -> frozenset[str]:
        """Names in the record; an entry that makes no sense has none, and is refused when layers are made from it."""
        groups = [group for group in self.layers or () if isinstance(group, Mapping)]
        lists = [names for group in groups if isinstance(names := group.get("modules"), list)]
        return frozenset(name for names in lists for name in names if isinstance(name, str))

    def require_record(self) -> None:
        """Refuse a checkpoint's config that does not say what its layers are, or lacks its digest.

        Raises:
            CheckpointError: so it is.
        """
        if self.layers is None:
            raise CheckpointError("config.json of a quantized model must have `layers`, but it has none: damaged file.")
        if self.format_version > 1 and self.digest is None and checking():
            raise CheckpointError(
                f"config.json of format version {self.format_version} must have `digest`, but it has none: damaged "
                f"file, or one that was not saved to its end. `{VARIABLE}=0` in the environment loads it unchecked."
            )

    def take_digest(self) -> Digest | None:
        """The digest to check files by, which a model in memory does not keep; None where there is nothing to check."""
        record, self.digest = self.digest, None
        return Digest.from_dict(record) if record is not None and checking() else None

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None):  # noqa: ARG002
        """Called by diffusers for each component of a pipeline: this config or None."""
        components = components_being_loaded()
        if components is not None:
            self.choose_components(components, "this one", named=module_name)
        kind = (components or {}).get(module_name)
        return self.for_one_model() if self.selects(module_name, kind) else None

    def selects(self, name: str | None, kind: type | None) -> bool:
        """Whether a component of this name and class (None: unknown) is to be quantized."""
        if self.components_to_quantize:
            return name in self.components_to_quantize
        return name == "controlnet" or is_denoiser(name, kind)

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


def _check_record(layers: object, calibration: object, adapters: object, temporal: object, split: object) -> None:
    """Refuse a record that this package cannot have written; what names layers is checked against the model later.

    Raises:
        CheckpointError: fields of another kind, or nested deeper than any record.
    """
    level = [layers, calibration, adapters, temporal, split]
    for _ in range(MAX_DEPTH):
        level = [
            part
            for value in level
            if isinstance(value, list | Mapping)
            for part in (value.values() if isinstance(value, Mapping) else value)
        ]
    if level:
        raise CheckpointError(
            f"A config's record is at most {MAX_DEPTH} levels deep, but a deeper one came: damaged file."
        )
    if layers is not None and not isinstance(layers, list):
        raise CheckpointError(
            f"`layers` in config.json must be a list, but {type(layers).__name__} came: damaged file."
        )
    if calibration is not None:
        kept = calibration if isinstance(calibration, Mapping) else {"last_timestep": ""}
        timesteps = [kept.get(key) for key in ("last_timestep", "first_timestep")]
        numbers = all(isinstance(timestep, int | float | None) for timestep in timesteps)
        if not numbers or kept.get("has_fallen", False) not in (True, False):
            raise CheckpointError(f"`calibration` in config.json must say the state, but {calibration!r} came.")
    if adapters is not None:
        AdapterPlan.from_dict(adapters)
    if temporal is not None:
        TemporalPlan.from_dict(temporal)
    if not isinstance(split, Mapping | None):
        raise CheckpointError(f"`split` in config.json must map layers to sizes, but {split!r} came: damaged file.")


def _names(value: Sequence[str] | None, what: str) -> list[str]:
    """A list of strings; one string stands for a list of one."""
    if value is not None and not isinstance(value, str | Sequence | Set):
        raise ConfigError(f"`{what}` must be a list of non-empty strings, but {value!r} came.")
    names = [value] if isinstance(value, str) else list(value or ())
    if not all(isinstance(name, str) and name for name in names):
        raise ConfigError(f"`{what}` must be a list of non-empty strings, but {value!r} came.")
    return names

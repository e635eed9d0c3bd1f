"""`MSFPPipelineMixin`: a pipeline that knows of its quantization and its timestep-aware adapters.

Routing itself needs no mixin: it works in every stock pipeline. The mixin adds verbs, and ends the observation of
activations at the end of a call.
"""

import functools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..compat.wrappers import unwrap
from ..engines.choose import engines_of
from ..errors import ConfigError, StateError
from ..layers.convert import quant_layers
from ..methods.correction.table import correction_of
from ..methods.routes import finite_set_of, routing_of
from ..methods.talora import RoutingTable
from ..methods.talora.attach import refuse_merged
from ..sampling.denoisers import denoisers_of, is_quantized
from ..sampling.observation import calibration_state, freeze, quantized_models, tracker
from .adapters import talora_files
from .adapters.talora_files import require_plan
from .config import config_of


class MSFPPipelineMixin:
    """Verbs of a pipeline with an MSFP-quantized denoiser.

    Use it as a base class (`class Mine(MSFPPipelineMixin, DDPMPipeline)`), on any pipeline object with
    `MSFPPipelineMixin.attach(pipe)`, or in a `custom_pipeline`. What it saves names the stock class.

    Example:
        ```py
        pipe = MSFPPipelineMixin.attach(DiffusionPipeline.from_pretrained("model-w4a4-talora"))
        pipe.disable_talora()
        ```
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        call = getattr(cls, "__call__", None)  # noqa: B004
        if call is not None and not hasattr(call, "_freezes"):
            type.__setattr__(cls, "__call__", _freezing(call))

    @staticmethod
    def attach(pipe: DiffusionPipeline) -> DiffusionPipeline:
        """Give a pipeline object these verbs, in place; its class keeps its name. It can be copied, but not pickled.

        Raises:
            ConfigError: not a pipeline.
        """
        cls = type(pipe)
        if not isinstance(pipe, DiffusionPipeline):
            raise ConfigError(f"The mixin attaches to pipelines, but got {cls.__name__}.")
        if not isinstance(pipe, MSFPPipelineMixin):
            pipe.__class__ = type(cls.__name__, (MSFPPipelineMixin, cls), {"__module__": cls.__module__})
        return pipe

    # ── adapters ─────────────────────────────────────────────────────────────────────────────────────────────

    def load_talora(self, source: str | Path, **hub: Any) -> None:
        """Load adapters beside the weights from a folder or Hub id; see `talora_files.load_talora`.

        Where several denoisers are quantized, theirs lie in folders of their names.
        """
        talora_files.load_by_name(self._denoisers(), source, **hub)

    def save_talora(self, folder: str | Path) -> None:
        """Write the adapters without the model; see `talora_files.save_talora`.

        Where several denoisers are quantized, each has a folder of its name in this one.
        """
        adapted, several = self._adapted(), len(self._denoisers()) > 1
        for model in adapted.values():
            talora_files.require_storable(model)
        for name, model in adapted.items():
            talora_files.save_talora(model, Path(folder) / name if several else folder)

    def unload_talora(self) -> None:
        """Take the adapters off all denoisers; each is bit for bit what it was without them."""
        for model in self._adapted("Unloading").values():
            talora_files.unload_talora(model)

    def enable_talora(self) -> None:
        """Use the adapters of all denoisers (again)."""
        for model in self._adapted("Enabling adapters").values():
            _routing(model).enabled = True

    def disable_talora(self) -> None:
        """Compute as without adapters, until `enable_talora`."""
        for model in self._adapted("Disabling adapters").values():
            _routing(model).enabled = False

    def set_talora_scale(self, scale: float) -> None:
        """Weigh what the adapters of all denoisers add; 1 is as trained.

        Raises:
            ConfigError: not a finite number.
        """
        if not isinstance(scale, (int, float)) or not abs(scale) < float("inf"):
            raise ConfigError(f"The adapters' scale must be a finite number, but got {scale!r}.")
        for model in self._adapted("Scaling adapters").values():
            _routing(model).scale = float(scale)

    def talora_summary(self) -> dict:
        """Which adapter serves which timesteps.

        Returns:
            `dict`: `placement`, `reads` (see `FinetuneConfig`; None for merged ones), `num_adapters`, `num_timesteps`,
            `router_groups`, `ranks` (rank → number of layers), `enabled`, `scale`, `intervals`
            (`[group][(first timestep, last timestep, adapter), …]`), `usage` (`[group][adapter]`, share of the
            timesteps), `collapsed` (groups in which one adapter serves all). Where several denoisers are quantized,
            name → this.
        """
        found = {name: _summary(model) for name, model in self._adapted().items()}
        return found if len(self._denoisers()) > 1 else next(iter(found.values()))

    def quantization_report(self) -> dict:
        """What is quantized, and how.

        Returns:
            `dict`: component → `scheme`, `calibration_state`, `layers`, `weight_formats` and `input_formats` (format →
            number of layers; `"float"` and `"observing"` too), `unsigned_inputs`, `engines` (engine → number of
            layers that it runs now), `bits_per_weight` (codes and scales, per bank), `bytes` (of all its tensors),
            `adapters` (see `talora_summary`, or None), `temporal` (see `TemporalPlan.summary`, or None),
            `output_correction` (timesteps of its table, or None).
        """
        report = {}
        for name, model in cast(DiffusionPipeline, self).components.items():
            model = unwrap(model) if isinstance(model, nn.Module) else None
            if model is None or not is_quantized(model):
                continue
            layers = [layer for _, layer in quant_layers(model)]
            inputs = Counter("observing" if layer.observing else str(layer.input_format or "float") for layer in layers)
            weights = sum(rows * length for rows, length in (layer.matrix_shape for layer in layers))
            unsigned = sum(layer.input_format is not None and not layer.input_format.signed for layer in layers)
            packed = sum(layer.packed_bytes for layer in layers)
            report[name] = {
                "scheme": config_of(model).scheme,
                "calibration_state": calibration_state(model),
                "layers": len(layers),
                "weight_formats": dict(Counter(layer.weight_format.name for layer in layers)),
                "input_formats": dict(inputs),
                "unsigned_inputs": unsigned,
                "engines": engines_of(model),
                "bits_per_weight": 8 * packed / weights,
                "bytes": cast(ModelMixin, model).get_memory_footprint(),
                "adapters": _summary(model) if routing_of(model) is not None else None,
                "temporal": _temporal_summary(model),
                "output_correction": None if (table := correction_of(model)) is None else len(table.timesteps),
            }
        return report

    def _denoisers(self) -> dict[str, nn.Module]:
        """Quantized denoisers by name."""
        models = denoisers_of(cast(DiffusionPipeline, self), required=False)
        found = {name: model for name, model in models.items() if is_quantized(model)}
        if not found:
            raise StateError(
                f"A pipeline with a quantized denoiser is needed, but this {type(self).__name__} has none. Load it "
                f"with `quantization_config=MSFPConfig()` or call `quantize_pipeline(pipe, scheme)`."
            )
        return found

    def _adapted(self, what: str | None = None) -> dict[str, nn.Module]:
        """Those of them that have timestep-aware adapters; for what needs these beside the weights, if it is said."""
        models = self._denoisers()
        found = {name: model for name, model in models.items() if routing_of(model) is not None}
        if not found:
            require_plan(next(iter(models.values())))
        if what is not None:
            for model in found.values():
                refuse_merged(model, what)
        return found

    # ── what is saved ────────────────────────────────────────────────────────────────────────────────────────

    def to_json_string(self) -> str:
        """The pipeline's index, naming the stock class, which plain diffusers can open."""
        stock = next((c for c in type(self).__mro__ if c.__module__.startswith("diffusers.")), type(self))
        index = json.loads(cast(Any, super()).to_json_string()) | {"_class_name": stock.__name__}
        return json.dumps(index, indent=2, sort_keys=True) + "\n"


def _freezing(call: Callable) -> Callable:
    """A pipeline's call that ends the observation of activations when it is over."""

    @functools.wraps(call)
    def wrapped(self: DiffusionPipeline, *args: Any, **kwargs: Any) -> Any:
        result = call(self, *args, **kwargs)
        for model in quantized_models(self):
            watching = tracker(model)
            if watching is not None and not watching.paused and watching.last_timestep is not None:
                freeze(model)
        return result

    vars(wrapped)["_freezes"] = True
    return wrapped


def _routing(model: nn.Module) -> RoutingTable:
    return cast(RoutingTable, routing_of(model))


def _temporal_summary(model: nn.Module) -> dict | None:
    finite_set = finite_set_of(model)
    if finite_set is None:
        return None
    channels = {name: layer.logical_shape[0] for name, layer in quant_layers(model)}
    return finite_set.plan.summary(finite_set.timesteps.tolist(), channels)


def _summary(model: nn.Module) -> dict:
    plan, routing = require_plan(model), _routing(model)
    usage = routing.usage()
    return {
        "placement": plan.placement,
        "reads": plan.reads if plan.placement == "side" else None,
        "num_adapters": plan.num_adapters,
        "num_timesteps": plan.num_timesteps,
        "router_groups": list(plan.router_groups),
        "ranks": {int(rank): len(names) for rank, names in plan.ranks.items()},
        "enabled": routing.enabled,
        "scale": routing.scale,
        "intervals": routing.intervals(),
        "usage": usage,
        "collapsed": [i for i, shares in enumerate(usage) if plan.num_adapters > 1 and max(shares) == 1],
    }

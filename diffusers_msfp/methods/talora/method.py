"""TALoRA as one of the methods: adapters on the layers, and the router's table on the model."""

from collections.abc import Mapping
from functools import partial

from torch import nn

from ...errors import StateError, UnsupportedError
from ..method import Method, Part, read_part
from ..routes import ROUTER, require_full_strength, routing_of
from . import AdapterBank, AdapterPlan, RoutingTable
from .adapters import ADAPTER_TENSORS
from .attach import plan_of, prepare_skeleton
from .config import FinetuneConfig
from .finetune import finetune


def _require_float(model: nn.Module) -> None:
    if routing_of(model) is not None:
        raise UnsupportedError(
            "A model with timestep-aware adapters has no single float weight per layer. Unload adapters that stand "
            "beside the weights (`unload_talora`) and call `dequantize` again; merged ones cannot be undone."
        )


def _require_ranges(model: nn.Module) -> None:
    plan = plan_of(model)
    if plan is not None and plan.placement == "side":
        raise StateError(
            "Ranges are set anew for a model without adapters beside its weights, but this one has some, which were "
            "trained with the formats and ranges that it has. Unload them (`unload_talora`), calibrate, and fine-tune."
        )


def _describe(plan: AdapterPlan, tensors: Mapping) -> dict:
    intervals = RoutingTable(tensors[f"{ROUTER}.table"], plan.num_adapters).intervals()
    reads = plan.reads if plan.placement == "side" else None
    return {"placement": plan.placement, "reads": reads, "num_adapters": plan.num_adapters, "intervals": intervals}


TALORA = Method(
    "talora",
    FinetuneConfig,
    finetune,
    Part(
        key="adapters",
        read=partial(read_part, AdapterPlan, "adapters"),
        write=AdapterPlan.to_dict,
        record_of=plan_of,
        since=lambda plan: plan.since,
        attach=prepare_skeleton,
        stored={AdapterBank: ADAPTER_TENSORS, RoutingTable: ("table",)},
        require_float=_require_float,
        require_ranges=_require_ranges,
        require_whole=partial(require_full_strength, what="Saving"),
        describe=_describe,
        forbids_fusing="It has timestep-aware adapters, which were trained for the weights that it has. Unload those "
        "beside the weights (`unload_talora`); merged ones cannot be taken off: fuse the LoRA into the float model, "
        "quantize that, and fine-tune it.",
    ),
    forbids={"talora": "This model has adapters already. Start from the checkpoint that `quantize` wrote."},
    reports=True,
)

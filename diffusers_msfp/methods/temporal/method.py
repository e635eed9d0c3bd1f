"""Temporal maintenance as one of the methods: a finite set on the model, parameters and features on its layers."""

from collections.abc import Mapping
from functools import partial

from ..method import CORRECTED, Method, Part, read_part
from . import FeatureTable, FiniteSet, TemporalPlan
from .attach import detach_sets, keep_basis, plan_of, require_features, temporal_skeleton
from .maintain import TemporalConfig, maintain_temporal


def _describe(plan: TemporalPlan, tensors: Mapping) -> dict:
    channels = {name: tensors[f"{name}.weight_scale"].numel() for name in plan.block}
    return plan.summary(tensors[f"{FiniteSet.module_name}.timesteps"].tolist(), channels)


TEMPORAL = Method(
    "temporal",
    TemporalConfig,
    maintain_temporal,
    Part(
        key="temporal",
        read=partial(read_part, TemporalPlan, "temporal"),
        write=TemporalPlan.to_dict,
        record_of=plan_of,
        attach=temporal_skeleton,
        stored={FiniteSet: ("timesteps",), FeatureTable: ("features",)},
        loaded=keep_basis,
        require_whole=require_features,
        detach=detach_sets,
        of_ranges=True,
        describe=_describe,
        forbids_fusing="Its temporal features are kept for the weights that it has. Take them off first, which "
        "`calibrate(pipe)` does.",
    ),
    forbids={
        "correction": CORRECTED,
        "talora": "Temporal maintenance comes before fine-tuning, but this model has adapters. Start from the "
        "checkpoint that `quantize` wrote.",
        "temporal": "This model's temporal features are maintained already. Start from the quantized model.",
    },
    resumes=False,
)

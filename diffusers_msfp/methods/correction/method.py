"""Correction of the output as one of the methods: a table on the model."""

from collections.abc import Mapping
from functools import partial

from torch import nn

from ..method import Method, Part, read_part
from .attach import correction_skeleton, detach_correction
from .fit import CorrectionConfig, correct_output
from .table import COEFFICIENTS, CORRECTION, CorrectionPlan, CorrectionTable, correction_of


def _record_of(model: nn.Module) -> CorrectionPlan | None:
    table = correction_of(model)
    return None if table is None else table.plan


def _describe(plan: CorrectionPlan, tensors: Mapping) -> dict:
    return {
        "timesteps": tensors[f"{CORRECTION}.timesteps"].tolist(),
        "channels": plan.channels,
        "bytes": 4 * plan.entries * (1 + len(COEFFICIENTS) * plan.channels),
    }


CORRECTION_METHOD = Method(
    "correction",
    CorrectionConfig,
    correct_output,
    Part(
        key=CORRECTION,
        read=partial(read_part, CorrectionPlan, CORRECTION),
        write=CorrectionPlan.to_dict,
        record_of=_record_of,
        attach=correction_skeleton,
        stored={CorrectionTable: ("timesteps", *COEFFICIENTS)},
        detach=detach_correction,
        of_ranges=True,
        since=lambda _: 2,
        describe=_describe,
    ),
    reports=True,
    resumes=False,
)

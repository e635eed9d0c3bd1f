"""Put a correction on a quantized model, and take it off."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ...compat.torch import remove_hooks
from ...compat.wrappers import forget_compiled, sees_through
from ...sampling.observation import quantized_models
from ...sampling.timestep import require_timesteps
from ..routes import routing_of
from .table import (
    COEFFICIENTS,
    CORRECTION,
    CorrectionHook,
    CorrectionPlan,
    CorrectionTable,
    base_correction_of,
    correction_of,
)

logger = logging.getLogger(__name__)


def attach_correction(model: nn.Module, table: CorrectionTable) -> None:
    """Correct a model's output from now on; a table that it has already goes."""
    require_timesteps(model)
    setattr(model, CORRECTION, table)
    _hook(model)


def detach_correction(model: nn.Module) -> None:
    """Leave a model's output as it is."""
    if correction_of(model) is not None:
        delattr(model, CORRECTION)
        _hook(model)


def set_aside(model: nn.Module, table: CorrectionTable | None) -> None:
    """Do with the table of a model that has got adapters what must be done, and say it.

    It rests where they stand beside the weights, until they are disabled or taken off; else it is gone.

    Args:
        table (`CorrectionTable`, *optional*): fitted before, and not on the model any more.
    """
    if table is None:
        return
    routing = routing_of(model)
    if routing is not None and routing.plan.placement == "side":
        _rest(model, table)
        said = "%s: the output correction was fitted without adapters, and rests until they are unloaded."
    else:
        said = "%s: the output correction is taken off, since it was fitted to the weights as they were before."
    logger.warning(f"{said} `correct_output` fits one to the model as it is.", type(model).__name__)


def _rest(model: nn.Module, table: CorrectionTable | None) -> None:
    routing = routing_of(model)
    if routing is not None and routing.base_correction is not table:
        vars(routing)["base_correction"] = table  # not a module's part: it is neither saved nor trained
        _hook(model)


def _hook(model: nn.Module) -> None:
    """Hook a model that has a table, and no other."""
    remove_hooks(model, lambda hook: isinstance(hook, CorrectionHook))
    if correction_of(model) is not None or base_correction_of(model) is not None:
        model.register_forward_hook(CorrectionHook(require_timesteps(model)), with_kwargs=True)
    forget_compiled()


@contextmanager
def without_correction(model: nn.Module) -> Iterator[None]:
    """Within the block the output is as it is."""
    table = correction_of(model)
    detach_correction(model)
    try:
        yield
    finally:
        if table is not None:
            attach_correction(model, table)


def correction_skeleton(model: nn.Module, plan: CorrectionPlan) -> None:
    """Make room for a checkpoint's table in a model without weights."""
    size = (plan.entries, plan.channels)
    empty = [torch.empty(size, dtype=torch.float32, device="meta") for _ in COEFFICIENTS]
    attach_correction(model, CorrectionTable(torch.empty(plan.entries, device="meta"), *empty))


@sees_through
def uncorrect_output(pipe: DiffusionPipeline) -> None:
    """Leave the outputs of a pipeline's models as they are; the inverse of `correct_output`.

    Args:
        pipe (`DiffusionPipeline`): nothing happens to models without a correction.

    Example:
        ```py
        uncorrect_output(pipe)
        ```
    """
    for model in quantized_models(pipe):
        detach_correction(model)
        _rest(model, None)

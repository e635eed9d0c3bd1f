"""Put a correction on a quantized model, and take it off."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ...compat.torch import remove_hooks
from ...compat.wrappers import forget_compiled, sees_through
from ...sampling.observation import quantized_models
from ...sampling.timestep import require_timesteps
from .table import COEFFICIENTS, CORRECTION, CorrectionHook, CorrectionPlan, CorrectionTable


def correction_of(model: nn.Module) -> CorrectionTable | None:
    """The table on a model; None without one."""
    return getattr(model, CORRECTION, None)


def attach_correction(model: nn.Module, table: CorrectionTable) -> None:
    """Correct a model's output from now on; a table that it has already goes."""
    detach_correction(model)
    argument = require_timesteps(model)
    setattr(model, CORRECTION, table)
    model.register_forward_hook(CorrectionHook(argument), with_kwargs=True)
    forget_compiled()


def detach_correction(model: nn.Module) -> None:
    """Leave a model's output as it is."""
    if correction_of(model) is not None:
        delattr(model, CORRECTION)
        remove_hooks(model, lambda hook: isinstance(hook, CorrectionHook))
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

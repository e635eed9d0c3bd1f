"""FSC on all layers: input parameters for each timestep, from what really passes there."""

from collections.abc import Callable, Collection
from typing import cast

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ...calibration import Observation
from ...formats import FPFormat
from ...layers import QuantLayer
from ...layers.convert import prepare_layers, quant_layers
from ...numerics import QParams
from ...sampling.denoisers import batch_size_for, denoiser_of
from ...sampling.trajectory import rollout
from . import finite_set_search
from .reconstruct import Sets


@torch.no_grad()
def observe_sets(
    model: nn.Module,
    teacher: DiffusionPipeline,
    make_arguments: Callable,
    timesteps: Tensor,
    leave_out: Collection[str],
    *,
    num_samples: int,
    seed: int,
) -> Sets:
    """Input parameters of a quantized model's layers for each timestep of a finite set.

    The model answers the teacher's calls with float activations, as in calibration, and each layer watches its input.
    Formats stay what they are.

    Args:
        model (`nn.Module`): frozen; as it was afterwards, also after an error.
        teacher (`DiffusionPipeline`): gives the trajectories.
        make_arguments (`Callable`): see `call_arguments`.
        timesteps (`Tensor`, `(S,)`, float32): the set.
        leave_out (`Collection[str]`): layers that have their parameters already.
        num_samples, seed (`int`): of the trajectories.
    """
    layers = {n: layer for n, layer in quant_layers(model) if n not in leave_out and layer.input_format is not None}
    defaults = {name: layer.input_qparams() for name, layer in layers.items()}
    kept = {name: (layer.input_format, layer.input_error.clone()) for name, layer in layers.items()}
    size = batch_size_for([denoiser_of(teacher)], num_samples)
    calls: dict[float, list] = {timestep: [] for timestep in timesteps.tolist()}
    for start in range(0, num_samples, size):
        for step in rollout(teacher, make_arguments, start, min(size, num_samples - start), seed):
            calls[step.timesteps[0].float().item()].append(step)
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {name: [] for name in layers}
    try:
        for steps in calls.values():
            for name, layer in layers.items():
                layer.start_observing((cast(FPFormat, kept[name][0]).name,))
            for step in steps:
                step.run(model)
            for name, layer in layers.items():
                found[name].append(_search(layer, defaults[name]))
    finally:
        for name, layer in layers.items():
            layer.input_candidates, layer.observation = (), None
            layer.input_format, error = kept[name]
            layer.store_input(defaults[name].scale, defaults[name].zero_point, error)
        prepare_layers(model)
    sets = {}
    for name, entries in found.items():
        scale, zero_point, error = (torch.stack(part) for part in zip(*entries, strict=True))
        sets[name] = scale, zero_point, error.mean()
    return sets


def _search(layer: QuantLayer, default: QParams) -> tuple[Tensor, Tensor, Tensor]:
    """Scale, zero point and relative squared error, `()`, for what a layer has seen; the default for nothing."""
    observation = cast(Observation, layer.observation)
    values = observation.drawn().to(default.scale.device)
    if not len(values):
        return default.scale, default.zero_point, torch.zeros_like(default.scale)
    scale, zero_point, error = finite_set_search(values[None], default, observation.bounds())
    return scale[0], zero_point[0], error[0] / values.square().sum().clamp_min(1e-30)

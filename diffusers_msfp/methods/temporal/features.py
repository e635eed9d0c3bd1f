"""How far a quantized pipeline's temporal features are from full precision, layer by layer and timestep by timestep."""

from collections.abc import Collection, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ...compat.wrappers import sees_through
from ...layers.convert import layers_by_name
from ...sampling.calls import call_arguments
from ...sampling.denoisers import denoiser_of
from .probe import TemporalProbe


@sees_through(changes=False)
@torch.no_grad()
def temporal_features(
    reference: DiffusionPipeline,
    candidate: DiffusionPipeline,
    *,
    num_inference_steps: int = 20,
    seed: int = 0,
    prompts: Sequence[str] | None = None,
    **arguments: Any,
) -> dict[str, dict[float, float]]:
    """Relative error of every quantized layer that depends on the timestep alone, at the timesteps of a sampler.

    The candidate runs as it is, with its engine, its parameter sets and its stored features.

    Args:
        reference, candidate (`DiffusionPipeline`): of the same architecture; the reference's scheduler is used, and the
            candidate has quantized layers. Neither is changed.
        num_inference_steps, seed (`int`): of the reference's run.
        prompts (`Sequence[str]`, *optional*): taken in turn where the pipeline takes prompts.
        **arguments: passed on to the reference.

    Returns:
        `dict`: layer → timestep → `‖Δ‖ / ‖reference‖`, falling timesteps; empty where there is no such layer.
    """
    model = denoiser_of(candidate)
    make_arguments = call_arguments(reference, prompts, num_inference_steps, arguments)
    probe = TemporalProbe(reference, layers_by_name(model), make_arguments, seed)
    errors: dict[str, dict[float, float]] = {name: {} for name in probe.block.names}
    for timestep in probe.timesteps.flip(0).tolist():
        args, kwargs = probe.arguments_at(timestep)
        expected, actual = (_outputs(each, errors, args, kwargs) for each in (denoiser_of(reference), model))
        for name, values in errors.items():
            energy = expected[name].norm().clamp_min(1e-30)
            values[timestep] = ((actual[name] - expected[name]).norm() / energy).item()
    return errors


def _outputs(model: nn.Module, names: Collection[str], args: tuple, kwargs: dict) -> dict[str, Tensor]:
    """What the named layers give in a call of the model, float32."""
    found: dict[str, Tensor] = {}
    handles = [
        model.get_submodule(name).register_forward_hook(
            lambda _layer, _args, output, name=name: found.update({name: output.to(torch.float32)})
        )
        for name in names
    ]
    try:
        model(*args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found

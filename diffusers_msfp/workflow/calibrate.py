"""Calibration with the pipeline's own sampler."""

import inspect
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from ..errors import ConfigError
from ..schemes import resolve
from .state import freeze, quant_layers, quantized_models, track, tracker, write_record

DEFAULT_PROMPTS = (
    "a photograph of an old fisherman mending a net",
    "a bowl of fruit on a wooden table, oil painting",
    "a busy street in Tokyo at night, neon signs",
    "a watercolour of snowy mountains above a lake",
    "a red fox in tall grass, close-up",
    "a detailed blueprint of a steam engine",
    "an astronaut riding a bicycle, flat illustration",
    "a cosy living room with plants and a fireplace",
)
"""Used where a pipeline needs prompts and none are given; own prompts fit own data better."""

PIXELS_PER_BATCH = 2**14


def calibrate(
    pipe,
    *,
    num_samples: int = 64,
    num_inference_steps: int = 20,
    prompts: Sequence[str] | None = None,
    seed: int = 0,
    on_step: Callable[[int, int], None] | None = None,
    **call_arguments,
) -> None:
    """Set the activation ranges of a quantized pipeline from its own samples, then freeze them.

    The pipeline's sampler runs from noise, with its own scheduler, over the whole trajectory; during these runs
    activations are float. Memory does not grow with `num_samples`, and equal arguments give equal ranges.

    Args:
        pipe (`DiffusionPipeline`): with at least one MSFP-quantized component; frozen ones are calibrated anew.
        num_samples (`int`): images to sample.
        num_inference_steps (`int`): denoising steps of each.
        prompts (`Sequence[str]`, *optional*): taken in turn where the pipeline takes prompts.
        seed (`int`): of noise and class labels.
        on_step (`Callable[[int, int], None]`, *optional*): called after each denoising step with (done, total).
        **call_arguments: passed on to the pipeline, e.g. `image=…` for image-to-image or `guidance_scale=…`.

    Raises:
        ConfigError: nothing to calibrate, numbers below 1, or a pipeline that needs an argument that is not given.
    """
    for name, value in (("num_samples", num_samples), ("num_inference_steps", num_inference_steps)):
        if value < 1:
            raise ConfigError(f"`{name}` must be at least 1, but {value} came.")
    models = list(quantized_models(pipe))
    if not models or not callable(pipe) or isinstance(pipe, nn.Module):
        raise ConfigError(
            f"Calibration needs a pipeline with quantized components, but {type(pipe).__name__} has none. Load it with "
            f"`quantization_config=MSFPConfig()` or call `quantize_pipeline(pipe, scheme)`."
        )
    observing = [model for model in models if restart_observation(model)]
    if not observing:
        raise ConfigError("Nothing to calibrate: no layer of this pipeline has a quantized activation (weights only).")

    batch_size = _batch_size(pipe, num_samples)
    make_arguments = _arguments(pipe, prompts, num_inference_steps, call_arguments)
    denoiser = observing[0]
    total = math.ceil(num_samples / batch_size) * num_inference_steps
    with _quiet(pipe), _counting(denoiser, total, on_step), torch.no_grad():
        for start in range(0, num_samples, batch_size):
            generator = torch.Generator().manual_seed(seed + start)
            pipe(**make_arguments(start, min(batch_size, num_samples - start), generator))
    for model in observing:
        freeze(model)


def restart_observation(model: nn.Module) -> bool:
    """Observe anew whatever the model's scheme quantizes; False if that is nothing."""
    config = model.config.quantization_config
    for name, layer in quant_layers(model):
        candidates = resolve(name, config.scheme, config.scheme_overrides).activation
        if candidates:
            layer.start_observing(candidates)
    if not any(layer.observing for _, layer in quant_layers(model)):
        return False
    track(model)
    tracker(model).paused = True
    write_record(model)
    return True


def _batch_size(pipe, num_samples: int) -> int:
    """As many samples at once as keep the latents near 16 000 positions."""
    for model in quantized_models(pipe):
        size = getattr(model.config, "sample_size", None)
        if size:
            height, width = size if isinstance(size, (tuple, list)) else (size, size)
            return max(1, min(16, num_samples, PIXELS_PER_BATCH // (height * width)))
    return 1


def _arguments(pipe, prompts, num_inference_steps: int, given: dict) -> Callable[[int, int, torch.Generator], dict]:
    """How to call this pipeline: a function of (index of the first sample, batch size, generator)."""
    parameters = inspect.signature(pipe.__call__).parameters
    prompts = list(prompts) if prompts is not None else list(DEFAULT_PROMPTS)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"`prompts` must be a non-empty list of strings, but {prompts!r} came.")
    num_classes = next(
        (n for m in quantized_models(pipe) if (n := getattr(m.config, "num_embeds_ada_norm", None))), 1000
    )
    known = {"prompt", "class_labels", "batch_size", "generator", "num_inference_steps", "output_type"}
    needed = [
        name
        for name, parameter in parameters.items()
        if parameter.default is parameter.empty
        and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and name not in known | set(given)
    ]
    if needed:
        raise ConfigError(
            f"{type(pipe).__name__} cannot run without {', '.join(f'`{name}`' for name in needed)}. Pass them on: "
            f"`calibrate(pipe, {needed[0]}=…)`."
        )
    decoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    skip_decoding = decoder is not None and decoder not in list(quantized_models(pipe))

    def make(start: int, size: int, generator: torch.Generator) -> dict:
        arguments = {"generator": generator, "num_inference_steps": num_inference_steps}
        arguments["output_type"] = "latent" if skip_decoding else "np"
        if "prompt" in parameters:
            arguments["prompt"] = [prompts[(start + i) % len(prompts)] for i in range(size)]
        elif "class_labels" in parameters:
            labels = torch.randint(num_classes, (size,), generator=torch.Generator().manual_seed(generator.initial_seed()))
            arguments["class_labels"] = labels.tolist()
        else:
            arguments["batch_size"] = size
        return {key: value for key, value in arguments.items() if key in parameters} | given

    return make


@contextmanager
def _quiet(pipe):
    """Without the pipeline's own progress bars."""
    before = dict(getattr(pipe, "_progress_bar_config", {}))
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@contextmanager
def _counting(model: nn.Module, total: int, on_step: Callable[[int, int], None] | None):
    """Report each call of the model."""
    done = 0

    def count(*_) -> None:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, max(total, done))

    handle = model.register_forward_hook(count)
    try:
        yield
    finally:
        handle.remove()

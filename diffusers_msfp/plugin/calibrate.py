"""Calibration on the pipeline's own samples, or on pictures."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..compat.wrappers import sees_through, unwrap
from ..errors import ConfigError, MSFPError, StateError
from ..layers.convert import quant_layers
from ..methods.method import parts
from ..results import OnProgress
from ..sampling.calls import batched_calls, call_arguments, counting_steps, quiet, require_positive
from ..sampling.denoisers import denoisers_of, is_quantized
from ..sampling.observation import (
    RunTracker,
    freeze,
    quantized_models,
    require_finished,
    require_in_memory,
    track,
    tracker,
)
from ..sampling.pictures import Images, NoisedPictures, showing, taken
from ..sampling.trial import describe, refuse_upcast, try_calls
from ..schemes import LayerScheme

DEFAULT_SAMPLES = 64


@sees_through
def calibrate(
    pipe: DiffusionPipeline,
    *,
    num_samples: int = DEFAULT_SAMPLES,
    num_inference_steps: int = 20,
    prompts: Sequence[str] | None = None,
    images: Images | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> None:
    """Set the activation ranges of a quantized pipeline from its own samples, or from pictures, then freeze them.

    Without `images` the pipeline's sampler runs from noise, with its own scheduler, over the whole trajectory. With
    them its denoiser reads the pictures instead, encoded by the pipeline's `vae` and noised; the timestep of each call
    is drawn uniformly from those that the model was trained on, and conditions and guidance are as in any run. During
    these runs activations are float. Memory does not grow with `num_samples` (but that of pictures that are in memory
    already), and equal arguments give equal ranges. Progress is shown by the pipeline's own progress bar, as its
    `set_progress_bar_config` says.

    Args:
        pipe (`DiffusionPipeline`): with at least one MSFP-quantized component; frozen ones are calibrated anew.
        num_samples (`int`): images to sample; of pictures how many are shown, which are taken in turn where there are
            fewer, each time with other noise.
        num_inference_steps (`int`): denoising steps of each; of pictures at how many timesteps each is shown.
        prompts (`Sequence[str]`, *optional*): taken in turn where the pipeline takes prompts; by default eight built-in
            ones (`sampling.calls.DEFAULT_PROMPTS`). Beside `images` they are captions, one for each picture or one for
            all.
        images (*optional*): a folder, or an iterable of PIL images, files, arrays `(H, W, channels)` and tensors
            `(channels, H, W)`, 8-bit or float in [0, 1]. Each is scaled (Lanczos) until it covers the pipeline's size
            (`height` and `width` where it takes them) and cropped in its middle.
        seed (`int`): of noise and class labels.
        on_progress (`OnProgress`, *optional*): called with (done, total) after each denoising step, instead of the
            progress bar.
        **arguments: passed on to the pipeline, e.g. `image=…` for image-to-image or `guidance_scale=…`.

    Raises:
        ConfigError: a model alone, numbers below 1, pictures that cannot be read or shown to this pipeline, or
            arguments with which it does not run; nothing is changed then. If the run fails later on, the error says how
            to go on.
        StateError: nothing to calibrate, quantizing was stopped, or adapters beside the weights, which were trained for
            the ranges.
        NonFiniteError: samples become infinite or NaN.
        UnsupportedError: pictures for a scheduler that noises in a way of its own.

    Example:
        ```py
        pipe = DiffusionPipeline.from_pretrained("model", quantization_config=MSFPConfig("w4a4"))
        calibrate(pipe, num_samples=64, num_inference_steps=20)
        calibrate(pipe, images="photographs")  # a folder
        ```
    """
    if isinstance(pipe, nn.Module):
        raise ConfigError(
            f"Calibration runs a pipeline, but a {type(pipe).__name__} alone cannot be sampled. Pass the pipeline that "
            f"it belongs to; or call the model over one run of timesteps yourself, then `freeze(model)`."
        )
    models = named_quantized(pipe)
    if not models or not callable(pipe):
        raise StateError(
            f"Calibration needs a pipeline with quantized components, but {type(pipe).__name__} has none. Load it with "
            f"`quantization_config=MSFPConfig()` or call `quantize_pipeline(pipe, scheme)`."
        )
    for model in models.values():
        require_finished(model, "calibrated")
        require_in_memory(model)
    given: dict[str, Any] = {"prompts": prompts, "images": taken(images, num_samples)} | arguments
    counts: dict[str, Any] = {
        "num_samples": num_samples,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
    }
    check_calibration(pipe, models, **counts, **given)
    observe_ranges(pipe, on_progress=on_progress, **counts, **given)


def named_quantized(pipe: object) -> dict[str, nn.Module]:
    """The components of a pipeline that have quantized layers, by name."""
    found, parts = list(quantized_models(pipe)), getattr(pipe, "components", None)
    return {name: part for name, part in parts.items() if part in found} if isinstance(parts, dict) else {}


OF_CALIBRATION = ("num_samples", "num_inference_steps", "prompts", "images", "seed")
"""Arguments of `calibrate` that are not passed on."""


def refuse_images(images: object, scheme: str) -> None:
    """Of a model that observes nothing.

    Raises:
        ConfigError: pictures are given all the same.
    """
    if images is not None:
        raise ConfigError(
            f"`images` set the ranges of quantized inputs, but `{scheme}` leaves all inputs float. Leave them out."
        )


def check_calibration(
    pipe: DiffusionPipeline,
    models: Mapping[str, nn.Module],
    *,
    num_samples: int = DEFAULT_SAMPLES,
    num_inference_steps: int = 20,
    prompts: Sequence[str] | None = None,
    images: Images | None = None,
    seed: int = 0,
    **arguments: Any,
) -> None:
    """Refuse what a calibration would fail with, as far as one step shows it; nothing is changed.

    Args:
        pipe (`DiffusionPipeline`): whose models need not be quantized yet, nor have weights.
        models (`Mapping[str, nn.Module]`): quantized or to be, by name.
        num_samples, num_inference_steps, prompts, images, seed, **arguments: see `calibrate`; `images` are `taken`.

    Raises:
        ConfigError, StateError, NonFiniteError, UnsupportedError: see `calibrate`.
    """
    for model in filter(is_quantized, models.values()):
        for require in filter(None, (part.require_ranges for part in parts())):
            require(model)
    require_positive(num_samples=num_samples, num_inference_steps=num_inference_steps)
    refuse_upcast(pipe, models)
    make_arguments = call_arguments(pipe, prompts, num_inference_steps, arguments)
    ordered = [part for part in pipe.components.values() if any(part is model for model in models.values())]
    for name in (name for name in arguments if images is not None and name.endswith("_per_prompt")):
        if arguments[name] not in (None, 1):
            raise ConfigError(
                f"Each picture has a caption of its own, so `{name}` must be 1 beside `images`, but got "
                f"{arguments[name]}. Leave it out."
            )
    pictures = _pictures(pipe, ordered, images, prompts, num_samples, seed)
    try_calls(pipe, batched_calls(make_arguments, ordered, num_samples, seed), pictures)


def _pictures(
    pipe: DiffusionPipeline,
    models: Sequence[nn.Module],
    images: Images | None,
    prompts: Sequence[str] | None,
    num_samples: int,
    seed: int,
) -> NoisedPictures | None:
    """What the denoiser is to read instead of the sampler's; None for that."""
    if images is None:
        return None
    found = NoisedPictures(pipe, cast(list, images), prompts, num_samples, seed)
    for model in models:
        if model is not found.model and isinstance(model, ModelMixin):
            raise ConfigError(
                f"Pictures set the ranges of a pipeline's denoiser, but its {type(model).__name__} is to be calibrated "
                f"too. Leave `images` out: the pipeline's own samples set the ranges of both."
            )
    return found


def observe_ranges(
    pipe: DiffusionPipeline,
    *,
    num_samples: int = DEFAULT_SAMPLES,
    num_inference_steps: int = 20,
    prompts: Sequence[str] | None = None,
    images: Images | None = None,
    seed: int = 0,
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> None:
    """What `calibrate` does after its checks; arguments are the same."""
    calls = batched_calls(
        call_arguments(pipe, prompts, num_inference_steps, arguments), list(quantized_models(pipe)), num_samples, seed
    )
    observing = [model for model in quantized_models(pipe) if restart_observation(model)]
    if not observing:
        raise StateError("Nothing to calibrate: no layer of this pipeline has a quantized activation (weights only).")

    pictures = _pictures(pipe, observing, images, prompts, num_samples, seed)
    denoisers = denoisers_of(pipe, required=False)
    counted = [model for model in observing if model in denoisers.values()] or observing[:1]
    total = len(calls) * num_inference_steps
    with ExitStack() as stack:
        for model in observing:
            stack.callback(setattr, tracker(model), "paused", False)
        if on_progress is None:
            bar = stack.enter_context(DiffusionPipeline.progress_bar(pipe, total=total))  # combined ones give none
            bar.set_description("calibrating")
        stack.enter_context(quiet(pipe))
        stack.enter_context(counting_steps(counted, total, on_progress or (lambda *_, **__: bar.update())))
        stack.enter_context(torch.no_grad())
        stack.enter_context(showing(pipe, pictures))
        try:
            for call in calls:
                if pictures is not None:
                    pictures.show(call)
                call.run(pipe)
            _require_seen(pipe, observing)
            for model in observing:
                freeze(model)
        except Exception as error:  # a pipeline may fail in any way
            kind = type(error) if isinstance(error, MSFPError) else ConfigError
            raise kind(
                f"{type(pipe).__name__} must run while its activations are observed, but it fails: {describe(error)} "
                f"The weights are quantized already and stay so; the activations are float and still observed. To go "
                f"on, call `calibrate(pipe, …)` or `quantize_pipeline` again with corrected arguments; on the command "
                f"line, run the command again, which keeps what is packed."
            ) from error


def _require_seen(pipe: DiffusionPipeline, models: Sequence[nn.Module]) -> None:
    """Refuse to freeze a model that no run has called, before any is frozen.

    Raises:
        ConfigError: there is one.
    """
    names = {id(unwrap(part)): name for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for model in models:
        seen = (layer.observation for _, layer in quant_layers(model) if layer.observing)
        if not any(int(observation.count) for observation in seen if observation is not None):
            raise ConfigError(
                f"Each quantized component must be called in calibration, but `{names.get(id(model))}` was not with "
                f"these arguments and this number of steps. Call `calibrate` again with others; until then its "
                f"activations, and those of all components with it, stay float."
            )


def restart_observation(model: nn.Module) -> bool:
    """Observe anew whatever the model's scheme quantizes; False if that is nothing. What the old ranges made goes."""
    for part in parts():
        if part.of_ranges and part.detach is not None:
            part.detach(model)
    for _, layer in quant_layers(model):
        candidates = cast(LayerScheme, layer.scheme).activation
        if candidates:
            layer.start_observing(candidates)
    if not any(layer.observing for _, layer in quant_layers(model)):
        return False
    track(model)
    cast(RunTracker, tracker(model)).paused = True
    return True

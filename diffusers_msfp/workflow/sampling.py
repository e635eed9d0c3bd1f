"""How to call any stock pipeline: what it needs, how many samples at once, quietly, counting its steps."""

import inspect
from collections.abc import Callable, Sequence
from contextlib import contextmanager

import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from ..compat.diffusers import progress_bar_config
from ..errors import ConfigError
from .state import quantized_models

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


def require_positive(**numbers: int) -> None:
    """Refuse counts below 1, by name."""
    for name, value in numbers.items():
        if value < 1:
            raise ConfigError(f"`{name}` must be at least 1, but {value} came.")


def batch_size_for(models: Sequence[nn.Module], num_samples: int) -> int:
    """As many samples at once as keep the latents near 16 000 positions."""
    for model in models:
        size = getattr(model.config, "sample_size", None)
        if size:
            height, width = size if isinstance(size, Sequence) else (size, size)
            return max(1, min(16, num_samples, PIXELS_PER_BATCH // (height * width)))
    return 1


Generators = torch.Generator | list[torch.Generator]


def call_arguments(
    pipe, prompts: Sequence[str] | None, num_inference_steps: int, given: dict
) -> Callable[[int, int, Generators], dict]:
    """How to call this pipeline: a function of (index of the first sample, batch size, generator or one a sample)."""
    parameters = inspect.signature(pipe.__call__).parameters
    prompts = list(prompts) if prompts is not None else list(DEFAULT_PROMPTS)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"`prompts` must be a non-empty list of strings, but {prompts!r} came.")
    num_classes = num_classes_of(pipe)
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
            f"`{needed[0]}=…`."
        )
    decoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    skip_decoding = decoder is not None and decoder not in list(quantized_models(pipe))

    def draw_labels(size: int, generator: Generators) -> list[int]:
        if isinstance(generator, list):
            return [label for one in generator for label in draw_labels(1, one)]
        drawer = torch.Generator().manual_seed(generator.initial_seed())
        return torch.randint(num_classes, (size,), generator=drawer).tolist()

    def make(start: int, size: int, generator: Generators) -> dict:
        arguments = {"generator": generator, "num_inference_steps": num_inference_steps}
        arguments["output_type"] = "latent" if skip_decoding else "np"
        if "prompt" in parameters:
            arguments["prompt"] = [prompts[(start + i) % len(prompts)] for i in range(size)]
        elif "class_labels" in parameters and num_classes:
            arguments["class_labels"] = draw_labels(size, generator)
        else:
            arguments["batch_size"] = size
        return {key: value for key, value in arguments.items() if key in parameters} | given

    return make


def num_classes_of(pipe) -> int | None:
    """How many class labels a pipeline's models know; None where they take none."""
    models = [m for m in pipe.components.values() if isinstance(m, nn.Module) and hasattr(m, "config")]
    return next((n for m in models if (n := getattr(m.config, "num_embeds_ada_norm", None))), None)


def batched_calls(make: Callable, models: Sequence[nn.Module], num_samples: int, seed: int) -> list[dict]:
    """The arguments of each call that `num_samples` take; equal seeds give equal noise.

    Args:
        make (`Callable`): see `call_arguments`.
        models (`Sequence[nn.Module]`): as for `batch_size_for`.
    """
    size = batch_size_for(models, num_samples)
    return [
        make(start, min(size, num_samples - start), torch.Generator().manual_seed(seed + start))
        for start in range(0, num_samples, size)
    ]


def takes_ddim(scheduler) -> bool:
    """Whether DDIM, or another solver of the same equation, can take a scheduler's place: not where it is a flow's."""
    config = scheduler.config
    return "beta_schedule" in config and config.get("prediction_type") in ("epsilon", "v_prediction", "sample")


def with_ddim(pipe, eta: float = 0.0):
    """The same pipeline on a DDIM scheduler; one whose model predicts a flow keeps its own.

    Args:
        pipe (`DiffusionPipeline`): not changed.
        eta (`float`): 0 is deterministic, 1 as noisy as DDPM.
    """
    if not takes_ddim(pipe.scheduler):
        return pipe
    scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    if eta:
        step = scheduler.step
        scheduler.step = lambda *args, **kwargs: step(*args, **{**kwargs, "eta": eta})
    return type(pipe)(**{**pipe.components, "scheduler": scheduler})


def denoiser_name(pipe) -> str:
    """Under which name a pipeline has the network that predicts noise."""
    for name in ("unet", "transformer", "prior"):
        if getattr(pipe, name, None) is not None:
            return name
    raise ConfigError(f"A pipeline must have a `unet`, `transformer` or `prior`, but {type(pipe).__name__} has none.")


def denoiser_of(pipe) -> nn.Module:
    """The network that predicts noise."""
    return getattr(pipe, denoiser_name(pipe))


def model_output(output) -> Tensor:
    """What a denoiser predicts, whether it returns a tuple or an output object."""
    return output[0] if isinstance(output, tuple) else output.sample


@contextmanager
def quiet(pipe):
    """Without the pipeline's own progress bars."""
    before = progress_bar_config(pipe)
    pipe.set_progress_bar_config(**before | {"disable": True})
    try:
        yield
    finally:
        pipe.set_progress_bar_config(**before)


@contextmanager
def counting_steps(model: nn.Module, total: int, on_step: Callable[[int, int], None] | None):
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

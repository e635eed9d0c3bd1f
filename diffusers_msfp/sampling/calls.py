"""How to call any stock pipeline: what it needs, how many samples at once, from which seed, quietly."""

import inspect
import random
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..compat.diffusers import (
    execution_device,
    labels_by_name,
    progress_bar_config,
    set_progress_bar_config,
    source_of,
)
from ..errors import ConfigError
from ..results import OnProgress
from .denoisers import attention_kept, batch_size_for, labels_of, say_unnamed
from .observation import quantized_models
from .rows import by_picture, in_turn
from .solvers import require_finite_steps

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


def require_positive(**numbers: int) -> None:
    """Refuse counts below 1, and what is no whole number, by name."""
    for name, value in numbers.items():
        if not isinstance(value, Integral):
            raise ConfigError(f"`{name}` must be a whole number, but got {value!r}.")
        if value < 1:
            raise ConfigError(f"`{name}` must be at least 1, but got {value}.")


Generators = torch.Generator | list[torch.Generator]
SET_BY_VERBS = {
    "generator": "everything random follows `seed`",
    "batch_size": "the number of samples says how many are drawn",
    "prompt": "prompts are given as `prompts=[…]` and taken in turn",
    "return_dict": "results are read by their names",
}
"""Arguments of pipelines that cannot be passed on, and why."""


_SEEDED = ContextVar("seeded", default=False)


def follows_seed() -> bool:
    """Whether what runs now is drawn from a seed, so that equal seeds are to give equal results."""
    return _SEEDED.get()


@contextmanager
def drawing_from(seed: int, pipe: object = None) -> Iterator[None]:
    """Let everything that draws random numbers without a generator of its own follow a seed.

    The states of torch (on the CPU and where the pipeline runs), numpy and `random` are afterwards what they were.

    Args:
        seed (`int`): equal seeds give equal draws, which are independent of those of a generator with this seed.
        pipe (`DiffusionPipeline`, *optional*): whose devices' generators count too.
    """
    own, numpys, torchs = (int(n) for n in np.random.SeedSequence(seed % 2**64).generate_state(3))
    with ExitStack() as stack:
        stack.callback(_SEEDED.reset, _SEEDED.set(True))
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.callback(torch.set_rng_state, torch.get_rng_state())
        random.seed(own)
        np.random.seed(numpys)
        torch.set_rng_state(torch.Generator().manual_seed(torchs).get_state())
        for device in _accelerators(pipe):
            module = torch.get_device_module(device)
            where = () if device.type == "mps" else (device,)
            stack.callback(module.set_rng_state, module.get_rng_state(*where), *where)
            module.set_rng_state(torch.Generator(device).manual_seed(torchs).get_state(), *where)
        yield


def _accelerators(pipe: object) -> set[torch.device]:
    """Devices that a pipeline computes on, but for the CPU."""
    used = [getattr(pipe, "device", None), execution_device(pipe)]
    parts = getattr(pipe, "components", None) or {}
    used += [getattr(part, "device", None) for part in parts.values() if isinstance(part, nn.Module)]
    return {each for each in used if isinstance(each, torch.device) and each.type not in ("cpu", "meta")}


@dataclass(frozen=True)
class Call:
    """One call of a pipeline.

    Args:
        arguments (`dict[str, Any]`): of the call.
        seed (`int`): of what the pipeline draws without its generator.
        first, size (`int`): number of its first sample, and how many it has.
    """

    arguments: dict[str, Any]
    seed: int
    first: int = 0
    size: int = 1

    def run(self, pipe: DiffusionPipeline) -> Any:
        """What the pipeline returns; the user's random states stay as they are."""
        with drawing_from(self.seed, pipe), attention_kept(pipe):
            return cast(Any, pipe)(**self.arguments)


def call_arguments(
    pipe: DiffusionPipeline, prompts: Sequence[str] | None, num_inference_steps: int, given: dict
) -> Callable[[int, int, Generators], Call]:
    """How to call this pipeline: a function of (index of the first sample, batch size, generator or one a sample).

    Raises:
        ConfigError: something that the pipeline needs is missing, or is given that is not for the caller to give.
        NonFiniteError: its scheduler makes infinity or NaN of finite samples.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    named = prompts is not None
    prompts = [prompts] if isinstance(prompts, str) else list(DEFAULT_PROMPTS if prompts is None else prompts)
    if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
        raise ConfigError(f"`prompts` must be a non-empty list of strings, but got {prompts!r}.")
    if named and "prompt" not in parameters:
        raise ConfigError(
            f"`prompts` need a pipeline that takes them, but {type(pipe).__name__} takes none. Leave them out."
        )
    for name in (name for name in SET_BY_VERBS if given.get(name) is not None):  # None makes room for embeddings
        raise ConfigError(f"`{name}` cannot be passed on to the pipeline, since {SET_BY_VERBS[name]}. Leave it out.")
    given = known_arguments(pipe, given)
    labels = labels_of(pipe)
    if labels and not labels_by_name(pipe) and "class_labels" in parameters and "class_labels" not in given:
        say_unnamed(type(pipe).__name__, len(labels))
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
    if getattr(pipe, "scheduler", None) is not None:
        with drawing_from(0):
            require_finite_steps(pipe.scheduler, num_inference_steps)
    decoder = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
    skip_decoding = decoder is not None and decoder not in list(quantized_models(pipe))
    skip_decoding &= "output_latent" not in parameters  # which of Marigold's say beside the type of the rest

    def draw_labels(size: int, generator: Generators) -> list[int]:
        if isinstance(generator, list):
            return [label for one in generator for label in draw_labels(1, one)]
        drawer = torch.Generator().manual_seed(generator.initial_seed())
        return [labels[i] for i in torch.randint(len(labels), (size,), generator=drawer, device="cpu")]

    def make(start: int, size: int, generator: Generators) -> Call:
        arguments: dict[str, Any] = {"generator": generator, "batch_size": size}
        steps = ("num_inference_steps", "prior_num_inference_steps")  # of pipelines with a prior of their own
        arguments |= dict.fromkeys(steps, num_inference_steps)
        arguments["output_type"] = "latent" if skip_decoding else "np"
        if "prompt" in parameters:
            arguments["prompt"] = in_turn(prompts, start, size)
            del arguments["batch_size"]
        if "class_labels" in parameters and labels:
            arguments["class_labels"] = draw_labels(size, generator)
        seed = (generator[0] if isinstance(generator, list) else generator).initial_seed()
        arguments = {key: value for key, value in arguments.items() if key in parameters} | given
        return Call(arguments | by_picture(arguments, parameters, start, size), seed, start, size)

    return make


def known_arguments(pipe: DiffusionPipeline, given: dict) -> dict:
    """Arguments that a pipeline's call takes; an output type that it does not know is left out.

    Raises:
        ConfigError: another one is unknown.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    more = {"output_type"}
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        source = source_of(pipe.__call__)
        if source is None or not type(pipe).__module__.startswith("diffusers.") or source.count("**kwargs") > 1:
            return given  # whatever becomes of them
        more |= set(re.findall(r'kwargs\.(?:pop|get)\("(\w+)"', source))  # names of older versions; others are dropped
    for name in given.keys() - parameters.keys() - more:
        raise ConfigError(f"Arguments passed on must be among those of {type(pipe).__name__}, but got `{name}`.")
    return {name: value for name, value in given.items() if name in parameters or name in more - {"output_type"}}


def _require_whole(seed: int) -> None:
    if not isinstance(seed, Integral):
        raise ConfigError(f"`seed` must be a whole number, but got {seed!r}.")


def unseen(seed: int) -> int:
    """The seed that an evaluation draws from, away from `seed` and those after it, which methods draw theirs from.

    A checkpoint is so not measured on the noise that it was calibrated or trained on, with equal `seed`s as with
    defaults.
    """
    _require_whole(seed)
    return int(np.random.SeedSequence(int(seed) % 2**64).generate_state(1)[0])


def batched_calls(make: Callable, models: Sequence[nn.Module], num_samples: int, seed: int) -> list[Call]:
    """The calls that `num_samples` take; equal seeds give equal noise.

    Args:
        make (`Callable`): see `call_arguments`.
        models (`Sequence[nn.Module]`): as for `batch_size_for`.
    """
    _require_whole(seed)
    size = batch_size_for(models, num_samples)
    return [
        make(start, min(size, num_samples - start), torch.Generator().manual_seed(seed + start))
        for start in range(0, num_samples, size)
    ]


@contextmanager
def quiet(pipe: DiffusionPipeline) -> Iterator[None]:
    """Without the progress bars of the pipeline and of those that it is combined from."""
    parts = [pipe, *(part for part in vars(pipe).values() if isinstance(part, DiffusionPipeline))]
    before = [progress_bar_config(part) for part in parts]
    for part, config in zip(parts, before, strict=True):
        set_progress_bar_config(part, config | {"disable": True})
    try:
        yield
    finally:
        for part, config in zip(parts, before, strict=True):
            set_progress_bar_config(part, config)


@contextmanager
def counting_steps(models: Iterable[nn.Module], total: int, on_progress: OnProgress | None) -> Iterator[None]:
    """Report each call of one of the models."""
    done = 0

    def count(*_: object) -> None:
        nonlocal done
        done += 1
        if on_progress is not None:
            on_progress(done, max(total, done))

    handles = [model.register_forward_hook(count) for model in models]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()

"""Pictures for an evaluation: the noise of each depends on the seed and its index alone.

They are made in fixed groups, so that neither the number of processes nor a kill changes them, and kept as float16 (its
rounding lies 75 dB below the picture). On one core of a Zen 5 the embedded model takes 4.1 ms a picture and step in
float32 and 2.1 ms at `w4a4` in groups of 32; 2.4 ms in 16, 3.3 ms in 128.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from ...compat.torch import tree_leaves
from ...errors import ConfigError, StateError
from ...methods.previews import pictures_tensor
from ...methods.runs import inputs_digest, plain_config
from ...results import OnProgress
from ...sampling.calls import Call, call_arguments, counting_steps, quiet, require_positive, unseen
from ...sampling.denoisers import batch_size_for, denoisers_of, labels_of
from ...sampling.observation import quantized_models
from ...sampling.solvers import with_sampler


def noise_generator(seed: int, index: int) -> torch.Generator:
    """The random numbers of one picture; no two pictures of a run share them."""
    return torch.Generator().manual_seed((unseen(seed) + index) % 2**32)


def arguments_of(
    pipe: DiffusionPipeline, num_samples: int, seed: int, prompts: list[str] | None, arguments: dict
) -> dict[str, Any]:
    """Those of a single call for all that `draw_pictures` makes in groups, whose prompts and labels are the same."""
    noise = [noise_generator(seed, index) for index in range(num_samples)]
    return call_arguments(pipe, prompts, 1, arguments)(0, num_samples, noise).arguments


def pictures_of(pipe: DiffusionPipeline, call: Call, *, several: bool = False) -> Tensor:
    """Those that a pipeline makes in a call, see `pictures_tensor`.

    Args:
        several (`bool`): it may make more than one for each that it is asked for.

    Raises:
        ConfigError: they are more or fewer than asked for.
    """
    images = pictures_tensor(call.run(pipe))
    if len(images) != call.size and not (several and len(images) and len(images) % call.size == 0):
        raise ConfigError(
            f"A call must make as many pictures as it is asked for, but {type(pipe).__name__} made {len(images)} "
            f"where {call.size} were to come: their number follows something else that is passed on, such as labels, "
            f"embeddings or a picture. Leave it out, or pass on {call.size} of each, or prompts, or ask for one sample."
        )
    return images


def require_one_a_prompt(arguments: Mapping[str, Any]) -> None:
    """Refuse several pictures of a prompt at once: prompts are taken in turn, and each sample is one picture."""
    for name in (name for name in arguments if name.endswith("_per_prompt") and arguments[name] not in (None, 1)):
        raise ConfigError(
            f"Each picture must have noise of its own, so `{name}` must be 1, but got {arguments[name]}. Leave it out "
            f"and raise `num_samples`: prompts are taken in turn."
        )


def draw_pictures(
    pipe: DiffusionPipeline,
    *,
    num_samples: int,
    num_inference_steps: int,
    seed: int = 0,
    sampler: str | None = None,
    prompts: list[str] | None = None,
    folder: Path | None = None,
    share: tuple[int, int] = (0, 1),
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> Tensor:
    """Pictures of a pipeline, made or found.

    Args:
        pipe (`DiffusionPipeline`): not changed.
        num_samples, num_inference_steps, seed (`int`): pictures, denoising steps, seed of the noise.
        sampler (`str`, *optional*): see `with_sampler`.
        prompts (`list[str]`, *optional*): taken in turn where the pipeline takes prompts.
        folder (`Path`, *optional*): where pictures are kept, in a folder for each checkpoint and way of sampling; what
            is there is not made again.
        share (`tuple[int, int]`): which of how many processes this one is; each makes every so-many-th group.
        on_progress (`OnProgress`, *optional*): called with (done, total) after each step.
        **arguments: passed on to the pipeline.

    Returns:
        `Tensor`, `(n, channels, H, W)`, float16, in [0, 1] but for NaN: this share's groups in order.

    Raises:
        ConfigError: numbers below 1, several pictures of a prompt at once, a function beside `folder`, or see
            `call_arguments`.
        StateError: a `folder` for models whose weights are not in memory.
    """
    require_positive(num_samples=num_samples, num_inference_steps=num_inference_steps)
    require_one_a_prompt(arguments)
    pipe = with_sampler(pipe, sampler, arguments=arguments)
    denoisers = list(denoisers_of(pipe).values())
    make = call_arguments(pipe, prompts, num_inference_steps, {"output_type": "pt"} | arguments)
    size = min(num_samples, 2 * batch_size_for(denoisers, num_samples))
    if folder is not None:
        folder = folder / _identity(pipe, num_inference_steps, seed, prompts, arguments)
        folder.mkdir(parents=True, exist_ok=True)
    groups = [(start, min(start + size, num_samples)) for start in range(0, num_samples, size)][share[0] :: share[1]]
    kept = {group: _read(folder, group) for group in groups}
    missing = [group for group in groups if kept[group] is None]
    with quiet(pipe), torch.no_grad(), counting_steps(denoisers, len(missing) * num_inference_steps, on_progress):
        for start, end in missing:
            noise = [noise_generator(seed, index) for index in range(start, end)]
            images = pictures_of(pipe, make(start, end - start, noise))
            kept[start, end] = made = images.numpy().astype(np.float16)
            if folder is not None:
                _write(folder, (start, end), made)
    return torch.from_numpy(np.concatenate([kept[group] for group in groups])) if groups else torch.empty(0)


def settings_of(scheduler: SchedulerMixin) -> str:
    """Class and config as text, in which equal ones are alike wherever they were read from."""
    return json.dumps([type(scheduler).__name__, plain_config(scheduler)], sort_keys=True, default=repr)


def _identity(
    pipe: DiffusionPipeline, num_inference_steps: int, seed: int, prompts: list[str] | None, arguments: dict
) -> str:
    """A name for all that pictures depend on, beside their number.

    Raises:
        ConfigError: a function is passed on, which no name can tell from another.
        StateError: a model's weights are not in memory.
    """
    for name in (name for name, value in arguments.items() if any(map(callable, tree_leaves(value)))):
        raise ConfigError(
            f"`folder` keeps pictures under a name that says what they depend on, but `{name}` is a function, which "
            f"may do anything. Leave one of them out."
        )
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    for name in (name for name, part in models.items() if any(each.is_meta for each in part.state_dict().values())):
        raise StateError(
            f"`folder` keeps pictures under a name made from all weights, but those of `{name}` are not in memory. "
            f"Leave `folder` out, or run the pipeline without offloading."
        )
    parts = {name: inputs_digest(model, repr(model), plain_config(model)) for name, model in models.items()}
    running = [
        (getattr(getattr(module, "engine", None), "name", None), getattr(module, "strength", None))
        for model in quantized_models(pipe)
        for module in model.modules()
    ]
    set_by_others = [_set_by_others(model) for model in models.values()]
    schedulers = [each for each in pipe.components.values() if isinstance(each, SchedulerMixin)]
    scheduler = [settings_of(each) for each in schedulers]
    asked = [num_inference_steps, seed, prompts, inputs_digest(nn.Identity(), arguments), list(labels_of(pipe))]
    versions = [version("diffusers-msfp"), diffusers.__version__, torch.__version__]
    described = [type(pipe).__name__, plain_config(pipe), parts, running, set_by_others, scheduler, versions, *asked]
    return hashlib.sha256(json.dumps(described, sort_keys=True, default=repr).encode()).hexdigest()[:20]


_OF_ADAPTERS = ("scaling", "_active_adapter", "_disable_adapters", "merged_adapters")
_OF_FREEU = ("s1", "s2", "b1", "b2")


def _set_by_others(model: nn.Module) -> list[str]:
    """What PEFT, FreeU and IP-Adapters keep in attributes, beside all that a state and a config tell."""
    found = []
    for name, module in model.named_modules():
        told = {key: vars(module)[key] for key in (*_OF_ADAPTERS, *_OF_FREEU) if vars(module).get(key) is not None}
        scale = getattr(getattr(module, "processor", None), "scale", None)
        found += [f"{name} {told} {scale}"] if told or scale is not None else []
    return found


def _file(folder: Path, group: tuple[int, int]) -> Path:
    return folder / f"{group[0]:07}-{group[1]:07}.npy"


def _read(folder: Path | None, group: tuple[int, int]) -> np.ndarray | None:
    if folder is None or not _file(folder, group).is_file():
        return None
    try:
        images = np.load(_file(folder, group))
    except (ValueError, EOFError):  # damaged: made again
        return None
    return images if images.ndim in (4, 5) and len(images) == group[1] - group[0] else None  # pictures, or videos


def _write(folder: Path, group: tuple[int, int], images: np.ndarray) -> None:
    """Complete or not at all."""
    part = folder / f"{group[0]}-{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            np.save(file, images)
        part.replace(_file(folder, group))
    finally:
        part.unlink(missing_ok=True)

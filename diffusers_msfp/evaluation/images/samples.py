"""Pictures for an evaluation: the noise of each depends on the seed and its index alone.

They are made in fixed groups, so that neither the number of processes nor a kill changes them, and kept as float16 (its
rounding lies 75 dB below the picture). On one core of a Zen 5 the embedded model takes 4.1 ms a picture and step in
float32 and 2.1 ms at `w4a4` in groups of 32; 2.4 ms in 16, 3.3 ms in 128.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, SchedulerMixin
from torch import Tensor, nn

from ...errors import ConfigError, UnsupportedError
from ...methods.runs import inputs_digest, plain_config
from ...results import OnProgress
from ...sampling.calls import batch_size_for, call_arguments, counting_steps, quiet, require_positive, unseen
from ...sampling.denoisers import denoisers_of, labels_of
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


def pictures_tensor(output: Any) -> Tensor:
    """The pictures, or videos, that a pipeline puts out for `pt`, or for `np` where it knows no other.

    Args:
        output (`BaseOutput` or `tuple`): `images`, `frames`, or else the first field.

    Returns:
        `Tensor`, `(N, channels, H, W)` or `(N, frames, channels, H, W)`, float32.

    Raises:
        UnsupportedError: sound, or something else that is no picture.
    """
    named = (getattr(output, name, None) for name in ("images", "frames"))
    images = next((images for images in named if images is not None), None)
    images = output[0] if images is None else images
    if hasattr(output, "audios") or (hasattr(images, "ndim") and images.ndim not in (4, 5)):
        raise UnsupportedError(
            f"Pictures and videos can be compared, but the pipeline's {type(output).__name__} holds something else, "
            f"such as sound. Compare its denoiser's outputs by your own calls."
        )
    if isinstance(images, Tensor):
        return images.float().cpu()
    return torch.from_numpy(np.asarray(images, dtype=np.float32)).movedim(-1, -3)


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
        ConfigError: numbers below 1, several pictures of a prompt at once, or see `call_arguments`.
    """
    require_positive(num_samples=num_samples, num_inference_steps=num_inference_steps)
    for name in (name for name in arguments if name.endswith("_per_prompt") and arguments[name] not in (None, 1)):
        raise ConfigError(
            f"Each picture must have noise of its own, so `{name}` must be 1, but got {arguments[name]}. Leave it out "
            f"and raise `num_samples`: prompts are taken in turn."
        )
    pipe = with_sampler(pipe, sampler)
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
            images = pictures_tensor(make(start, end - start, noise).run(pipe))
            if len(images) != end - start:
                raise ConfigError(
                    f"A call must make as many pictures as it is given noises, but {type(pipe).__name__} made "
                    f"{len(images)} of {end - start}: its number follows something else that is passed on, such as "
                    f"embeddings. Pass on {end - start} rows of these, or prompts."
                )
            kept[start, end] = made = images.numpy().astype(np.float16)
            if folder is not None:
                _write(folder, (start, end), made)
    return torch.from_numpy(np.concatenate([kept[group] for group in groups])) if groups else torch.empty(0)


def _identity(
    pipe: DiffusionPipeline, num_inference_steps: int, seed: int, prompts: list[str] | None, arguments: dict
) -> str:
    """A name for all that pictures depend on, beside their number."""
    models = {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}
    parts = {name: inputs_digest(model, repr(model), plain_config(model)) for name, model in models.items()}
    running = [
        (getattr(getattr(module, "engine", None), "name", None), getattr(module, "strength", None))
        for model in quantized_models(pipe)
        for module in model.modules()
    ]
    set_by_others = [_set_by_others(model) for model in models.values()]
    schedulers = [each for each in pipe.components.values() if isinstance(each, SchedulerMixin)]
    scheduler = [[type(each).__name__, plain_config(each)] for each in schedulers]
    asked = [num_inference_steps, seed, prompts, inputs_digest(nn.Identity(), arguments), list(labels_of(pipe))]
    described = [type(pipe).__name__, parts, running, set_by_others, scheduler, *asked]
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
    return images if images.ndim == 4 and len(images) == group[1] - group[0] else None


def _write(folder: Path, group: tuple[int, int], images: np.ndarray) -> None:
    """Complete or not at all."""
    part = folder / f"{group[0]}-{os.getpid()}.part"
    try:
        with open(part, "wb") as file:
            np.save(file, images)
        part.replace(_file(folder, group))
    finally:
        part.unlink(missing_ok=True)

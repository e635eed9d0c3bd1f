"""A user's pictures as inputs of a denoiser: encoded, noised at uniformly drawn timesteps, in place of the sampler's.

The pipeline runs as it always does, so its conditions, guidance and arguments are what they are in use; only what its
denoiser is called with is exchanged: the sample for noised pictures, the timestep for the one they are noised at.
"""

import inspect
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from diffusers import DiffusionPipeline, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image
from torch import Tensor, nn

from ..calibration.pictures import fitted, opened, picture_files
from ..compat.accelerate import device_of_calls
from ..errors import ConfigError, NonFiniteError, UnsupportedError
from .calls import Call, require_positive
from .denoisers import denoiser_name, denoisers_of, scheduler_of
from .solvers import OTHER_EQUATIONS
from .timestep import Telling, require_timesteps, telling_of
from .used_output import place_of, watching_samples

FLOWS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
Images = str | Path | Iterable[Image.Image | np.ndarray | Tensor | str | Path]


def taken(images: Images | None, num_samples: int) -> list | None:
    """The pictures that so many samples need: a folder's files, or the first of an iterable; None where there are none.

    Raises:
        ConfigError: it is neither, or has no picture, or they are no number of samples.
    """
    require_positive(num_samples=num_samples)
    if images is None:
        return None
    if isinstance(images, str | Path):
        return picture_files(images)[:num_samples]
    if not isinstance(images, Iterable) or isinstance(images, Image.Image):
        raise ConfigError(f"`images` must be a folder or an iterable of pictures, but got {type(images).__name__}.")
    found = list(islice(images, num_samples))
    if not found:
        raise ConfigError("`images` must hold a picture at least, but there is none.")
    return found


def _as_inputs(images: list[Image.Image], shape: tuple[int, ...]) -> Tensor:
    """`(N, *shape)`, float32 in [-1, 1]."""
    return torch.stack([fitted(image, shape) for image in images]).float() / 127.5 - 1


class NoisedPictures:
    """Exchanges what a pipeline's denoiser is called with for a user's pictures, noised.

    Pictures are taken in turn, call by call of the pipeline; each call of the denoiser draws a timestep, uniformly from
    those that the model was trained on, and noise. Latents are the autoencoder's modes, with its factors.

    Args:
        pipe (`DiffusionPipeline`): with one denoiser, and for latents its `vae` or `vqvae`.
        images (`list`): of what `opened` takes, see `taken`.
        prompts (`list[str]`, *optional*): a caption for each picture, or one for all.
        num_samples (`int`): how many samples will be seen.
        seed (`int`): of timesteps and noise.

    Raises:
        ConfigError: no pictures, captions of another number, or a pipeline whose inputs are not those of pictures.
        UnsupportedError: its scheduler is of a kind whose noise is not known here.
    """

    def __init__(self, pipe: DiffusionPipeline, images: list, prompts: Any, num_samples: int, seed: int) -> None:
        self.images = images
        given = len(prompts) if isinstance(prompts, list | tuple) else 1
        if given not in (1, len(self.images)) and not given >= num_samples == len(self.images):
            raise ConfigError(
                f"`prompts` beside `images` must be a caption for each picture or one for all, but got {given} "
                f"for {len(self.images)} pictures (of {num_samples} samples)."
            )
        if len(denoisers_of(pipe)) > 1 or getattr(pipe, "controlnet", None) is not None:
            raise ConfigError(
                f"Pictures can be shown to a pipeline's only denoiser, but {type(pipe).__name__} has several networks "
                f"that look at them. Leave `images` out: its own samples set the ranges."
            )
        self.pipe, self.scheduler, self.name = pipe, scheduler_of(pipe), denoiser_name(pipe)
        (self.model,) = denoisers_of(pipe).values()
        self.argument = require_timesteps(self.model)
        self.vae = getattr(pipe, "vae", None) or getattr(pipe, "vqvae", None)
        config = self.scheduler.config
        flows = bool(config.get("use_flow_sigmas")) or config.get("prediction_type") == "flow_prediction"
        self.flows = flows or isinstance(self.scheduler, FLOWS)
        known = isinstance(getattr(self.scheduler, "alphas_cumprod", None), Tensor)
        known &= config.get("timestep_type", "discrete") == "discrete"  # else the model is told the noise
        if not (self.flows or known) or isinstance(self.scheduler, OTHER_EQUATIONS[2:]):
            raise UnsupportedError(
                f"Pictures can be noised as diffusion with `alphas_cumprod` or flow matching has it, but "
                f"{type(self.scheduler).__name__} has another way. Leave `images` out: its own samples set the ranges."
            )
        self.generator = torch.Generator().manual_seed(seed)
        self.first, self.size, self._encoded = 0, 0, cast("tuple[tuple, Tensor] | None", None)
        self.telling: Telling | None = None
        self._read: Tensor | None = None

    def show(self, call: Call) -> None:
        """Take the pictures of a call of the pipeline, which is to run next."""
        self.first, self.size, self._encoded = call.first, call.size, None

    @torch.no_grad()
    def exchange(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Of a call of the denoiser, as a forward pre-hook; what is beside the sample stays as it is."""
        _, name, *_ = inspect.signature(type(self.model).forward).parameters
        sample = kwargs[name] if name in kwargs else args[0]
        pictures, self._read = self._pictures(sample), sample
        kept, added, timestep = self._draw(self.argument.given(args, kwargs))
        noise = torch.randn(pictures.shape, generator=self.generator, device="cpu")
        noised = (kept * pictures + added * noise).to(sample.device, sample.dtype)
        noised = noised.repeat(len(sample) // len(noised), *[1] * (noised.ndim - 1))
        noised = torch.cat([noised, sample[:, noised.shape[1] :]], 1)  # a mask, a picture to be edited
        args, kwargs = self.argument.put(args, kwargs, timestep)
        return (args, kwargs | {name: noised}) if name in kwargs else ((noised, *args[1:]), kwargs)

    def check_place(self, sample: Tensor) -> None:
        """Refuse a pipeline that joins something before its sampler's sample, or beside it: pictures would go there.

        Args:
            sample (`Tensor`): that the sampler steps from, after a call whose sample was exchanged.

        Raises:
            UnsupportedError: it does.
        """
        read = self._read
        place = () if read is None else place_of(sample, read, read)
        if place and (len(place) != 2 or place[1].start is not None):
            raise UnsupportedError(
                f"Pictures take the place of the sampler's sample, the first channels that a denoiser reads, but "
                f"{type(self.pipe).__name__} has it elsewhere. Leave `images` out: its own samples set the ranges."
            )

    def _draw(self, current: Any) -> tuple[float, float, Any]:
        """Shares of picture and noise, and the timestep as the model takes it."""
        trained = self.scheduler.config.num_train_timesteps
        if self.telling is None:
            self.telling = self._told(float(torch.as_tensor(current, device="cpu").max()), trained)
        scale, start, _ = self.telling
        if self.flows:
            sigma = 1 - torch.rand((), generator=self.generator, device="cpu").item()  # in (0, 1]
            own = trained * (1 - sigma if self.scheduler.config.get("invert_sigmas") else sigma)
            kept, added, timestep = 1 - sigma, sigma, (own - start) / scale
        else:
            drawn = int(torch.randint(trained, (), generator=self.generator, device="cpu"))
            share = self.scheduler.alphas_cumprod[drawn].item()
            kept, added, timestep = share**0.5, (1 - share) ** 0.5, drawn if scale == 1 else (drawn - start) / scale
        return kept, added, torch.full_like(current, timestep) if isinstance(current, Tensor) else timestep

    def _told(self, given: float, trained: int) -> Telling:
        """How the pipeline tells its denoiser the timestep, by what it gives in its first call."""
        telling = telling_of(self.scheduler, given, trained)
        if telling is None:
            begun = getattr(self.scheduler, "begin_index", None) or 0
            raise UnsupportedError(
                f"Pictures are noised as much as the denoiser is told, but {type(self.pipe).__name__} tells it "
                f"{given:g} at the timestep {self.scheduler.timesteps[begun : begun + 1].tolist()} of its scheduler. "
                f"Leave `images` out: its own samples set the ranges."
            )
        return telling

    def _pictures(self, sample: Tensor) -> Tensor:
        """The call's pictures as the denoiser reads them, float32 on the CPU, once for all its steps."""
        if not isinstance(sample, Tensor) or sample.ndim != 4 or len(sample) % self.size:
            shown = tuple(sample.shape) if isinstance(sample, Tensor) else type(sample).__name__
            raise ConfigError(
                f"Pictures need a denoiser that reads them as (batch, channels, height, width), but "
                f"{type(self.pipe).__name__} calls its `{self.name}` with {shown}. Leave `images` out: its own samples "
                f"set the ranges."
            )
        if self._encoded is not None and self._encoded[0] == sample.shape[1:]:
            return self._encoded[1]
        height, width = sample.shape[2:]
        chosen = [opened(self.images[(self.first + i) % len(self.images)]) for i in range(self.size)]
        if self.vae is None:
            shape = (sample.shape[1], height, width)
            if shape[0] not in (1, 3):
                raise ConfigError(
                    f"Pictures have 1 or 3 channels, but the `{self.name}` of {type(self.pipe).__name__}, which has no "
                    f"`vae` to encode them, reads {shape[0]}. Leave `images` out: its own samples set the ranges."
                )
            pictures = _as_inputs(chosen, shape)
        else:
            scale = getattr(self.pipe, "vae_scale_factor", None) or 2 ** (len(self.vae.config.block_out_channels) - 1)
            shape = (self.vae.config.in_channels, scale * height, scale * width)
            pictures = self._latents(_as_inputs(chosen, shape))
            if pictures.shape[2:] != sample.shape[2:] or pictures.shape[1] > sample.shape[1]:
                raise ConfigError(
                    f"Encoded pictures must have the shape that the denoiser reads, {tuple(sample.shape[1:])}, but "
                    f"{type(self.vae).__name__} makes {tuple(pictures.shape[1:])} of them. Leave `images` out: the "
                    f"pipeline's own samples set the ranges."
                )
        self._encoded = sample.shape[1:], pictures
        return pictures

    def _latents(self, pictures: Tensor) -> Tensor:
        """`(N, channels, h, w)`, float32, shifted and scaled as the denoiser was trained."""
        vae: Any = self.vae
        config = vae.config
        encoded = vae.encode(pictures.to(device_of_calls(vae), vae.dtype))
        encoded = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded[0]
        latents = encoded.float().cpu()
        if not latents.isfinite().all():
            raise NonFiniteError(
                f"Encoded pictures must be finite, but {type(vae).__name__} makes NaN or infinity of them in "
                f"{str(vae.dtype).removeprefix('torch.')}. Load it in a wider dtype."
            )
        mean, std = (getattr(config, f"latents_{name}", None) for name in ("mean", "std"))
        shift, factor = getattr(config, "shift_factor", None) or 0.0, getattr(config, "scaling_factor", None) or 1.0
        if mean is not None and std is not None:
            mean, std = (
                torch.tensor(each, dtype=torch.float32, device="cpu").view(1, -1, 1, 1) for each in (mean, std)
            )
            return (latents - mean) * factor / std
        return (latents - shift) * factor


@contextmanager
def showing(pipe: DiffusionPipeline, pictures: NoisedPictures | None) -> Iterator[None]:
    """Within the block a pipeline's denoiser reads pictures, if there are any, before all that looks at its inputs."""
    if pictures is None:
        yield
        return
    (model,) = denoisers_of(pipe).values()
    pictures.scheduler, pictures.telling = scheduler_of(pipe), None  # a trial has a scheduler of its own
    handle = model.register_forward_pre_hook(pictures.exchange, prepend=True, with_kwargs=True)
    try:
        with watching_samples(pictures.scheduler, pictures.check_place):
            yield
    finally:
        handle.remove()

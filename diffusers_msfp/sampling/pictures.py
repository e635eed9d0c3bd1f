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
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor, nn

from ..compat.accelerate import device_of_calls
from ..errors import ConfigError, NonFiniteError, UnsupportedError
from .calls import Call, require_positive
from .denoisers import denoiser_name, denoisers_of, scheduler_of
from .solvers import OTHER_EQUATIONS
from .timestep import Telling, require_timesteps, tellings

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")
FLOWS = (FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler)
Images = str | Path | Iterable[Image.Image | np.ndarray | Tensor | str | Path]


def picture_files(folder: str | Path, argument: str = "images") -> list[Path]:
    """The pictures of a folder and of those below it, sorted.

    Args:
        folder (`str` or `Path`): where they are.
        argument (`str`): what the user calls it, for messages.

    Raises:
        ConfigError: it is no folder, or holds none.
    """
    found = sorted(file for file in Path(folder).rglob("*") if file.suffix.lower() in SUFFIXES)
    if not found:
        what = "there are none" if Path(folder).is_dir() else "it is no folder"
        kinds = ", ".join(SUFFIXES)
        raise ConfigError(f"`{argument}` must be a folder with pictures ({kinds}), but {folder}: {what}.")
    return found


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


def opened(image: Image.Image | np.ndarray | Tensor | str | Path) -> Image.Image:
    """One picture, whatever it came as, upright: as a camera's EXIF data say that it was held.

    Args:
        image: a PIL image, a file's path, an array `(H, W)` or `(H, W, channels)` or a tensor `(channels, H, W)`; these
            are 8-bit, or float in [0, 1]. Pillow's images of 16-bit greys are scaled to 8 bits.

    Raises:
        ConfigError: it is something else, or cannot be read.
    """
    if isinstance(image, Image.Image):
        return _in_bytes(ImageOps.exif_transpose(image), "A picture")
    if isinstance(image, str | Path):
        try:
            with Image.open(image) as file:
                return _in_bytes(ImageOps.exif_transpose(file), str(image))
        except (UnidentifiedImageError, OSError) as error:
            raise ConfigError(f"{image} must be a picture, but it cannot be read ({error}).") from error
    if isinstance(image, Tensor) and image.ndim == 3:
        last = image.detach().cpu().movedim(0, -1)
        image = (last.float() if last.is_floating_point() else last).numpy()
    if not isinstance(image, np.ndarray) or image.ndim not in (2, 3) or not image.size:
        shape = f" of shape {tuple(image.shape)}" if hasattr(image, "shape") else ""
        raise ConfigError(
            f"Each of `images` must be a PIL image, a file, an array (H, W) or (H, W, channels) or a tensor (channels, "
            f"H, W), but got {type(image).__name__}{shape}."
        )
    if image.dtype.kind == "f" and image.min() >= 0 and image.max() <= 1:
        image = np.round(255 * image).astype(np.uint8)
    if image.dtype != np.uint8 or (image.ndim == 3 and image.shape[2] not in (1, 3, 4)):
        raise ConfigError(
            f"Arrays among `images` must be 8-bit, or float in [0, 1], with 1, 3 or 4 channels, but got {image.dtype} "
            f"of shape {image.shape}, or values beyond."
        )
    return Image.fromarray(image[:, :, 0] if image.ndim == 3 and image.shape[2] == 1 else image)


def _in_bytes(image: Image.Image, name: str) -> Image.Image:
    """An image whose channels are 8-bit; Pillow's own conversion would clip wider greys at 255."""
    if image.mode.startswith("I;16"):
        return Image.fromarray(np.round(np.asarray(image) / 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ConfigError(
            f"{name} must be 8-bit, or 16-bit grey, but got Pillow's mode {image.mode!r}, whose white is not known. "
            f"Scale it to 8 bits first."
        )
    return image


def fitted(image: Image.Image, shape: tuple[int, ...]) -> Tensor:
    """A picture scaled (Lanczos) so that it covers a size, and cropped in its middle; `shape`, uint8.

    Args:
        image (`PIL.Image.Image`): of any size and mode.
        shape (`tuple`): channels (1 or 3), height, width.
    """
    channels, height, width = shape
    image = ImageOps.fit(image.convert("L" if channels == 1 else "RGB"), (width, height), Image.Resampling.LANCZOS)
    return torch.from_numpy(np.array(image)).reshape(height, width, channels).permute(2, 0, 1)


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

    def show(self, call: Call) -> None:
        """Take the pictures of a call of the pipeline, which is to run next."""
        self.first, self.size, self._encoded = call.first, call.size, None

    @torch.no_grad()
    def exchange(self, _module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        """Of a call of the denoiser, as a forward pre-hook; what is beside the sample stays as it is."""
        _, name, *_ = inspect.signature(type(self.model).forward).parameters
        sample = kwargs[name] if name in kwargs else args[0]
        pictures = self._pictures(sample)
        kept, added, timestep = self._draw(self.argument.given(args, kwargs))
        noise = torch.randn(pictures.shape, generator=self.generator)
        noised = (kept * pictures + added * noise).to(sample.device, sample.dtype)
        noised = noised.repeat(len(sample) // len(noised), *[1] * (noised.ndim - 1))
        noised = torch.cat([noised, sample[:, noised.shape[1] :]], 1)  # a mask, a picture to be edited
        args, kwargs = self.argument.put(args, kwargs, timestep)
        return (args, kwargs | {name: noised}) if name in kwargs else ((noised, *args[1:]), kwargs)

    def _draw(self, current: Any) -> tuple[float, float, Any]:
        """Shares of picture and noise, and the timestep as the model takes it."""
        trained = self.scheduler.config.num_train_timesteps
        if self.telling is None:
            self.telling = self._told(float(torch.as_tensor(current).max()), trained)
        scale, start, _ = self.telling
        if self.flows:
            sigma = 1 - torch.rand((), generator=self.generator).item()  # in (0, 1]
            own = trained * (1 - sigma if self.scheduler.config.get("invert_sigmas") else sigma)
            kept, added, timestep = 1 - sigma, sigma, (own - start) / scale
        else:
            drawn = int(torch.randint(trained, (), generator=self.generator))
            share = self.scheduler.alphas_cumprod[drawn].item()
            kept, added, timestep = share**0.5, (1 - share) ** 0.5, drawn if scale == 1 else (drawn - start) / scale
        return kept, added, torch.full_like(current, timestep) if isinstance(current, Tensor) else timestep

    def _told(self, given: float, trained: int) -> Telling:
        """How the pipeline tells its denoiser the timestep, by what it gives in its first call."""
        own = torch.as_tensor(self.scheduler.timesteps).double().flatten()
        first = own[getattr(self.scheduler, "begin_index", None) or 0 :][:1]
        for telling in tellings(trained):
            meant = telling.start + telling.scale * given
            if bool(((first - meant).abs() <= telling.lost + 0.01 * abs(meant)).any()):
                return telling
        if bool(((own - given).abs() <= 0.01 * abs(given)).any()):  # a pipeline may begin at a later one
            return tellings(trained)[0]
        raise UnsupportedError(
            f"Pictures are noised as much as the denoiser is told, but {type(self.pipe).__name__} tells it {given:g} "
            f"at the timestep {first.tolist()} of its scheduler. Leave `images` out: its own samples set the ranges."
        )

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
            mean, std = (torch.tensor(each, dtype=torch.float32).view(1, -1, 1, 1) for each in (mean, std))
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
        yield
    finally:
        handle.remove()

"""Latents of all training pictures and their mirror images, made once for each autoencoder."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Pictures
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file
from torch import Tensor

_PART = 500


@dataclass(frozen=True)
class Latents:
    """The posteriors of pictures, scaled.

    Args:
        mean, std (`Tensor`, `(2, N, channels, H, W)` float16): of the pictures and of their mirror images.
        labels (`Tensor`, `(N,)` int64).
        digest (`str`): of the autoencoder and the pictures.
    """

    mean: Tensor
    std: Tensor
    labels: Tensor
    digest: str

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Samples of the posteriors, half of them mirrored, and their labels."""
        index = torch.randint(len(self.labels), (size,), generator=generator)
        mirrored = torch.randint(2, (size,), generator=generator)
        mean, std = self.mean[mirrored, index].float(), self.std[mirrored, index].float()
        return mean + std * torch.randn(mean.shape, generator=generator), self.labels[index]


def load_autoencoder(folder: Path) -> AutoencoderKL:
    """Frozen, float32."""
    return AutoencoderKL.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)


@torch.no_grad()
def make_latents(vae: AutoencoderKL, pictures: Pictures, folder: Path, say: Callable[[str], None] = print) -> Latents:
    """Encode, or read what `folder` has of this autoencoder and these pictures."""
    digest = hashlib.sha256(repr(vae.config.scaling_factor).encode())
    for tensor in (*vae.state_dict().values(), pictures.images):
        digest.update(tensor.contiguous().numpy().tobytes())
    name = digest.hexdigest()[:16]
    file = folder / f"latents-{name}.safetensors"
    if not file.is_file():
        say(f"latents of {len(pictures.images)} pictures and their mirror images, for {file}")
        found = []
        for part in pictures.images.split(_PART):
            both = torch.cat([part, part.flip(-1)]) / 127.5 - 1
            posterior = vae.encode(both.contiguous(memory_format=torch.channels_last)).latent_dist
            scaled = torch.stack([posterior.mean, posterior.std]) * vae.config.scaling_factor
            found.append(scaled.half().unflatten(1, (2, -1)))
        folder.mkdir(parents=True, exist_ok=True)
        unfinished = file.with_suffix(f".{os.getpid()}")
        mean, std = torch.cat(found, 2).contiguous()
        save_file({"mean": mean, "std": std}, unfinished)
        unfinished.replace(file)
    stored = load_file(file)
    return Latents(stored["mean"], stored["std"], pictures.labels, name)

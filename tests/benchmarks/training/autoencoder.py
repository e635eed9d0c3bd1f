"""`cifar10-autoencoder`: a small `AutoencoderKL` whose latents, half as wide and high, the other models denoise.

No perceptual loss: the distance that its pictures are judged by comes from the only network at hand for one.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from data import Pictures, draw_pictures
from diffusers import AutoencoderKL
from loop import Settings, Task
from torch import Tensor

from diffusers_msfp.evaluation.compare import psnr_db
from diffusers_msfp.evaluation.images.distances import frechet_distance
from diffusers_msfp.evaluation.images.features import extract, feature_network

FIGURES = "reconstruction.json"
_PART = 250


@dataclass(frozen=True)
class AutoencoderSettings(Settings):
    """How it is trained, and its size.

    Args:
        channels (`tuple[int, ...]`): of its levels; the first has the pictures' size, each further one half of it.
        latent_channels, groups (`int`): of the latents, of the norms.
        kl (`float`): weight of the divergence from a normal distribution, a mean over the latents' values.
    """

    updates: int = 4_000
    learning_rate: float = 1e-3
    ema_decay: float = 0.999
    weight_decay: float = 1e-4
    channels: tuple[int, ...] = (32, 64)
    latent_channels: int = 4
    groups: int = 8
    kl: float = 1e-4


class AutoencoderTask(Task):
    """Mean absolute plus mean squared error of the reconstruction, and a little divergence (arXiv 2112.10752)."""

    name = "cifar10-autoencoder"
    defaults = AutoencoderSettings

    def __init__(self, pictures: Pictures, test: Pictures, settings: AutoencoderSettings) -> None:
        super().__init__(settings)
        self.pictures, self.test = pictures, test
        levels = len(settings.channels)
        self.vae = AutoencoderKL(
            sample_size=32,
            latent_channels=settings.latent_channels,
            block_out_channels=settings.channels,
            down_block_types=("DownEncoderBlock2D",) * levels,
            up_block_types=("UpDecoderBlock2D",) * levels,
            layers_per_block=1,
            norm_num_groups=settings.groups,
        )

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Pictures, and the noise that makes a sample of the posterior."""
        clean, _ = draw_pictures(self.pictures, size, generator)
        side = clean.shape[-1] >> len(self.settings.channels) - 1
        return clean, torch.randn(size, self.settings.latent_channels, side, side, generator=generator)

    def forward(self, clean: Tensor, noise: Tensor) -> Tensor:
        """The loss."""
        clean = clean.contiguous(memory_format=torch.channels_last)
        posterior = self.vae.encode(clean).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        rebuilt = self.vae.decode(mean + (log_variance / 2).exp() * noise).sample.float()
        divergence = (mean.square() + log_variance.exp() - 1 - log_variance).mean() / 2
        error = rebuilt - clean
        return error.abs().mean() + error.square().mean() + self.settings.kl * divergence

    @torch.no_grad()
    def rebuild(self, images: Tensor) -> Tensor:
        """Pictures `(N, 3, 32, 32)` uint8 through latents' means and back, in [0, 1]."""
        parts = [self.vae.decode(self.latents(part)).sample.float().cpu() for part in images.split(_PART)]
        return (torch.cat(parts) / 2 + 0.5).clamp(0, 1)

    def latents(self, images: Tensor) -> Tensor:
        """Posterior means of pictures `(N, 3, 32, 32)` uint8."""
        return self.vae.encode(images.to(self.vae.device, self.vae.dtype) / 127.5 - 1).latent_dist.mean

    def sample_grid(self, num: int = 64, steps: int = 0) -> Tensor:  # noqa: ARG002
        """Test pictures, each row of eight above its reconstruction."""
        images = self.test.images[: num // 2]
        pairs = torch.stack([(images / 255).unflatten(0, (-1, 8)), self.rebuild(images).unflatten(0, (-1, 8))], 1)
        return pairs.flatten(0, 2)

    @torch.no_grad()
    def latent_deviation(self) -> float:
        """Standard deviation of the latents of (at most 10 000) training pictures."""
        parts = self.pictures.images[:10_000].split(_PART)
        return torch.cat([self.latents(part) for part in parts]).std().item()

    def figures(self) -> dict:
        """Reconstruction of all test pictures."""
        rebuilt, real = self.rebuild(self.test.images), self.test.images / 255
        network = feature_network("cifar10-resnet56")
        found = {
            "pictures": len(real),
            "psnr_db": psnr_db(real, rebuilt).mean().item(),
            "l1": (rebuilt - real).abs().mean().item(),
        }
        if len(real) > 64:
            one, other = extract(network, real).pooled, extract(network, rebuilt).pooled
            found["frechet_distance_cifar10_resnet56"] = frechet_distance(one, other)
        return found | {"scaling_factor": self.vae.config.scaling_factor, "latents": self.settings.latent_channels}

    def export(self, folder: Path) -> None:
        """An `AutoencoderKL` in float16 that scales its latents to a deviation of one, and `reconstruction.json`."""
        self.float().eval()
        self.vae.register_to_config(scaling_factor=round(1 / self.latent_deviation(), 4))
        self.vae.to(torch.float16).save_pretrained(folder)
        self.vae.float()  # the rounded weights
        (folder / FIGURES).write_text(json.dumps(self.figures(), indent=1) + "\n", encoding="utf-8")

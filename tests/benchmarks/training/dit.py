"""`cifar10-latent-dit`: a class-conditional transformer on the autoencoder's latents, in a stock `DiTPipeline`."""

from dataclasses import dataclass

import torch
from data import CIFAR10_CLASSES
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from latents import Latents
from loop import Settings, Task
from torch import Tensor, nn

NONE = 1000
"""The label that `DiTPipeline` takes for "no class": hence an embedding of 1000 labels and one, ten of them used."""


@dataclass(frozen=True)
class DiTSettings(Settings):
    """How it is trained, and its size; each block has a table of labels of its own, so few wide blocks waste less.

    Args:
        heads, head_dim, layers, patch (`int`): of the transformer.
        drop (`float`): share of labels that are dropped.
        guidance (`float`): of its samples.
    """

    updates: int = 70_000
    learning_rate: float = 5e-4
    weight_decay: float = 1e-2
    heads: int = 9
    head_dim: int = 32
    layers: int = 5
    patch: int = 2
    drop: float = 0.1
    guidance: float = 2.0


class DiTTask(Task):
    """Mean squared error of the predicted noise (arXiv 2212.09748, without its learned variance)."""

    name = "cifar10-latent-dit"
    defaults = DiTSettings

    def __init__(self, vae: AutoencoderKL, latents: Latents, settings: DiTSettings) -> None:
        super().__init__(settings, {"latents": latents.digest})
        self.latents, self.vae = latents, vae
        self.transformer = DiTTransformer2DModel(
            num_attention_heads=settings.heads,
            attention_head_dim=settings.head_dim,
            num_layers=settings.layers,
            patch_size=settings.patch,
            sample_size=latents.mean.shape[-1],
            in_channels=latents.mean.shape[2],
            out_channels=latents.mean.shape[2],
            num_embeds_ada_norm=NONE,
        )
        self.scheduler = DDIMScheduler(clip_sample=False)  # T = 1000, β linear from 1e-4 to 0.02, epsilon
        with torch.no_grad():
            for block in self.transformer.transformer_blocks:
                nn.init.zeros_(block.norm1.linear.weight)  # adaLN-Zero: each block begins as the identity
                nn.init.zeros_(block.norm1.linear.bias)
                labels = block.norm1.emb.class_embedder
                labels.dropout_prob = 0.0  # it would drop for each block alone, and from no generator
                nn.init.normal_(labels.embedding_table.weight, std=0.02)
                labels.embedding_table.weight[len(CIFAR10_CLASSES) : NONE] = 0
            for layer in (self.transformer.proj_out_1, self.transformer.proj_out_2):
                nn.init.zeros_(layer.weight)
                nn.init.zeros_(layer.bias)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Latents, noise, timesteps, labels."""
        clean, labels = self.latents.draw(size, generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < self.settings.drop
        return clean, noise, timesteps, torch.where(dropped, NONE, labels)

    def forward(self, clean: Tensor, noise: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """The loss."""
        noisy = self.scheduler.add_noise(clean, noise, timesteps)
        return (self.transformer(noisy, timesteps, labels).sample.float() - noise).square().mean()

    def pipeline(self) -> DiTPipeline:
        """With the names of its classes, which `save_pretrained` writes and `from_pretrained` reads."""
        id2label = {str(i): name for i, name in enumerate(CIFAR10_CLASSES)}
        pipe = DiTPipeline(self.transformer, self.vae, self.scheduler, id2label)
        pipe.register_to_config(id2label=id2label)
        return pipe

    def sample_grid(self, num: int = 64, steps: int = 50) -> Tensor:
        """The classes in turn."""
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        labels = [i % len(CIFAR10_CLASSES) for i in range(num)]
        noise = torch.Generator().manual_seed(0)
        return (
            pipe(labels, self.settings.guidance, noise, num_inference_steps=steps, output_type="pt")
            .images.float()
            .cpu()
        )

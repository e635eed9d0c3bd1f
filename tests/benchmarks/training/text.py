"""`cifar10-text`: captions to pictures on the autoencoder's latents, in a stock `StableDiffusionPipeline`."""

from dataclasses import dataclass

import torch
from captions import TOKENS, captions, make_tokenizer
from data import CIFAR10_CLASSES
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from latents import Latents
from loop import Settings, Task
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel


@dataclass(frozen=True)
class TextSettings(Settings):
    """How it is trained, and its size.

    Args:
        channels (`tuple[int, ...]`), attention (`tuple[bool, ...]`), blocks (`int`): of the UNet's levels.
        groups, head_dim (`int`): of its norms and its attention.
        text_width, text_layers, text_heads (`int`): of the text encoder.
        drop (`float`): share of captions that are dropped.
        guidance (`float`): of its samples.
    """

    updates: int = 70_000
    channels: tuple[int, ...] = (64, 128, 128)
    attention: tuple[bool, ...] = (False, True, True)
    blocks: int = 1
    groups: int = 8
    head_dim: int = 32
    text_width: int = 128
    text_layers: int = 2
    text_heads: int = 4
    drop: float = 0.1
    guidance: float = 3.0


class TextTask(Task):
    """Mean squared error of the predicted noise (arXiv 2112.10752); the text encoder is trained along."""

    name = "cifar10-text"
    defaults = TextSettings

    def __init__(self, vae: AutoencoderKL, latents: Latents, settings: TextSettings) -> None:
        super().__init__(settings, {"latents": latents.digest})
        self.latents, self.vae = latents, vae
        self.tokenizer = make_tokenizer()
        self.text_encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(self.tokenizer),
                hidden_size=settings.text_width,
                intermediate_size=4 * settings.text_width,
                projection_dim=settings.text_width,
                num_hidden_layers=settings.text_layers,
                num_attention_heads=settings.text_heads,
                max_position_embeddings=TOKENS,
                bos_token_id=self.tokenizer.bos_token_id,
                eos_token_id=self.tokenizer.eos_token_id,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        )
        attention = ["CrossAttn" if has else "" for has in settings.attention]
        self.unet = UNet2DConditionModel(
            sample_size=latents.mean.shape[-1],
            in_channels=latents.mean.shape[2],
            out_channels=latents.mean.shape[2],
            block_out_channels=settings.channels,
            layers_per_block=settings.blocks,
            down_block_types=tuple(f"{kind}DownBlock2D" for kind in attention),
            up_block_types=tuple(f"{kind}UpBlock2D" for kind in reversed(attention)),
            cross_attention_dim=settings.text_width,
            attention_head_dim=tuple(size // settings.head_dim for size in settings.channels),
            norm_num_groups=settings.groups,
        )
        self.scheduler = DDIMScheduler(
            clip_sample=False, steps_offset=1
        )  # T = 1000, β linear from 1e-4 to 0.02, epsilon
        texts = [text for name in CIFAR10_CLASSES for text in captions(name)]
        tokens = self.tokenizer(["", *texts], padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
        self.no_caption, self.captions = tokens[0], tokens[1:].unflatten(0, (len(CIFAR10_CLASSES), -1))

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Latents, noise, timesteps, tokens."""
        clean, labels = self.latents.draw(size, generator)
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = torch.randint(self.scheduler.config.num_train_timesteps, (size,), generator=generator)
        template = torch.randint(self.captions.shape[1], (size,), generator=generator)
        dropped = torch.rand(size, generator=generator) < self.settings.drop
        return clean, noise, timesteps, torch.where(dropped[:, None], self.no_caption, self.captions[labels, template])

    def forward(self, clean: Tensor, noise: Tensor, timesteps: Tensor, tokens: Tensor) -> Tensor:
        """The loss."""
        noisy = self.scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        predicted = self.unet(noisy, timesteps, self.text_encoder(tokens)[0]).sample
        return (predicted.float() - noise).square().mean()

    def pipeline(self) -> StableDiffusionPipeline:
        """Without a safety checker: ten harmless classes."""
        return StableDiffusionPipeline(
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            unet=self.unet,
            scheduler=self.scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )

    def cast(self) -> None:
        """The text encoder stays in float32, the dtype in which diffusers opens the other parts unless it is told one.

        transformers opens a model in the dtype of its file.
        """
        super().cast()
        self.text_encoder.float()

    def sample_grid(self, num: int = 64, steps: int = 50) -> Tensor:
        """The classes in turn."""
        pipe = self.pipeline()
        pipe.set_progress_bar_config(disable=True)
        prompts = [captions(CIFAR10_CLASSES[i % len(CIFAR10_CLASSES)])[0] for i in range(num)]
        return (
            pipe(
                prompts,
                num_inference_steps=steps,
                guidance_scale=self.settings.guidance,
                generator=torch.Generator().manual_seed(0),
                output_type="pt",
            )
            .images.float()
            .cpu()
        )

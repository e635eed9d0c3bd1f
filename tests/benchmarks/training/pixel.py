"""`cifar10-pixel`: an unconditional UNet on RGB pictures of 32 × 32, as the papers' CIFAR-10 rows."""

import torch
from data import Pictures, draw_pictures
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from loop import Settings, Task
from torch import Tensor

CHANNELS = (32, 64, 192, 192)
GROUPS = 8


class PixelTask(Task):
    """Mean squared error of the predicted noise, timesteps uniform (DDPM, arXiv 2006.11239, algorithm 1)."""

    name = "cifar10-pixel"

    def __init__(self, pictures: Pictures, settings: Settings) -> None:
        super().__init__(settings)
        self.pictures = pictures
        self.unet = UNet2DModel(
            sample_size=32,
            in_channels=3,
            out_channels=3,
            block_out_channels=CHANNELS,
            layers_per_block=1,
            down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=32,
            norm_num_groups=GROUPS,
        )
        self.scheduler = DDPMScheduler()  # T = 1000, β linear from 1e-4 to 0.02, epsilon

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Pictures, noise, timesteps."""
        clean, _ = draw_pictures(self.pictures, size, generator)
        noise = torch.randn(clean.shape, generator=generator)
        return clean, noise, torch.randint(self.scheduler.config.num_train_timesteps, (size,), generator=generator)

    def forward(self, clean: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """The loss."""
        noisy = self.scheduler.add_noise(clean, noise, timesteps).contiguous(memory_format=torch.channels_last)
        return (self.unet(noisy, timesteps).sample.float() - noise).square().mean()

    def pipeline(self) -> DDPMPipeline:
        """As it is published; few steps need DDIM."""
        return DDPMPipeline(self.unet, self.scheduler)

    def sample_grid(self, num: int = 64, steps: int = 50) -> Tensor:
        """On DDIM."""
        pipe = DDPMPipeline(self.unet, DDIMScheduler.from_config(self.scheduler.config))
        pipe.set_progress_bar_config(disable=True)
        images = pipe(num, torch.Generator().manual_seed(0), num_inference_steps=steps, output_type="np").images
        return torch.from_numpy(images).permute(0, 3, 1, 2)

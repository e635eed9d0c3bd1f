"""Architectures that people use, built from code with random weights: for sizes, speed and memory, not for pictures."""

from collections.abc import Callable

from diffusers import ModelMixin, UNet2DConditionModel, UNet2DModel

from ...registry import Registry

SHAPES: Registry[Callable[[], ModelMixin]] = Registry("shape")
"""Builders by name."""


def ddpm_cifar10() -> UNet2DModel:
    """`google/ddpm-cifar10-32`: 35.75 M parameters."""
    return UNet2DModel(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )


def sd15() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's UNet: 859.5 M parameters."""
    return UNet2DConditionModel(sample_size=64, cross_attention_dim=768)


SHAPES.add("ddpm-cifar10", ddpm_cifar10)
SHAPES.add("sd15", sd15)

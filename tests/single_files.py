"""Tiny checkpoints in the original layout of Stable Diffusion: diffusers' own key mapping, reversed."""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, ModelMixin
from safetensors.torch import save_file
from torch import Tensor

_RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
_OUTSIDE = {
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
_VAE = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "conv_shortcut": "nin_shortcut",
}
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def original_unet(model: ModelMixin) -> dict[str, Tensor]:
    """The tensors of a UNet, or of a ControlNet's copy of one, by their original names without a prefix."""
    layers, blocks = model.config.layers_per_block, len(model.config.block_out_channels)
    places: dict[str, str] = {"mid_block.attentions.0": "middle_block.1"}
    for j in range(2):
        places[f"mid_block.resnets.{j}"] = f"middle_block.{2 * j}"
    for i in range(blocks):
        for j in range(layers):
            for kind, place in (("resnets", 0), ("attentions", 1)):
                places[f"down_blocks.{i}.{kind}.{j}"] = f"input_blocks.{(layers + 1) * i + j + 1}.{place}"
        places[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(layers + 1) * (i + 1)}.0.op"
        has_attention = any(f"up_blocks.{i}.attentions" in name for name in model.state_dict())
        for j in range(layers + 1):
            for kind, place in (("resnets", 0), ("attentions", 1)):
                places[f"up_blocks.{i}.{kind}.{j}"] = f"output_blocks.{(layers + 1) * i + j}.{place}"
        up = f"output_blocks.{(layers + 1) * i + layers}.{2 if has_attention else 1}.conv"
        places[f"up_blocks.{i}.upsamplers.0.conv"] = up
    return {_renamed(name, places): value for name, value in model.state_dict().items()}


def _renamed(name: str, places: Mapping[str, str]) -> str:
    module, _, tensor = name.rpartition(".")
    if module in _OUTSIDE:
        return f"{_OUTSIDE[module]}.{tensor}"
    for here, there in places.items():
        if module == here or module.startswith(f"{here}."):
            inside = module.removeprefix(here).removeprefix(".")
            inside = _RESNET.get(inside, inside) if "resnets" in here else inside
            return ".".join(part for part in (there, inside, tensor) if part)
    return name


def original_controlnet(model: ModelMixin) -> dict[str, Tensor]:
    """A ControlNet by its original names."""
    embedding = model.controlnet_cond_embedding
    hint = {"conv_in": 0, "conv_out": 14}  # as of the only size there is; with fewer blocks some numbers are free
    hint |= {f"blocks.{i}": 2 * (i + 1) for i in range(len(embedding.blocks))}
    renamed = {}
    for name, value in original_unet(model).items():
        if match := re.fullmatch(r"controlnet_cond_embedding\.(.+)\.(\w+)", name):
            name = f"input_hint_block.{hint[match[1]]}.{match[2]}"
        elif match := re.fullmatch(r"controlnet_down_blocks\.(\d+)\.(\w+)", name):
            name = f"zero_convs.{match[1]}.0.{match[2]}"
        elif match := re.fullmatch(r"controlnet_mid_block\.(\w+)", name):
            name = f"middle_block_out.0.{match[1]}"
        renamed[f"control_model.{name}"] = value
    return renamed


def original_vae(model: ModelMixin) -> dict[str, Tensor]:
    """An autoencoder by its original names, attention as convolutions of one position."""
    blocks, renamed = len(model.config.block_out_channels), {}
    for name, value in model.state_dict().items():
        module, _, tensor = name.rpartition(".")
        if match := re.fullmatch(r"(en|de)coder\.(down|up)_blocks\.(\d+)\.resnets\.(\d+)\.(\w+)", module):
            side, way, block, resnet, inside = match.groups()
            block = blocks - 1 - int(block) if way == "up" else block
            module = f"{side}coder.{way}.{block}.block.{resnet}.{_VAE[inside]}"
        elif match := re.fullmatch(r"(en|de)coder\.mid_block\.resnets\.(\d)\.(\w+)", module):
            module = f"{match[1]}coder.mid.block_{int(match[2]) + 1}.{_VAE[match[3]]}"
        elif match := re.fullmatch(r"(en|de)coder\.mid_block\.attentions\.0\.(.+)", module):
            module = f"{match[1]}coder.mid.attn_1.{_VAE_ATTENTION[match[2]]}"
            value = value[:, :, None, None] if value.ndim == 2 else value
        else:
            module = module.replace("conv_norm_out", "norm_out")
        renamed[f"first_stage_model.{module}.{tensor}"] = value
    return renamed


def write_original(
    pipe: DiffusionPipeline, file: Path, *, vae: bool = True, averages: bool = False, dtype: torch.dtype = torch.float32
) -> Path:
    """A pipeline of Stable Diffusion as one file.

    Args:
        vae: with the autoencoder.
        averages: beside the UNet, other weights under the names that training gives their averages.
    """
    unet = original_unet(pipe.unet)
    state = {f"model.diffusion_model.{name}": value for name, value in unet.items()}
    if averages:
        state |= {f"model_ema.diffusion_model{name.replace('.', '')}": torch.zeros_like(v) for name, v in unet.items()}
        state |= {f"model_ema.filler{i}": torch.zeros(1) for i in range(100)}
    if vae:
        state |= original_vae(pipe.vae)
    text = pipe.text_encoder.state_dict()
    names = {name: name if name.startswith("text_model.") else f"text_model.{name}" for name in text}
    if getattr(pipe, "text_encoder_2", None) is None:
        state |= {f"cond_stage_model.transformer.{names[name]}": value for name, value in text.items()}
    else:
        state |= {f"conditioner.embedders.0.transformer.{names[name]}": value for name, value in text.items()}
    save_file({name: value.to(dtype).contiguous() for name, value in state.items()}, file)
    return file

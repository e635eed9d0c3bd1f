"""Other architectures than UNets and the common transformers: quantized, saved, loaded, and exact in every engine."""

import copy

import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    LTXVideoTransformer3DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    T2IAdapter,
    UNetMotionModel,
    UVit2DModel,
)
from torch import nn

from diffusers_msfp import MSFPConfig, freeze, set_engine
from diffusers_msfp.plugin.quantize import quantize_model

HEADS = {"attention_head_dim": 8, "num_attention_heads": 2}


def _blocks(kind: str, widths: tuple[int, int]) -> dict:
    return {
        "sample_size": 8,
        "block_out_channels": widths,
        "down_block_types": (f"CrossAttnDownBlock{kind}", f"DownBlock{kind}"),
        "up_block_types": (f"UpBlock{kind}", f"CrossAttnUpBlock{kind}"),
        "cross_attention_dim": 16,
        "num_attention_heads": 2,
        "layers_per_block": 1,
    }


def motion() -> UNetMotionModel:
    return UNetMotionModel(**_blocks("Motion", (8, 16)), motion_num_attention_heads=2, norm_num_groups=4)


def pixart() -> PixArtTransformer2DModel:
    sizes = {"sample_size": 8, "num_layers": 1, "caption_channels": 16, "cross_attention_dim": 16}
    return PixArtTransformer2DModel(**sizes, **HEADS, out_channels=8, use_additional_conditions=False)


def sana() -> SanaTransformer2DModel:
    cross = {"num_cross_attention_heads": 2, "cross_attention_head_dim": 8, "cross_attention_dim": 16}
    sizes = {"patch_size": 1, "in_channels": 4, "out_channels": 4, "num_layers": 1, "sample_size": 8}
    return SanaTransformer2DModel(**sizes, **cross, **HEADS, caption_channels=16)


def ltx() -> LTXVideoTransformer3DModel:
    sizes = {"in_channels": 8, "out_channels": 8, "num_layers": 1, "cross_attention_dim": 16, "caption_channels": 16}
    return LTXVideoTransformer3DModel(**sizes, **HEADS)


def tokens() -> UVit2DModel:
    sizes = {name: 16 for name in ("hidden_size", "cond_embed_dim", "encoder_hidden_size", "codebook_size")}
    sizes |= {name: 16 for name in ("in_channels", "block_out_channels")}
    depth = {"num_res_blocks": 1, "num_hidden_layers": 1, "block_num_heads": 2, "num_attention_heads": 2}
    embedded = {"micro_cond_embed_dim": 40, "micro_cond_encode_dim": 8, "vocab_size": 17, "intermediate_size": 32}
    return UVit2DModel(**sizes, **depth, **embedded, sample_size=8)


def text(batch: int, width: int = 16) -> dict:
    return {"encoder_hidden_states": torch.randn(batch, 3, width)}


def latents(batch: int, *shape: int) -> dict:
    return {"hidden_states": torch.randn(batch, *shape), "timestep": torch.full((batch,), 5)}


CASES = {
    "AnimateDiff's UNet": (motion, lambda: {"sample": torch.randn(1, 4, 2, 8, 8), "timestep": 5} | text(2)),
    "PixArt": (
        pixart,
        lambda: latents(2, 4, 8, 8) | text(2) | {"added_cond_kwargs": {"aspect_ratio": None, "resolution": None}},
    ),
    "Sana": (sana, lambda: latents(2, 4, 8, 8) | text(2)),
    "LTX-Video": (
        ltx,
        lambda: (
            latents(1, 8, 8)
            | text(1)
            | {"encoder_attention_mask": torch.ones(1, 3), "num_frames": 2, "height": 2, "width": 2}
        ),
    ),
    "aMUSEd's transformer on tokens": (
        tokens,
        lambda: (
            {"input_ids": torch.randint(0, 16, (1, 8, 8)), "pooled_text_emb": torch.randn(1, 16)}
            | {"micro_conds": torch.randn(1, 5)}
            | text(1)
        ),
    ),
    "T2I-Adapter": (
        lambda: T2IAdapter(channels=[8, 16], num_res_blocks=1, downscale_factor=2),
        lambda: {"x": torch.randn(1, 3, 16, 16)},
    ),
    "a tiny autoencoder": (
        lambda: AutoencoderTiny(
            encoder_block_out_channels=(8, 8),
            decoder_block_out_channels=(8, 8),
            num_encoder_blocks=(1, 1),
            num_decoder_blocks=(1, 1),
        ),
        lambda: {"sample": torch.randn(1, 3, 16, 16)},
    ),
}


def first(output) -> torch.Tensor:
    while not isinstance(output, torch.Tensor):
        output = output[0]
    return output


@pytest.mark.parametrize("name", CASES)
@pytest.mark.situation(
    "UNets of videos, transformers on tokens and videos, adapters of images, tiny autoencoders", "right"
)
@torch.no_grad()
def test_architecture(name, tmp_path):
    make, arguments = CASES[name]
    model, call = make().eval(), arguments()
    for parameter in model.parameters():  # zero layers would say nothing
        if parameter.ndim > 1 and not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    expected = first(model(**call))
    quantized = copy.deepcopy(model)
    quantize_model(quantized, MSFPConfig("w8a8"))
    quantized(**call)
    freeze(quantized)
    made = {}
    for engine in ("auto", "reference"):
        set_engine(quantized, engine)
        made[engine] = first(quantized(**call))
        assert (made[engine] - expected).norm() < 0.05 * expected.norm(), engine
    quantized.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    set_engine(loaded, "reference")
    assert torch.equal(first(loaded(**call)), made["reference"])

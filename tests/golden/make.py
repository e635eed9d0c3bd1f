"""How the golden checkpoints were made. They are never made again: `test_golden.py` proves that they still read.

A run overwrites them, and another machine gives other last bits; a new format version gets folders of its own.

    python tests/golden/make.py v1|v2|v2-methods|v2-codes
"""

import copy
import sys
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors.torch import save_file

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    SplitConfig,
    TemporalConfig,
    finetune,
    freeze,
    maintain_temporal,
    split_shortcuts,
)
from diffusers_msfp.plugin.quantize import quantize_model

HERE = Path(__file__).parent
BOTH = torch.tensor([900, 100])


def make_unet(**changes) -> UNet2DModel:
    torch.manual_seed(0)
    arguments = dict(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 12),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return UNet2DModel(**arguments | changes).eval()


def tune(unet: UNet2DModel, teacher: UNet2DModel, placement: str, reads: str | None) -> UNet2DModel:
    pipe = DDPMPipeline(copy.deepcopy(unet), DDIMScheduler())
    settings = {"train_steps": 20, "num_inference_steps": 5, "batch_size": 4, "rank": 2, "learning_rate": 1.0}
    config = FinetuneConfig(placement=placement, reads=reads, router_groups=("down_blocks.*",), **settings)
    finetune(pipe, DDPMPipeline(teacher, DDIMScheduler()), config)
    return pipe.unet


def calibrate(unet: UNet2DModel, x: torch.Tensor) -> None:
    with torch.no_grad():
        for timestep in (900, 500, 100):
            unet(x, timestep)
    freeze(unet)


def version_1() -> None:
    """With a package that knew version 1 alone; today's is told to write it."""
    unet = make_unet()
    teacher = copy.deepcopy(unet)
    quantize_model(unet, MSFPConfig(scheme="w4a4", scheme_overrides={"mid_block": "w6a6", "to_q": "w4a16"}))
    unet.config.quantization_config.format_version = 1
    x = torch.randn(2, 1, 8, 8)
    calibrate(unet, x)
    with torch.no_grad():
        expected = {"x": x, "v1": unet(x, 500).sample}
    unet.save_pretrained(HERE / "v1")
    for placement, reads in (("merged", None), ("side", "float")):
        tuned = tune(unet, teacher, placement, reads)
        tuned.save_pretrained(HERE / f"v1-{placement}")
        with torch.no_grad():
            expected[f"v1-{placement}"] = tuned(x, torch.tensor([900, 100])).sample
    save_file(expected, HERE / "expected.safetensors")


def version_2(name: str = "v2", reads: str = "float") -> None:
    """One block down and up, with adapters beside the weights: every kind of tensor but parameter sets."""
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    unet = make_unet(**blocks, add_attention=False)
    teacher = copy.deepcopy(unet)
    quantize_model(unet, MSFPConfig(scheme="w4a4", scheme_overrides={"mid_block": "w6a6", "to_q": "w4a16"}))
    x = torch.randn(2, 1, 8, 8)
    calibrate(unet, x)
    tuned = tune(unet, teacher, "side", reads)
    tuned.save_pretrained(HERE / name)
    with torch.no_grad():
        save_file({"x": x, name: tuned(x, BOTH).sample}, HERE / f"expected-{name}.safetensors")


def methods() -> None:
    """What the other methods leave, and a model that observes: each a version 2 of its own, one block down and up."""
    blocks = {"down_block_types": ("AttnDownBlock2D",), "up_block_types": ("UpBlock2D",), "block_out_channels": (8,)}
    original = make_unet(**blocks, add_attention=False)
    x = torch.randn(2, 1, 8, 8)
    expected, made = {"x": x}, {}
    for name in ("temporal", "split", "observing"):
        unet = made[f"v2-{name}"] = copy.deepcopy(original)
        quantize_model(unet, MSFPConfig(scheme="w4a4"))
        if name == "observing":
            with torch.no_grad():
                for timestep in (900, 500):
                    unet(x, timestep)
            continue
        calibrate(unet, x)
        pipe, teacher = (DDPMPipeline(copy.deepcopy(model), DDIMScheduler()) for model in (unet, original))
        pipe.unet = unet
        if name == "temporal":
            maintain_temporal(pipe, teacher, TemporalConfig(num_inference_steps=4, iterations=20, cache_above=0.0))
        else:
            split_shortcuts(pipe, teacher, SplitConfig(num_samples=2, num_inference_steps=3))
    for name, unet in made.items():
        unet.save_pretrained(HERE / name)
        with torch.no_grad():
            expected[name] = unet(x, BOTH if name != "v2-observing" else 100).sample
    save_file(expected, HERE / "expected-v2-methods.safetensors")


if __name__ == "__main__":
    made = {
        "v1": version_1,
        "v2": version_2,
        "v2-methods": methods,
        "v2-codes": partial(version_2, "v2-codes", "codes"),
    }
    made[sys.argv[1]]()

"""How the golden checkpoints were made. They are never made again: `test_golden.py` proves that version 1 still reads.

A run overwrites them, and another machine gives other last bits; a new format version gets folders of its own.

    python tests/golden/make.py
"""

import copy
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from safetensors.torch import save_file

from diffusers_msfp import FinetuneConfig, MSFPConfig, finetune, freeze
from diffusers_msfp.integration.in_memory import quantize_model

if __name__ == "__main__":
    here = Path(__file__).parent
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(8, 12),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()
    teacher = copy.deepcopy(unet)
    quantize_model(unet, MSFPConfig(scheme="w4a4", scheme_overrides={"mid_block": "w6a6", "to_q": "w4a16"}))
    x = torch.randn(2, 1, 8, 8)
    with torch.no_grad():
        for timestep in (900, 500, 100):
            unet(x, timestep)
        freeze(unet)
        y = unet(x, 500).sample
    expected = {"x": x, "v1": y}
    unet.save_pretrained(here / "v1")
    for placement in ("merged", "side"):
        pipe = DDPMPipeline(copy.deepcopy(unet), DDIMScheduler())
        settings = {"train_steps": 20, "num_inference_steps": 5, "batch_size": 4, "rank": 2, "learning_rate": 1.0}
        groups = ("down_blocks.*",)
        config = FinetuneConfig(placement=placement, router_groups=groups, **settings)
        finetune(pipe, DDPMPipeline(teacher, DDIMScheduler()), config)
        pipe.unet.save_pretrained(here / f"v1-{placement}")
        with torch.no_grad():
            expected[f"v1-{placement}"] = pipe.unet(x, torch.tensor([900, 100])).sample
    save_file(expected, here / "expected.safetensors")

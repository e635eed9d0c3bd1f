"""Size, time and memory of quantizing the architectures people use, built from code with random weights.

    python tests/benchmarks/bench_shapes.py

Each model is saved in float32 and quantized by the command line in a process of its own, so that the peak memory is
that of a user's run. Writes `model_cards/results/shapes.json`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import typer
from diffusers import UNet2DConditionModel, UNet2DModel
from harness import write_results

SCHEMES = ("w4a4",)


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


SHAPES = {"ddpm-cifar10": ddpm_cifar10, "sd15": sd15}


def main(only: str = "", schemes: str = ",".join(SCHEMES)) -> None:
    """Build, save, quantize, write rows."""
    rows = []
    for shape, build in SHAPES.items():
        if only and shape != only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "float"
            torch.manual_seed(0)
            model = build()
            parameters = model.num_parameters()
            model.save_pretrained(source, max_shard_size="100GB")
            del model
            for scheme in schemes.split(","):
                command = [sys.executable, "-m", "diffusers_msfp", "quantize", str(source), "--scheme", scheme]
                out = Path(scratch) / scheme
                made = subprocess.run([*command, "--out", str(out), "--json"], stdout=subprocess.PIPE, check=True)
                result = json.loads(made.stdout)
                keys = ("layers", "weight_bits_per_param", "bytes_before", "bytes_after", "seconds", "seconds_search")
                row = {"shape": shape, "parameters": parameters, "scheme": scheme}
                row |= {key: result[key] for key in (*keys, "peak_rss_bytes")}
                row["bytes_bf16"] = 2 * parameters
                rows.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})
                typer.echo(json.dumps(rows[-1]), err=True)
    if not only:
        write_results("shapes", "python tests/benchmarks/bench_shapes.py", rows)


if __name__ == "__main__":
    typer.run(main)

"""Fine-tuning at `w4a4` on a real model: signs, one LoRA, TALoRA, DFA, placements; three seeds each.

    python tests/benchmarks/bench_talora.py --data fashion_mnist.npz [--cells "ptq,talora" --seeds "0"]
    python tests/benchmarks/bench_talora.py --data fashion_mnist.npz --name talora-reads --seeds 0

Every cell of a kind gets the same number of updates. Each row is written as soon as it is measured; with `--cells` or
`--seeds` only these rows are made anew. Distances are between features of the `fashion` network, on pictures of 20 DDIM
steps. The second line compares, at few updates, what adapters beside the weights read: floats or codes. Writes
`model_cards/results/<name>.json`.
"""

import copy
import time
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline
from fashion_features import fashion_distance, load_images
from harness import keep_rows

from diffusers_msfp import FinetuneConfig, finetune, quantize_pipeline
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.cli.sample import sample_images
from diffusers_msfp.cli.shared.store import peak_rss_bytes
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.plugin.config import MSFPConfig
from diffusers_msfp.plugin.quantize import components_of
from diffusers_msfp.sampling.solvers import with_ddim

COMMAND = "python tests/benchmarks/bench_talora.py --data fashion_mnist.npz"
FEW, SHORT, LONG = 100, 300, 1500  # updates
THEN = {"placement": "merged", "denoising_factor_floor": 0.25, "affine_learning_rate": 0.0}
"""What the paper's parts were compared with: low-rank adapters alone."""
FIGURES = ("eps_mse", "eps_rel_l2", "image_psnr_db")


def cell(updates: int = SHORT, scheme: str = "w4a4-pure", **settings) -> tuple[str, FinetuneConfig | None]:
    """A scheme and how it is fine-tuned."""
    return scheme, FinetuneConfig(train_steps=updates, **THEN | settings) if settings else None


# Equal parameters: one adapter of rank 16, two of rank 8, four of rank 4.
CELLS = {
    "ptq-signed": cell(scheme="w4a4-signed-pure"),
    "ptq": cell(),
    "one-lora": cell(num_adapters=1, rank=16, denoising_factor_exponent=0),
    "talora": cell(num_adapters=2, rank=8, denoising_factor_exponent=0),
    "talora-dfa": cell(num_adapters=2, rank=8),
    "talora-dfa-squared": cell(num_adapters=2, rank=8, denoising_factor_exponent=2),
    "talora-4": cell(num_adapters=4, rank=4, denoising_factor_exponent=0),
    "one-lora-32": cell(num_adapters=1, rank=32, denoising_factor_exponent=0),
    "talora-32": cell(num_adapters=2, rank=32, denoising_factor_exponent=0),
    "side": cell(num_adapters=2, rank=7, denoising_factor_exponent=0, placement="side", reads="float"),
    "long-dfa": cell(LONG, rank=7, placement="side", reads="float"),
    "minutes-5": ("w4a4-pure", FinetuneConfig(minutes=5, reads="float")),  # on two cores that nothing else uses
}
READS = {"none": ("w4a4", None)} | {
    reads: ("w4a4", FinetuneConfig(train_steps=FEW, placement="side", reads=reads)) for reads in ("float", "codes")
}
FILES = {"talora": CELLS, "talora-reads": READS}
"""Results file → its cells."""


def main(
    data: Annotated[str, typer.Option(help="fashion_mnist.npz, for real test images")],
    cells: Annotated[str, typer.Option(help="comma-separated; all if left out")] = "",
    seeds: Annotated[str, typer.Option(help="comma-separated")] = "0,1,2",
    pictures: Annotated[int, typer.Option(help="for the Fréchet distances, more than 64")] = 384,
    name: Annotated[str, typer.Option(help="of the results file: talora or talora-reads")] = "talora",
) -> None:
    """Quantize, fine-tune, compare, sample, write rows."""
    known = FILES[name]
    reference = with_ddim(DiffusionPipeline.from_pretrained(EMBEDDED_MODEL))
    reference.set_progress_bar_config(disable=True)
    real = load_images(data, "test")[0]
    real = real[torch.randperm(len(real), generator=torch.Generator().manual_seed(0))]
    for seed in map(int, seeds.split(",")):
        own = pictures_of(reference, pictures, seed)
        keep(name, {"cell": "full precision", "seed": seed, "frechet_real": fashion_distance(real, own)})
        for key in cells.split(",") if cells else known:
            scheme, config = known[key]
            pipe = copy.deepcopy(reference)
            quantize_pipeline(pipe, scheme, seed=seed)
            row = {"cell": key, "scheme": scheme, "seed": seed}
            if config is not None:
                config = FinetuneConfig(**config.to_dict() | {"seed": seed})
                started = time.perf_counter()
                result = finetune(pipe, reference, config)
                row |= {
                    "updates": result.updates,
                    "rank": config.rank,
                    "seconds": round(time.perf_counter() - started, 1),
                    "usage": result.usage,
                    "intervals": pipe.unet.timestep_router.intervals(),
                    "peak_rss_bytes": peak_rss_bytes(),
                }
            row["bytes"] = sum(m.get_memory_footprint() for m in components_of(pipe, MSFPConfig()).values())
            for steps in (20, 50):
                compared = compare_pipelines(reference, pipe, num_inference_steps=steps, seed=1000 + seed)
                row |= {f"{figure}_{steps}": float(f"{getattr(compared, figure):.5g}") for figure in FIGURES}
                if steps == 20:
                    errors = compared.eps_rel_l2_by_timestep.items()
                    row["eps_rel_l2_by_timestep"] = {t: float(f"{value:.4g}") for t, value in errors}
            made = pictures_of(pipe, pictures, seed)
            row |= {"frechet_real": fashion_distance(real, made), "frechet_reference": fashion_distance(own, made)}
            keep(name, row)
            typer.echo(
                f"{key:20} seed {seed}  eps_rel_l2 {row['eps_rel_l2_20']:.4f}  psnr {row['image_psnr_db_20']:.1f} dB  "
                f"Fréchet {row['frechet_reference']:.3f}  {row.get('seconds', 0):.0f} s",
                err=True,
            )


def pictures_of(pipe, number: int, seed: int) -> torch.Tensor:
    """`(number, 1, 32, 32)` in [0, 1]."""
    images = sample_images(pipe, num_samples=number, num_inference_steps=20, seed=5000 + 1000 * seed)
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def keep(name: str, row: dict) -> None:
    """Put a row into the results file, in the order of the cells."""
    cells = ["full precision", *FILES[name]]
    more = "" if name == "talora" else f" --name {name} --seeds 0"
    keep_rows(
        name, COMMAND + more, [row], by=("cell", "seed"), order=lambda each: (cells.index(each["cell"]), each["seed"])
    )


if __name__ == "__main__":
    typer.run(main)

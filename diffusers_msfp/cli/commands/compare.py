"""`diffusers-msfp compare`."""

from typing import Annotated

import typer
from rich.table import Table

from ... import cli
from ..shared.options import Guidance, Json, Prompts, Sampler, Seed, Variant, print_json
from ..shared.terminal import megabytes, stdout


def compare(
    reference: Annotated[str, typer.Argument(help="The full-precision pipeline.")],
    candidate: Annotated[str, typer.Argument(help="The quantized one, or the folder of its denoiser.")],
    num_samples: Annotated[int, typer.Option(min=1, help="Samples.")] = 16,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    seed: Seed = 0,
    eta: Annotated[float, typer.Option(min=0, max=1, help="DDIM's eta.")] = 0.0,
    sampler: Sampler = None,
    prompts: Prompts = None,
    guidance_scale: Guidance = None,
    variant: Variant = None,
    as_json: Json = False,
) -> None:
    """Measure what a quantized pipeline lost."""
    result = cli.compare(
        reference,
        candidate,
        num_samples=num_samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        eta=eta,
        sampler=sampler,
        prompts=prompts,
        guidance_scale=guidance_scale,
        variant=variant,
    )
    if as_json:
        return print_json(result)
    about = f"{num_samples} samples, {num_inference_steps} steps of {result.sampler}"
    table = Table("figure", "value", title=f"{candidate} against {reference}; {about}")
    low, high = result.image_psnr_db_interval or (float("nan"), float("nan"))
    table.add_row("image_psnr_db", f"{result.image_psnr_db:.2f} ({low:.2f} – {high:.2f})")
    for key in ("traj_rel_l2", "eps_rel_l2", "eps_mse"):
        if (value := getattr(result, key)) is not None:
            table.add_row(key, f"{value:.5f}")
    for name, figures in (result.denoisers or {}).items():
        error = "never called" if figures.eps_rel_l2 is None else f"{figures.eps_rel_l2:.5f}"
        table.add_row(f"eps_rel_l2 of {name}", error + ("" if figures.quantized else " (float)"))
    table.add_row("size", f"{megabytes(result.bytes_reference)} → {megabytes(result.bytes_quantized)}")
    stdout.print(table)
    times = Table("timestep", "eps_rel_l2")
    for timestep, value in result.eps_rel_l2_by_timestep.items():
        times.add_row(timestep, f"{value:.4f}")
    stdout.print(times)

"""`diffusers-msfp report`."""

from pathlib import Path
from typing import Annotated

import typer

from ... import cli
from ..shared.load import DTYPES
from ..shared.options import Guidance, Json, Prompts, Seed, Variant, print_json
from ..shared.terminal import megabytes, stdout


def report(
    candidate: Annotated[
        str, typer.Argument(metavar="DIR", help="Folder or Hub id of a pipeline, or folder of a denoiser.")
    ],
    out: Annotated[Path, typer.Option(help="HTML file to write.")],
    reference: Annotated[str | None, typer.Option(help="The full-precision pipeline.")] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Samples.")] = 8,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps, DDIM.")] = 20,
    seed: Seed = 0,
    prompts: Prompts = None,
    guidance_scale: Guidance = None,
    variant: Variant = None,
    dtype: Annotated[str, typer.Option(help=f"That the checkpoint runs in: {', '.join(DTYPES)}.")] = DTYPES[0],
    speed: Annotated[bool, typer.Option(help="Time a step against bfloat16.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing page.")] = False,
    as_json: Json = False,
) -> None:
    """Write one HTML page on a checkpoint's quality, by this package or another: errors, layers, formats, speed."""
    result = cli.report(
        candidate,
        out,
        reference=reference,
        num_samples=num_samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        prompts=prompts,
        guidance_scale=guidance_scale,
        variant=variant,
        dtype=dtype,
        speed=speed,
        overwrite=overwrite,
    )
    if as_json:
        return print_json(result)
    figures = [f"{len(result.layers)} layers", megabytes(result.bytes_quantized)]
    if result.comparison:
        for key in ("traj_rel_l2", "eps_rel_l2"):
            if (value := getattr(result.comparison, key)) is not None:
                figures.append(f"{key} {value:.4f}")
        figures.append(
            f"PSNR {result.comparison.image_psnr_db:.1f} dB ({num_samples} samples, {num_inference_steps} steps)"
        )
    stdout.print(f"{result.out}: {', '.join(figures)}.", soft_wrap=True, highlight=False, markup=False)
    for section, reason in result.missing.items():
        stdout.print(f"left out: {section}: {reason}", soft_wrap=True, highlight=False, markup=False)
    return None

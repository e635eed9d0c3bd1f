"""`diffusers-msfp demo`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ... import cli
from ..shared.options import Json, Seed, print_json
from ..shared.terminal import megabytes, stdout


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the picture and the checkpoints.")] = Path("msfp-demo"),
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of the pictures.")] = 50,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Quantize the embedded model and show it beside full precision."""
    result = cli.demo(out, num_inference_steps=num_inference_steps, seed=seed)
    if as_json:
        return print_json(result)
    columns = ("scheme", "size", "image PSNR", "traj_rel_l2", "eps_rel_l2", "quantized in")
    table = Table(*columns, title="Fashion-MNIST DDPM, 20 DDIM steps")
    for name, row in result.schemes.items():
        size = f"{megabytes(row.compared.bytes_reference)} → {megabytes(row.compared.bytes_quantized)}"
        seconds = "prepared" if row.quantized is None else f"{row.quantized.seconds:.1f} s"
        psnr = f"{row.compared.image_psnr_db:.1f} dB"
        errors = (f"{error:.4f}" for error in (row.compared.traj_rel_l2, row.compared.eps_rel_l2))
        table.add_row(name, size, psnr, *errors, seconds)
    stdout.print(table)
    stdout.print(f"Look at [bold]{result.picture}[/]: full precision in the first row, the schemes below.")

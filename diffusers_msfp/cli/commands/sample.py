"""`diffusers-msfp sample`."""

from pathlib import Path
from typing import Annotated

import typer

from ... import cli
from ..shared.options import Guidance, Json, Prompts, Seed, Source, Variant, print_json
from ..shared.terminal import stdout


def sample(
    source: Source,
    out: Annotated[Path, typer.Option(help="PNG to write.")],
    num_samples: Annotated[int, typer.Option(min=1, help="Pictures.")] = 16,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 50,
    seed: Seed = 0,
    prompts: Prompts = None,
    guidance_scale: Guidance = None,
    variant: Variant = None,
    as_json: Json = False,
) -> None:
    """Draw a grid of pictures."""
    result = cli.sample(
        source,
        out,
        num_samples=num_samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        prompts=prompts,
        guidance_scale=guidance_scale,
        variant=variant,
    )
    print_json(result) if as_json else stdout.print(f"{num_samples} pictures in [bold]{result.out}[/].")

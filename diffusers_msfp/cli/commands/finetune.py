"""`diffusers-msfp finetune`."""

from pathlib import Path
from typing import Annotated

import typer

from ... import cli
from ...methods.talora.config import FinetuneConfig
from ..shared.options import Guidance, Json, Prompts, Seed, Variant, print_json, print_router, with_config
from ..shared.terminal import megabytes, stderr, stdout

NAMES = {
    "router_groups": ("--router-group",),
}
"""Options that are not called like their settings."""


@with_config(FinetuneConfig, names=NAMES, seed=Seed)
def finetune(
    source: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a quantized pipeline.")],
    teacher: Annotated[str, typer.Option(help="The full-precision pipeline that it was made from.")],
    out: Annotated[Path, typer.Option(help="Folder to write; `<out>-training` keeps checkpoints, logs, previews.")],
    config: FinetuneConfig,
    prompts: Prompts = None,
    guidance_scale: Guidance = None,
    variant: Variant = None,
    compare: Annotated[bool, typer.Option(help="Measure error and PSNR before and after.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a quantized checkpoint with timestep-aware adapters (TALoRA, DFA)."""
    result = cli.finetune(
        source,
        teacher,
        out,
        config,
        prompts=prompts,
        guidance_scale=guidance_scale,
        variant=variant,
        compare=compare,
        overwrite=overwrite,
    )
    if result is None:  # not the first process
        return None
    if as_json:
        return print_json(result)
    stdout.print(
        f"[bold]{result.out}[/]: {result.updates} updates in {result.seconds / 60:.1f} min, loss "
        f"{result.loss_first:.5f} → {result.loss_last:.5f}, {megabytes(result.bytes_before)} → "
        f"{megabytes(result.bytes_after)}; logs and previews in {result.training_dir}."
    )
    if result.before and result.after:
        before, after, shared = result.before, result.after, result.comparison
        stdout.print(
            f"Before and after, as `compare` measures ({shared['num_samples']} samples, "
            f"{shared['num_inference_steps']} steps): "
            + "".join(
                f"{key} {before[key]:.5f} → {after[key]:.5f}, "
                for key in ("traj_rel_l2", "eps_rel_l2")
                if before[key] is not None
            )
            + f"PSNR {before['image_psnr_db']:.2f} → {after['image_psnr_db']:.2f} dB."
        )
    print_router(result.intervals, len(result.usage[0]))
    if result.collapsed:
        stderr.print("[yellow]One adapter serves all timesteps[/] (the router has collapsed): try more updates.")
    return None

"""`diffusers-msfp finetune`."""

from pathlib import Path
from typing import Annotated

import typer

from ... import cli
from ...methods.talora import PLACEMENTS
from ...methods.talora.config import FinetuneConfig
from ..terminal import megabytes, stderr, stdout
from .options import Json, Prompts, Seed, Variant, print_json, print_router


def finetune(
    source: Annotated[str, typer.Argument(metavar="DIR", help="Folder or Hub id of a quantized pipeline.")],
    teacher: Annotated[str, typer.Option(help="The full-precision pipeline that it was made from.")],
    out: Annotated[Path, typer.Option(help="Folder to write; `<out>-training` keeps checkpoints, logs, previews.")],
    minutes: Annotated[float | None, typer.Option(help="Train as many updates as fit.")] = None,
    train_steps: Annotated[int | None, typer.Option(help="Train so many updates; 2000 if nothing is given.")] = None,
    num_adapters: Annotated[int, typer.Option(help="Adapters per layer; 1 is a single LoRA.")] = 2,
    rank: Annotated[int | None, typer.Option(help="Largest rank; 8 beside the weights, 32 merged.")] = None,
    placement: Annotated[str, typer.Option(help=f"One of {', '.join(PLACEMENTS)}.")] = "side",
    router_group: Annotated[
        list[str] | None, typer.Option(help="Pattern of layers that choose on their own; repeatable.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Denoising steps of the trajectories.")] = 20,
    batch_size: Annotated[int, typer.Option(help="Samples per batch, over all processes.")] = 16,
    gradient_accumulation_steps: Annotated[int, typer.Option(help="Batches per update.")] = 1,
    learning_rate: Annotated[float, typer.Option(help="Peak, in steps of the weight grid per update.")] = 0.1,
    dfa_exponent: Annotated[float, typer.Option(help="Of the denoising factor in the loss; 0 turns it off.")] = 1.0,
    ema_decay: Annotated[float, typer.Option(help="Of a moving average of the adapters; 0 is none.")] = 0.0,
    mixed_precision: Annotated[str, typer.Option(help="`no` or `bf16`.")] = "no",
    gradient_checkpointing: Annotated[bool, typer.Option(help="Recompute activations to save memory.")] = False,
    blockwise: Annotated[bool, typer.Option(help="Train block after block to save memory.")] = False,
    checkpoint_every: Annotated[int, typer.Option(help="Updates between checkpoints.")] = 100,
    preview_every: Annotated[int, typer.Option(help="Updates between preview pictures; 0 is none.")] = 200,
    seed: Seed = 0,
    prompts: Prompts = None,
    variant: Variant = None,
    overwrite: Annotated[bool, typer.Option(help="Replace an existing checkpoint.")] = False,
    as_json: Json = False,
) -> None:
    """Fine-tune a quantized checkpoint with timestep-aware adapters (TALoRA, DFA)."""
    config = FinetuneConfig(
        num_adapters=num_adapters,
        rank=rank,
        placement=placement,
        router_groups=tuple(router_group or ()),
        num_inference_steps=steps,
        batch_size=batch_size,
        gradient_accumulation_steps=gradient_accumulation_steps,
        train_steps=train_steps,
        minutes=minutes,
        learning_rate=learning_rate,
        denoising_factor_exponent=dfa_exponent,
        ema_decay=ema_decay,
        mixed_precision=mixed_precision,
        gradient_checkpointing=gradient_checkpointing,
        blockwise=blockwise,
        checkpoint_every=checkpoint_every,
        preview_every=preview_every,
        seed=seed,
    )
    result = cli.finetune(source, teacher, out, config, prompts=prompts, variant=variant, overwrite=overwrite)
    if result is None:  # not the first process
        return None
    if as_json:
        return print_json(result)
    stdout.print(
        f"[bold]{result['out']}[/]: {result['updates']} updates in {result['seconds'] / 60:.1f} min, loss "
        f"{result['loss_first']:.5f} → {result['loss_last']:.5f}, {megabytes(result['bytes_before'])} → "
        f"{megabytes(result['bytes_after'])}; logs and previews in {result['training_dir']}."
    )
    print_router(result["intervals"])
    if result["collapsed"]:
        stderr.print("[yellow]One adapter serves all timesteps[/] (the router has collapsed): try more updates.")
    return None

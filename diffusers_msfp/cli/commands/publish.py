"""`diffusers-msfp publish`."""

from pathlib import Path
from typing import Annotated

import typer

from ... import cli
from ..shared.options import Json, Prompts, Seed, Variant, print_json
from ..shared.terminal import megabytes, stderr, stdout


def publish(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="Folder of a quantized pipeline; not changed.")],
    repo: Annotated[str, typer.Option(help="Hub id, USER/NAME; made if it does not exist.")],
    license: Annotated[str | None, typer.Option(help="Like `apache-2.0`; by default the base's.")] = None,
    base_model: Annotated[
        str | None, typer.Option(help="Float model, if the checkpoint forgot: Hub id, or else URL or `none`.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a private repository.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch; made if it does not exist.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Write to DIR-publish what would be uploaded.")] = False,
    results: Annotated[
        list[Path] | None, typer.Option(help="File that a verb printed with --json; repeatable. DIR/results is read.")
    ] = None,
    num_samples: Annotated[int, typer.Option(min=1, help="Samples on the card.")] = 8,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps of each.")] = 20,
    seed: Seed = 0,
    prompts: Prompts = None,
    variant: Variant = None,
    as_json: Json = False,
) -> None:
    """Check a quantized checkpoint, write its card, upload both, compare what arrived."""
    result = cli.publish(
        source,
        repo,
        license=license,
        base_model=base_model,
        private=private,
        revision=revision,
        create_pr=create_pr,
        dry_run=dry_run,
        results=results or (),
        num_samples=num_samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        prompts=prompts,
        variant=variant,
    )
    if as_json:
        return print_json(result)
    for location, size in sorted(result.files.items()):
        stdout.print(f"{megabytes(size):>12}  {location}", soft_wrap=True, highlight=False, markup=False)
    for title in ("left_out", "removed"):
        if getattr(result, title):
            stderr.print(f"[yellow]{title.replace('_', ' ')}:[/] {', '.join(getattr(result, title))}", soft_wrap=True)
    for what, command in result.missing.items():
        stderr.print(f"[yellow]not measured:[/] {what}: {command}", soft_wrap=True, highlight=False)
    where = result.out if dry_run else result.url
    done = "would be uploaded, from" if dry_run else "are on the Hub and have the hashes they have here:"
    stdout.print(f"{len(result.files)} files {done} [bold]{where}[/]", soft_wrap=True, highlight=False)
    return stdout.print(f"\n{result.snippet}", soft_wrap=True, highlight=False, markup=False)

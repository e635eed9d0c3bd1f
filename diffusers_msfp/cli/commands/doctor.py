"""`diffusers-msfp doctor`."""

from typing import Annotated

import typer
from rich.table import Table

from ... import cli
from ...doctor import Diagnosis, Package
from ..shared.options import Json, print_json
from ..shared.terminal import megabytes, progress, say, stdout

UNFIT = 1
"""Exit code where something that the package needs is missing or not of a supported version."""


def doctor(
    timed: Annotated[bool, typer.Option("--timed/--no-timed", help="Time the engines on one layer.")] = True,
    as_json: Json = False,
) -> None:
    """Say what this machine can do for quantized models, what is missing, and the command that brings it."""
    with progress("trying engines") as report:
        result = cli.doctor(timed=timed, on_progress=report)
    if as_json:
        print_json(result)
    else:
        _print(result)
    if not result.fits:
        raise typer.Exit(UNFIT)


def _print(result: Diagnosis) -> None:
    table = Table("package", "installed", "supported", "", title="versions", title_justify="left")
    for package in result.packages:
        table.add_row(package.name, package.installed or "–", package.supported, _verdict(package))
    stdout.print(table)
    cpu = result.processor
    say(f"processor: {cpu.name}, {cpu.architecture}, {cpu.cores} cores, {cpu.threads} threads")
    say("  has " + ", ".join(name for name, there in cpu.features.items() if there))
    say("  has not " + ", ".join(name for name, there in cpu.features.items() if not there))
    limits = ", ".join(f"{name}={value}" for name, value in cpu.limited_by.items()) or "nothing"
    say(f"  torch's kernels use {cpu.used}; limited by {limits}; this package's kernels are {cpu.kernels}'s")
    say(f"  oneDNN's 8-bit products: {_yes(cpu.int8_operators)}; its bfloat16 products: {_yes(cpu.bf16_products)}")
    for device in result.devices:
        say(f"device {device.device}: {device.name}" + ("" if device.measured else ", never measured"))
    table = Table("engine", "device", "ms", "refuses, since", title=result.layer, title_justify="left")
    for trial in result.engines:
        time = "" if trial.milliseconds is None else f"{trial.milliseconds:.2f}"
        table.add_row(trial.engine, trial.device, time, trial.refusal or "")
    stdout.print(table)
    for cache in result.caches:
        size = "not there yet" if cache.bytes is None else megabytes(cache.bytes)
        say(f"cache of {cache.what}: {cache.path}, {size}")
    say(f"token for the Hub: {_yes(result.hub_token)}")
    for remedy in result.remedies:
        mark = "must be put right: " if remedy.serious else "note: "
        say(mark + remedy.what + (f": {remedy.command}" if remedy.command else "."))
    say("All that the package needs is here." if result.fits else "Something that the package needs is not here.")


def _verdict(package: Package) -> str:
    if not package.fits:
        return "does not fit"
    if package.installed is None:
        return f"brought by [{', '.join(package.extras)}]".replace("[", r"\[")
    return "fits"


def _yes(there: bool) -> str:
    return "yes" if there else "no"

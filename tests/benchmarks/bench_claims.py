"""The papers' claims, put to the test on a trained model.

    python tests/benchmarks/bench_claims.py --data fashion_mnist.npz [--hours H]
    python tests/benchmarks/bench_claims.py --model model_cards/cifar10-pixel --data cifar10_jpeg60k.npz

Any pipeline with one denoiser, 20 steps of DDIM. A claim says that one variant is better than another, in PSNR to full
precision's pictures of equal noise, or that a variant is as good as full precision, by the Fréchet distance of its
pictures to real ones. Variants of which a claim trains something are made with three seeds of calibration, training and
noise, the others with one. What is there for these weights and lengths is not made again, and takes the place of what
is there for others; `--hours` stops between two variants, `--only` makes its variants anew, so that several processes
may share the work. Pictures are kept for each commit. `claims.py` turns rows into verdicts.
Writes `model_cards/results/claims.json`.
"""

import copy
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from claims import CLAIMS, FULL_PRECISION, seeds_of
from diffusers import DiffusionPipeline
from diffusers.models.activations import GEGLU, GELU, ApproximateGELU
from harness import RESULTS, keep_rows, of_this_code, read_results
from real_models import asked_of, real_pictures
from torch import Tensor, nn

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    RoundingConfig,
    TemporalConfig,
    correct_output,
    finetune,
    learn_rounding,
    maintain_temporal,
    quantize_pipeline,
)
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.checkpoint.digest import fingerprint
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.evaluation.compare import psnr_db
from diffusers_msfp.evaluation.images.distances import bootstrap, frechet_distance
from diffusers_msfp.evaluation.images.features import default_features, extract, feature_network
from diffusers_msfp.evaluation.images.real import load_real
from diffusers_msfp.evaluation.images.samples import draw_pictures, noise_generator
from diffusers_msfp.recipes import RECIPES
from diffusers_msfp.sampling.calls import call_arguments
from diffusers_msfp.sampling.denoisers import denoisers_of
from diffusers_msfp.sampling.solvers import with_ddim
from diffusers_msfp.schemes import SCHEMES, resolve

COMMAND = "python tests/benchmarks/bench_claims.py --data fashion_mnist.npz"
DRAW = {"num_inference_steps": 20, "sampler": "own"}
PURE = "w4a4-pure"
PLACES = {"SiLU": (nn.SiLU,), "GELU": (nn.GELU, GELU, GEGLU, ApproximateGELU)}
"""Place → modules whose output its layers read; all other layers are elsewhere."""


def with_inputs_of(other: str) -> str:
    """`w4a4-pure` with another scheme's formats for the inputs of inner layers."""
    name = f"{PURE}, inputs of {other}"
    if name not in SCHEMES:
        inner = replace(SCHEMES[PURE].inner, activation=SCHEMES[other].inner.activation)
        SCHEMES.add(name, replace(SCHEMES[PURE], inner=inner))
    return name


@dataclass(frozen=True)
class Variant:
    """One way to a quantized pipeline.

    Args:
        scheme (`str`): of the model.
        place (`str`): where `formats` apply: a name in `PLACES`, or `"elsewhere"`.
        formats (`str`): scheme whose formats inputs have there.
        stages (`tuple`): what follows: `"rounding"`, `"temporal"`, `"talora"`, `"correction"`.
        settings (`Mapping`): of fine-tuning.
    """

    scheme: str
    place: str = ""
    formats: str = ""
    stages: tuple[str, ...] = ()
    settings: Mapping[str, object] = field(default_factory=dict)


SIDE = {"placement": "side", "reads": "codes"}
ONE, TWO = {"num_adapters": 1, "rank": 16}, {"num_adapters": 2, "rank": 8}
NO_DFA = {"denoising_factor_exponent": 0.0}
SIGNED, UNIFORM = "w4a4-signed-pure", "int-w4a4-pure"
VARIANTS = {
    "mixed sign": Variant(PURE),
    "signed": Variant(SIGNED),
    "INT": Variant(UNIFORM),
    **{
        f"{label} {'elsewhere' if place == 'elsewhere' else f'behind {place}'}": Variant(PURE, place, formats)
        for place in (*PLACES, "elsewhere")
        for label, formats in (("signed", SIGNED), ("INT", UNIFORM))
    },
    "temporal features of full precision": Variant(PURE, stages=("temporal",)),
    "nearest rounding": Variant("w4a8"),
    "learned rounding": Variant("w4a8", stages=("rounding",)),
    "one LoRA": Variant(PURE, stages=("talora",), settings=SIDE | ONE | NO_DFA),
    "TALoRA": Variant(PURE, stages=("talora",), settings=SIDE | TWO | NO_DFA),
    "TALoRA + DFA": Variant(PURE, stages=("talora",), settings=SIDE | TWO),
    "FP8": Variant("w8a8-wide"),
    "6 bit": Variant("w6a6"),
    "W4A4, recipe msfp": Variant("w4a4", stages=("talora", "correction"), settings=RECIPES["msfp"][0].settings),
}


def rounded(pipe: DiffusionPipeline, reference: DiffusionPipeline, seed: int, asked: dict) -> dict:
    """Learned rounding; the share of weights that are exactly 0, before and after."""
    result = learn_rounding(pipe, reference, RoundingConfig(seed=seed), **asked)
    return {"zeros_before": result.sparsity_before, "zeros": result.sparsity}


def kept_temporal(pipe: DiffusionPipeline, reference: DiffusionPipeline, seed: int, asked: dict) -> dict:
    """All outputs of the temporal block stored as full precision has them."""
    made = maintain_temporal(pipe, reference, TemporalConfig(iterations=0, cache_above=0.0, seed=seed), **asked)
    return {"stored_layers": len(made.cached)}


def places_of(pipe: DiffusionPipeline) -> dict[str, str]:
    """Linears and convolutions that read the output of an activation → its place, by one call of the denoiser."""
    (denoiser,) = denoisers_of(pipe).values()
    seen: list[tuple[str, Tensor]] = []  # held, so that no address is used twice
    found: dict[str, str] = {}

    def reading(name: str) -> Callable:
        def hook(_module: nn.Module, args: tuple) -> None:
            read = [place for place, out in seen if out.data_ptr() == args[0].data_ptr()]
            if read:
                found[name] = read[-1]

        return hook

    def giving(place: str) -> Callable:
        return lambda _module, _args, output: seen.append((place, output))

    handles = []
    for name, module in denoiser.named_modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            handles.append(module.register_forward_pre_hook(reading(name)))
        gives = [place for place, kinds in PLACES.items() if type(module) in kinds]
        handles += [module.register_forward_hook(giving(place)) for place in gives]
    try:
        with torch.no_grad():
            call_arguments(pipe, None, 1, {})(0, 1, [noise_generator(0, 0)]).run(pipe)
    finally:
        for handle in handles:
            handle.remove()
    return found


def inner_places_of(pipe: DiffusionPipeline) -> dict[str, str]:
    """Those of them that the scheme gives 4 bits; an override would give its formats to the 8-bit ones, too."""
    inner = SCHEMES[PURE].inner
    return {name: place for name, place in places_of(pipe).items() if resolve(name, PURE, {}) is inner}


def config_of(reference: DiffusionPipeline, variant: Variant) -> MSFPConfig | None:
    """What a variant quantizes with; None where the model has no such place."""
    if not variant.place:
        return MSFPConfig(variant.scheme)
    read, other = inner_places_of(reference), with_inputs_of(variant.formats)
    if variant.place == "elsewhere":
        return MSFPConfig(other, scheme_overrides=dict.fromkeys(read, variant.scheme))
    there = [name for name, place in read.items() if place == variant.place]
    return MSFPConfig(variant.scheme, scheme_overrides=dict.fromkeys(there, other)) if there else None


Made = tuple[DiffusionPipeline, dict]


def made(reference: DiffusionPipeline, variant: Variant, updates: int, seed: int, asked: dict) -> Made | None:
    """A variant's pipeline and what its stages say; None where the model has no such place."""
    config = config_of(reference, variant)
    if config is None:
        return None
    pipe = copy.deepcopy(reference)
    quantize_pipeline(pipe, config, seed=seed, **asked)
    said = {}
    for stage in variant.stages:
        if stage == "rounding":
            said |= rounded(pipe, reference, seed, asked)
        elif stage == "temporal":
            said |= kept_temporal(pipe, reference, seed, asked)
        elif stage == "talora":
            own = {"train_steps": updates, "preview_every": 0, "seed": seed}
            finetune(pipe, reference, FinetuneConfig(**own | dict(variant.settings)), **asked)
        else:
            correct_output(pipe, reference, **asked)
    return pipe, said


def excess(reference: Tensor, candidate: Tensor, real: Tensor) -> list[float]:
    """How much further from real pictures a candidate's are, as a share of full precision's distance: with interval."""
    network = feature_network(default_features(tuple(real.shape[1:])))
    own, other, true = (extract(network, images).pooled.double() for images in (reference, candidate, real))

    def share(pairs: Tensor, counts: Tensor) -> float:
        base = frechet_distance(own, true, pairs, counts)
        return frechet_distance(other, true, pairs, counts) / base - 1

    found = bootstrap(share, [len(own), len(true)], biased=True)
    return [found.value, found.low, found.high]


def main(
    data: Annotated[Path, typer.Option(help="fashion_mnist.npz or cifar10_jpeg60k.npz, for real test images")],
    model: Annotated[Path, typer.Option(help="a float pipeline")] = EMBEDDED_MODEL,
    only: Annotated[str, typer.Option(help="semicolon-separated variants; what is missing if left out")] = "",
    updates: int = 250,
    num_samples: Annotated[int, typer.Option(help="pictures for PSNR")] = 256,
    num_pictures: Annotated[int, typer.Option(help="pictures for distances")] = 2000,
    hours: Annotated[float | None, typer.Option(help="begin no variant later than that")] = None,
    work: Annotated[Path, typer.Option(help="keeps pictures")] = Path(".training/claims"),
) -> None:
    """Make variants, compare, write rows."""
    started = time.monotonic()
    reference = with_ddim(DiffusionPipeline.from_pretrained(model, dtype=torch.float32))
    reference.set_progress_bar_config(disable=True)
    asked, pictures = asked_of(model, reference), of_this_code(work)
    about = {"model": model.name, "weights": fingerprint(list(denoisers_of(reference).values())), "updates": updates}
    about |= {"num_samples": num_samples}
    rows = read_results("claims")["rows"] if (RESULTS / "claims.json").exists() else []
    rows = [row for row in rows if row.get("num_pictures", num_pictures) == num_pictures]
    there = {(row["variant"], row["seed"]) for row in rows if about.items() <= row.items()}

    def stays(row: dict) -> bool:
        return row["model"] != model.name or about.items() <= row.items()

    wanted = only.split(";") if only else VARIANTS
    for name, seed in ((variant, seed) for variant in wanted for seed in seeds_of(variant)):
        if not only and (name, seed) in there:
            continue
        if hours is not None and time.monotonic() - started > 3600 * hours:
            typer.echo(f"{name}, seed {seed}: not begun, {hours:g} hours are over")
            return
        began = time.perf_counter()
        found = made(reference, VARIANTS[name], updates, seed, asked)
        row = about | {"variant": name, "seed": seed}
        if found is not None:
            pipe, said = found
            row |= said | {"seconds": round(time.perf_counter() - began, 1)}
            draw = DRAW | asked | {"num_samples": num_samples, "seed": 1000 + seed, "folder": pictures}
            values = psnr_db(*(draw_pictures(each, **draw).float() for each in (reference, pipe)))
            compared = compare_pipelines(reference, pipe, num_samples=32, seed=2000 + seed, **asked)
            row |= {"traj_rel_l2": float(f"{compared.traj_rel_l2:.5g}")}
            row["psnr_db_by_picture"] = [round(each, 2) for each in values.tolist()]
            if any(claim.better == name and claim.than == FULL_PRECISION for claim in CLAIMS):
                draw |= {"num_samples": num_pictures}
                sets = [draw_pictures(each, **draw).float() for each in (reference, pipe)]
                real, _ = load_real(real_pictures(data, work), tuple(sets[0].shape[1:]))
                row |= {"num_pictures": num_pictures, "excess": [round(end, 4) for end in excess(*sets, real)]}
        keep_rows("claims", COMMAND, [row], by=("model", "variant", "seed"), order=place, stays=stays)
        typer.echo(f"{name}, seed {seed}: {time.perf_counter() - began:.0f} s", err=True)


def place(row: dict) -> tuple:
    """Of a row in the file."""
    return row["model"], list(VARIANTS).index(row["variant"]), row["seed"]


if __name__ == "__main__":
    typer.run(main)

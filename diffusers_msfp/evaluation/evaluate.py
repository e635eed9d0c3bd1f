"""A quantized pipeline against its full-precision original and against real pictures, in figures with intervals.

Sets of pictures are compared by features of a network; pictures of equal noise by PSNR and SSIM; the denoisers by their
outputs and by the outputs of their layers. Figures that need more pictures than there are, are left out by name.
"""

import platform
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from torch import Tensor

from ..errors import ConfigError, NonFiniteError, UnsupportedError
from ..workflow.sampling import with_ddim
from ..workflow.state import calibration_state, quantized_models
from .compare import compare_pipelines, psnr_db
from .distances import (
    MIN_NEIGHBOURHOOD,
    Estimate,
    classifier_score,
    frechet_estimate,
    mean_of,
    within_manifold,
)
from .features import Features, default_features, extract, feature_network
from .layers import layer_snr
from .real import load_real
from .samples import draw_pictures

COMPARED = 16
"""Samples for the denoiser's error; its layers take a quarter of them."""

_SSIM_WINDOW = 11


def evaluate_pipelines(
    reference,
    candidate,
    *,
    data: str | Path | None = None,
    num: int = 2000,
    steps: int = 20,
    features: str | None = None,
    seed: int = 0,
    prompts: list[str] | None = None,
    folder: str | Path | None = None,
    process: PartialState | None = None,
    on_step: Callable[[int, int, str], None] | None = None,
    **arguments,
) -> dict | None:
    """All figures of a candidate; the noise of picture i depends on `seed` and i alone, on DDIM.

    Args:
        reference, candidate (`DiffusionPipeline`): of the same architecture; neither is changed.
        data (`str` or `Path`, *optional*): real pictures, see `load_real`.
        num, steps (`int`): pictures of each pipeline, denoising steps.
        features (`str`, *optional*): see `feature_network`; `fashion` for 1 × 32 × 32 pictures, else `inception`.
        seed (`int`): of noise and resampling.
        prompts (`list[str]`, *optional*): taken in turn where the pipeline takes prompts.
        folder (`str` or `Path`, *optional*): keeps pictures, so that a killed run goes on and the reference's are made
            once for many candidates.
        process (`PartialState`, *optional*): of `accelerate launch`: each process draws its share, into `folder`.
        on_step (`Callable`, *optional*): called with (done, total, what is being done).
        **arguments: passed on to both pipelines.

    Returns:
        `dict`: `figures`, with `candidate_to_reference`, and where there is data `candidate_to_real` and
        `reference_to_real`: `frechet_distance`, `spatial_frechet_distance`, `precision`, `recall`; the first also has
        `psnr_db` and `ssim` for equal noise; and `classifier_score`: `reference`, `candidate`, `real`. Each figure has
        `value`, `low`, `high` (95 %) and `bias`, see `distances`. `omitted`: figure → why it is missing. `eps_mse`,
        `eps_rel_l2`, `eps_rel_l2_by_timestep` as `compare_pipelines`; `layers` as `layer_snr`; `settings`, `origin`.
        None in all processes but the first.

    Raises:
        ConfigError: settings that cannot be honoured, or pipelines or pictures that do not fit together.
        NonFiniteError: pictures hold NaN.
        UnsupportedError: a package or weights are missing.
    """
    if num < 2:
        raise ConfigError(f"`num` must be at least 2, but {num} came.")
    for model in quantized_models(candidate):
        if calibration_state(model) == "observing":
            raise ConfigError(
                "Only calibrated models can be evaluated, but the candidate still observes its ranges. Call "
                "`calibrate(pipe)` first."
            )
    process = process or PartialState(cpu=not torch.accelerator.is_available())
    ssim = _ssim()
    shapes = [
        tuple(draw_pictures(p, num=1, steps=1, prompts=prompts, **arguments)[0].shape) for p in (reference, candidate)
    ]
    if shapes[0] != shapes[1]:
        raise ConfigError(
            f"Both pipelines must make pictures of one shape, but {shapes[0]} and {shapes[1]} came: the candidate is "
            f"not a quantized version of the reference."
        )
    features = features or default_features(shapes[0])
    network = feature_network(features)
    real, adapted = load_real(data, shapes[0]) if data is not None else (None, None)
    folder = Path(folder) if folder is not None else None
    sets = {}
    for name, pipe in (("reference", reference), ("candidate", candidate)):

        def draw(share: tuple[int, int], name=name, pipe=pipe) -> Tensor:
            return draw_pictures(
                pipe,
                num=num,
                steps=steps,
                seed=seed,
                prompts=prompts,
                folder=folder,
                share=share,
                on_step=_stage(on_step, f"pictures of the {name}"),
                **arguments,
            )

        if process.num_processes > 1:
            if folder is None:
                raise ConfigError("Several processes must share a `folder` of pictures, but none was given.")
            draw((process.process_index, process.num_processes))
            process.wait_for_everyone()
        if process.is_main_process:
            sets[name] = _finite(draw((0, 1)), name)
    if not process.is_main_process:
        return None
    found = {name: extract(network, images) for name, images in sets.items()}
    if real is not None:
        found["real"] = extract(network, real)
    figures, omitted = _compare_sets(found, seed)
    same = figures["candidate_to_reference"]
    same["psnr_db"] = mean_of(psnr_db(sets["reference"], sets["candidate"]), seed)
    if min(shapes[0][1:]) < _SSIM_WINDOW:
        omitted["candidate_to_reference.ssim"] = f"needs sides of {_SSIM_WINDOW} pixels, but {shapes[0]} came"
    else:
        values = ssim(sets["candidate"], sets["reference"], data_range=1.0, reduction="none")
        same["ssim"] = mean_of(values, seed)
    run = {"num_inference_steps": steps, "seed": seed, "prompts": prompts}
    compared = compare_pipelines(
        reference, candidate, num_samples=COMPARED, on_step=_stage(on_step, "denoisers"), **run, **arguments
    )
    del compared["image_psnr_db"]  # `psnr_db` above, of fewer pictures
    layers = layer_snr(
        reference, candidate, num_samples=COMPARED // 4, on_step=_stage(on_step, "layers"), **run, **arguments
    )
    return {
        "figures": {pair: {name: e.to_dict() for name, e in values.items()} for pair, values in figures.items()},
        "omitted": omitted,
        **compared,
        "layers": layers,
        "settings": {
            "num": num,
            "steps": steps,
            "seed": seed,
            "features": features,
            "prompts": prompts,
            "data": None if real is None else {"pictures": len(real), "source": Path(data).name, "adapted": adapted},
            "scheduler": type(with_ddim(reference).scheduler).__name__,
            "picture_shape": list(shapes[0]),
        },
        "origin": origin(),
    }


def origin() -> dict:
    """Machine and versions of a result."""
    return {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "python": platform.python_version(),
        "diffusers_msfp": version("diffusers-msfp"),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "numpy": np.__version__,
    }


def _ssim() -> Callable[..., Tensor]:
    try:
        from torchmetrics.functional.image import structural_similarity_index_measure
    except ImportError as error:
        raise UnsupportedError(
            'An evaluation needs torchmetrics, which is not installed: `pip install "diffusers-msfp[eval]"`.'
        ) from error
    return structural_similarity_index_measure


def _stage(on_step: Callable[[int, int, str], None] | None, what: str) -> Callable[[int, int], None] | None:
    return None if on_step is None else lambda done, total: on_step(done, total, what)


def _finite(images: Tensor, name: str) -> Tensor:
    bad = int((~images.flatten(1).isfinite().all(1)).sum())
    if bad:
        raise NonFiniteError(
            f"Pictures must be finite, but {bad} of {len(images)} that the {name} made hold NaN or infinity. Look for "
            f"the layer in a wider dtype."
        )
    return images


def _compare_sets(found: dict[str, Features], seed: int) -> tuple[dict[str, dict[str, Estimate]], dict[str, str]]:
    """Figures of each pair of sets, and why some are missing."""
    figures, omitted = {}, {}
    pairs = [("candidate", "reference"), ("candidate", "real"), ("reference", "real")]
    for one, other in pairs:
        if other not in found:
            continue
        pair = f"{one}_to_{other}"
        figures[pair] = {}
        a, b = found[one], found[other]
        for name, left, right in (
            ("frechet_distance", a.pooled, b.pooled),
            ("spatial_frechet_distance", a.spatial, b.spatial),
        ):
            reason = _too_few(left, right)
            if reason:
                omitted[f"{pair}.{name}"] = reason
            else:
                figures[pair][name] = frechet_estimate(left, right, paired=other == "reference", seed=seed)
        number = min(len(a.pooled), len(b.pooled))
        if number < MIN_NEIGHBOURHOOD:
            reason = f"needs {MIN_NEIGHBOURHOOD} pictures in each set for neighbourhoods, but {number} came"
            omitted |= {f"{pair}.precision": reason, f"{pair}.recall": reason}
        else:
            left, right = a.pooled[:number], _some(b.pooled, number, seed)
            figures[pair]["precision"] = mean_of(within_manifold(left, right), seed)
            figures[pair]["recall"] = mean_of(within_manifold(right, left), seed)
    scores = {name: classifier_score(f.logits, seed) for name, f in found.items() if f.logits is not None}
    if scores:
        figures["classifier_score"] = scores
    else:
        omitted["classifier_score"] = "these features have no logits"
    return figures, omitted


def _too_few(a: Tensor | None, b: Tensor | None) -> str | None:
    """Why two sets have no Fréchet distance, if they have none."""
    if a is None or b is None:
        return "these features have no spatial part"
    number, width = min(len(a), len(b)), a.shape[1]
    return None if number > width else f"needs more than {width} pictures in each set, but {number} came"


def _some(points: Tensor, number: int, seed: int) -> Tensor:
    """Equal numbers, since a manifold grows with its points; all in their order where there are no more."""
    if len(points) == number:
        return points
    return points[torch.randperm(len(points), generator=torch.Generator().manual_seed(seed))[:number]]

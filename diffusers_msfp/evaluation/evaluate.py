"""A quantized pipeline against its full-precision original and against real pictures, in figures with intervals.

Sets of pictures are compared by features of a network; pictures of equal noise by PSNR and SSIM; the denoisers by their
outputs and by the outputs of their layers.
"""

import platform
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import diffusers
import numpy as np
import torch
from accelerate import PartialState
from diffusers import DiffusionPipeline, ModelMixin

from ..errors import ConfigError, StateError, UnsupportedError
from ..results import OPTIONAL, OnProgress, in_stage
from ..sampling.observation import calibration_state, quantized_models
from .compare import compare_pipelines, in_place_of
from .images.agreement import class_agreement
from .images.distances import Estimate
from .images.features import FeatureNetwork, default_features, extract, feature_network
from .images.real import load_real
from .images.samples import draw_pictures
from .images.sets import compare_pictures, compare_sets, require_finite_pictures, require_ssim, without_features
from .layers import LayerError, layer_snr
from .output_errors import ComparedDenoiser, DenoiserError

COMPARED = 16
"""Samples for the denoiser's error; its layers take a quarter of them."""


@dataclass(frozen=True, kw_only=True)
class Evaluation(DenoiserError):
    """What `evaluate_pipelines` found; `eps_mse` and its like as `Comparison` has them.

    Args:
        denoisers (`Mapping[str, ComparedDenoiser]`, *optional*): by name where there are several.
        figures (`Mapping[str, Mapping[str, Estimate]]`): `candidate_to_reference`, and where there is data
            `candidate_to_real` and `reference_to_real`: `frechet_distance`, `spatial_frechet_distance`, `precision`,
            `recall`; the first also has `psnr_db` and `ssim` for equal noise; `classifier_score`: `reference`,
            `candidate`, `real`; and for conditional pipelines `class_agreement`: `reference`, `candidate`, the share
            of pictures that the features' classifier takes for the class that was asked.
        omitted (`Mapping[str, str]`): figure → why it is missing.
        layers (`Mapping[str, LayerError]`): see `layer_snr`.
        settings (`Mapping[str, Any]`): of the run.
        origin (`Mapping[str, str]`): machine and versions.
    """

    denoisers: Mapping[str, ComparedDenoiser] | None = field(default=None, metadata=OPTIONAL)
    figures: Mapping[str, Mapping[str, Estimate]]
    omitted: Mapping[str, str]
    layers: Mapping[str, LayerError]
    settings: Mapping[str, Any]
    origin: Mapping[str, str]


def evaluate_pipelines(
    reference: DiffusionPipeline,
    candidate: DiffusionPipeline | ModelMixin,
    *,
    data: str | Path | None = None,
    num_samples: int = 2000,
    num_inference_steps: int = 20,
    features: str | None = None,
    seed: int = 0,
    sampler: str | None = None,
    prompts: list[str] | None = None,
    folder: str | Path | None = None,
    process: PartialState | None = None,
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> Evaluation | None:
    """All figures of a candidate; the noise of picture i depends on `seed` and i alone.

    Args:
        reference (`DiffusionPipeline`): full precision; not changed.
        candidate (`DiffusionPipeline` or `ModelMixin`): see `compare_pipelines`.
        data (`str` or `Path`, *optional*): real pictures, see `load_real`.
        num_samples, num_inference_steps (`int`): pictures of each pipeline, denoising steps.
        features (`str`, *optional*): see `feature_network`; by default as `default_features`, and where their weights
            are missing, what needs no features is computed, and the rest stands in `omitted`.
        seed (`int`): of noise and resampling.
        sampler (`str`, *optional*): see `with_sampler`.
        prompts (`list[str]`, *optional*): taken in turn where the pipeline takes prompts.
        folder (`str` or `Path`, *optional*): keeps pictures, so that a killed run goes on and the reference's are made
            once for many candidates.
        process (`PartialState`, *optional*): of `accelerate launch`: each process draws its share, into `folder`.
        on_progress (`OnProgress`, *optional*): called with (done, total, stage=what is being done).
        **arguments: passed on to both pipelines.

    Returns:
        `Evaluation`; None in all processes but the first.

    Raises:
        ConfigError: settings that cannot be honoured, or pipelines or pictures that do not fit together.
        NonFiniteError: pictures hold NaN.
        UnsupportedError: a package is missing, or the weights of features that were asked for.
    """
    if num_samples < 2:
        raise ConfigError(f"`num_samples` must be at least 2, but got {num_samples}.")
    if process is not None and process.num_processes > 1 and folder is None:
        raise ConfigError("Several processes must share a `folder` of pictures, but none was given.")
    candidate = in_place_of(reference, candidate)
    pipes = {"reference": reference, "candidate": candidate}
    for name, pipe in pipes.items():
        if any(calibration_state(model) == "observing" for model in quantized_models(pipe)):
            raise StateError(
                f"Only calibrated models can be evaluated, but the {name} still observes its ranges. Call "
                f"`calibrate(pipe)` first."
            )
    require_ssim()
    process = process or PartialState(cpu=not torch.accelerator.is_available())
    run: dict[str, Any] = {
        "num_inference_steps": num_inference_steps,
        "seed": seed,
        "sampler": sampler,
        "prompts": prompts,
    }
    shape = _shape(reference, candidate, run | arguments)
    features, network, lacking = _features(features, shape)
    real, adapted = load_real(data, shape) if data is not None else (None, None)
    compare_pipelines(reference, candidate, num_samples=1, **run, **arguments)  # refuses what drawing does not show
    sets = {}
    for name, pipe in pipes.items():
        draw = partial(
            draw_pictures,
            pipe,
            num_samples=num_samples,
            folder=Path(folder) if folder is not None else None,
            on_progress=in_stage(on_progress, f"pictures of the {name}"),
            **run,
            **arguments,
        )
        if process.num_processes > 1:
            draw(share=(process.process_index, process.num_processes))
            process.wait_for_everyone()
        if process.is_main_process:
            sets[name] = require_finite_pictures(draw(), name)
    if not process.is_main_process:
        return None
    everything = sets if real is None else sets | {"real": real}
    if network is None:
        own_sets = {}
        figures, omitted = without_features(everything, lacking)
    else:
        found = {name: extract(network, images) for name, images in everything.items()}
        figures, omitted = compare_sets(found, seed)
        own_sets = {name: found[name] for name in pipes}
    shares, reason = class_agreement(
        reference, network, own_sets, num_samples=num_samples, seed=seed, prompts=prompts, arguments=arguments
    )
    figures |= {"class_agreement": shares} if shares else {}
    omitted |= {"class_agreement": reason} if reason else {}
    own, missing = compare_pictures(sets["reference"], sets["candidate"], seed)
    figures["candidate_to_reference"] |= own
    omitted |= {f"candidate_to_reference.{name}": reason for name, reason in missing.items()}
    run |= arguments
    compared = compare_pipelines(
        reference, candidate, num_samples=COMPARED, on_progress=in_stage(on_progress, "denoisers"), **run
    )
    layers = layer_snr(
        reference, candidate, num_samples=COMPARED // 4, on_progress=in_stage(on_progress, "layers"), **run
    )
    return Evaluation(
        traj_rel_l2=compared.traj_rel_l2,
        eps_mse=compared.eps_mse,
        eps_rel_l2=compared.eps_rel_l2,
        eps_rel_l2_by_timestep=compared.eps_rel_l2_by_timestep,
        denoisers=compared.denoisers,
        figures=figures,
        omitted=omitted,
        layers=layers,
        settings={
            "num_samples": num_samples,
            "num_inference_steps": num_inference_steps,
            "seed": seed,
            "features": features,
            "prompts": prompts,
            "data": None
            if real is None
            else {"pictures": len(real), "source": Path(cast(str, data)).name, "adapted": adapted},
            "scheduler": compared.sampler,
            "picture_shape": list(shape),
        },
        origin=origin(),
    )


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


def _features(name: str | None, shape: tuple[int, ...]) -> tuple[str | None, FeatureNetwork | None, str]:
    """Name and network; where none was asked for and those that fit are not there, neither, and why."""
    wanted = name or default_features(shape)
    try:
        return wanted, feature_network(wanted), ""
    except UnsupportedError as error:
        if name:
            raise
        return None, None, str(error).rstrip(".")


def _shape(reference: DiffusionPipeline, candidate: DiffusionPipeline, run: dict) -> tuple[int, ...]:
    """Of the pictures of both, from one of each: pipelines that begin at a picture may have no run of fewer steps."""
    one, other = (tuple(draw_pictures(pipe, num_samples=1, **run).shape[1:]) for pipe in (reference, candidate))
    if one != other:
        raise ConfigError(
            f"Both pipelines must make pictures of one shape, but got {one} and {other}: the candidate is not a "
            f"quantized version of the reference."
        )
    return one

"""Temporal feature maintenance (TFMQ-DM, arXiv 2311.16503, and its extension 2407.19547) of a quantized pipeline.

What depends on the timestep alone takes finitely many values, so it can be kept right for each of them: by rounding its
weights for exactly these inputs (TIAR), by input parameters for each timestep (FSC), or by storing its outputs. As
reconstructed: the extension's rule for what to store was not found; here a layer is stored whose reconstruction stays
above an error. Errors are relative for each layer and timestep, where the paper sums squared errors.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ...compat.torch import device_of
from ...compat.wrappers import sees_through
from ...errors import ConfigError, NothingToDoError
from ...layers.convert import layers_by_name
from ...numerics.rounding import check_finite
from ...results import Result
from ...sampling.calls import call_arguments, require_positive
from ...sampling.denoisers import ByDenoiser, by_denoiser, denoiser_of, each_quantized
from ..checks import check_student, require_takes
from . import SCOPES, TemporalBlock, TemporalPlan, store_features
from .attach import attach_sets
from .probe import TemporalProbe
from .reconstruct import StudentBlock, neighbourhoods
from .sets import observe_sets

logger = logging.getLogger(__name__)

CACHE_TOLERANCE = 1e-3
"""Relative error that stored features may have; float16 costs at most half of it."""


@dataclass(frozen=True)
class TemporalConfig:
    """Settings of `maintain_temporal`.

    Args:
        num_inference_steps (`int`): of the sampler whose timesteps are the finite set.
        iterations (`int`): of joint reconstruction (TIAR); 0 leaves the weights as they are.
        learning_rate (`float`): of its optimizer, Adam.
        penalty (`float`): weight of AdaRound's regulariser, the mean over all weights.
        fsc (`str`, *optional*): input parameters for each timestep in the `"block"`, as the paper has it, or in
            `"all"` layers, as its released code does; None for none.
        cache_above (`float`, *optional*): store the outputs of layers whose relative error stays above this at some
            timestep; 0 stores all, None nothing.
        num_samples (`int`): that ranges for `"all"` layers are taken from.
        seed (`int`): of the samples' noise.

    Raises:
        ConfigError: a value that makes no sense.

    Example:
        >>> TemporalConfig(fsc="all", cache_above=None).fsc
        'all'
    """

    num_inference_steps: int = 20
    iterations: int = 4000
    learning_rate: float = 0.03
    penalty: float = 0.1
    fsc: str | None = "block"
    cache_above: float | None = 0.01
    num_samples: int = 16
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(num_inference_steps=self.num_inference_steps, num_samples=self.num_samples)
        if self.fsc not in (*SCOPES, None):
            raise ConfigError(f"`fsc` must be one of {', '.join(SCOPES)} or None, but got {self.fsc!r}.")
        if self.iterations < 0 or self.learning_rate <= 0 or self.penalty < 0 or (self.cache_above or 0) < 0:
            raise ConfigError(
                f"`iterations`, `penalty` and `cache_above` must be ≥ 0 and `learning_rate` > 0, but got "
                f"{self.iterations}, {self.penalty}, {self.cache_above} and {self.learning_rate}."
            )


@dataclass(frozen=True, kw_only=True)
class TemporalMaintenance(Result):
    """What is kept right, and what that takes.

    Args:
        timesteps (`Sequence[float]`): the finite set.
        block (`Sequence[str]`): layers that depend on the timestep alone.
        sets (`Sequence[str]`): layers with parameters for each timestep.
        cached (`Sequence[str]`): layers whose outputs are stored.
        sets_bytes, cache_bytes (`int`): of the two.
        errors (`Mapping[str, Mapping[str, float]]`): layer → largest relative error over the set's timesteps: `ptq`
            before, `reconstructed` after TIAR and FSC, without stored outputs.
    """

    timesteps: Sequence[float]
    block: Sequence[str]
    sets: Sequence[str]
    cached: Sequence[str]
    sets_bytes: int
    cache_bytes: int
    errors: Mapping[str, Mapping[str, float]]


@sees_through
def maintain_temporal(
    pipe: DiffusionPipeline,
    teacher: DiffusionPipeline,
    config: TemporalConfig | None = None,
    *,
    prompts: Sequence[str] | None = None,
    **arguments: Any,
) -> TemporalMaintenance | ByDenoiser:
    """Keep the temporal features of a quantized pipeline right, in place, at every timestep of a sampler.

    No data are needed: the block's inputs are timesteps. Samplers with other timesteps work too: inputs take the
    parameters of the nearest timestep, and layers are computed where no output is stored. Fine-tuning afterwards leaves
    layers that were reconstructed or stored as they are; those with sets learn them beside one merged adapter.

    Args:
        pipe (`DiffusionPipeline`): quantized and calibrated, without adapters.
        teacher (`DiffusionPipeline`): the full-precision original; its scheduler gives the finite set.
        config (`TemporalConfig`, *optional*): settings.
        prompts (`Sequence[str]`, *optional*): taken in turn where the pipeline takes prompts.
        **arguments: passed on to the teacher, e.g. `guidance_scale=…`.

    Returns:
        `TemporalMaintenance`; where several denoisers are quantized, a `ByDenoiser` of these.

    Raises:
        ConfigError: pipelines that do not fit, or no quantized layer that depends on the timestep alone.
        StateError: the model is observing, offloaded, or has what this method forbids; the teacher is quantized.
        ShapeError: the teacher is another model. Nothing is changed after any of these.

    Source:
        arXiv 2311.16503, sections 4.2 (TIAR) and 4.3 (FSC); 2407.19547 (cache and selection), as reconstructed.

    Example:
        ```py
        pipe = quantize_pipeline(DiffusionPipeline.from_pretrained("model"), "w4a8")
        maintain_temporal(pipe, DiffusionPipeline.from_pretrained("model"))
        ```
    """
    config = config or TemporalConfig()
    views = each_quantized(pipe, teacher)
    for own, original in views.values():
        model = denoiser_of(own)
        check_student(model, denoiser_of(original), "temporal", learns=False)
        if config.fsc == "all":
            require_takes(model, denoiser_of(original))
    ready: dict[str, Callable[[], TemporalMaintenance]] = {}
    refused: NothingToDoError | None = None
    for name, view in views.items():
        try:
            ready[name] = _maintain(*view, config, prompts, arguments)
        except NothingToDoError as error:
            refused = error
            logger.warning("`%s`: %s", name, error)
    if refused is not None and not ready:
        raise refused
    return by_denoiser({name: apply() for name, apply in ready.items()})  # only now are models changed


def _maintain(
    pipe: DiffusionPipeline,
    teacher: DiffusionPipeline,
    config: TemporalConfig,
    prompts: Sequence[str] | None,
    arguments: dict,
) -> Callable[[], TemporalMaintenance]:
    """All that one denoiser needs; the function that is returned changes it and gives `maintain_temporal`'s result."""
    model, layers = denoiser_of(pipe), layers_by_name(denoiser_of(pipe))
    make_arguments = call_arguments(teacher, prompts, config.num_inference_steps, arguments)
    probe = TemporalProbe(teacher, layers, make_arguments, config.seed)
    if not probe.block.layers:
        raise NothingToDoError(
            f"{type(model).__name__} must have a quantized linear that depends on the timestep alone, but it has none: "
            f"there is nothing to maintain."
        )
    points = neighbourhoods(probe.timesteps)
    roots = {name: x.unflatten(0, points.shape) for name, x in probe.roots(points.flatten()).items()}
    parts = roots, probe.features(roots), probe.weights
    roots, targets, originals = ({name: x.to(device_of(model)) for name, x in part.items()} for part in parts)
    for name, target in targets.items():
        check_finite(target, f"The output of the teacher's layer `{name}`")
    student = StudentBlock(probe.block, layers)
    measure = partial(_errors_of_set, student, roots, targets)
    before = measure()
    if config.fsc:
        student.search_sets(roots)
    if config.iterations:
        steps = {key: getattr(config, key) for key in ("iterations", "learning_rate", "penalty")}
        student.reconstruct(roots, targets, originals, **steps)
        if config.fsc:
            student.search_sets(roots)
    reconstructed = measure()
    features = {
        name: store_features(targets[name][:, 0], CACHE_TOLERANCE)
        for name in choose_cached(probe.block, reconstructed, config.cache_above)
    }
    sets = student.sets
    if config.fsc == "all":
        counts = {"num_samples": config.num_samples, "seed": config.seed}
        sets = sets | observe_sets(model, teacher, make_arguments, probe.timesteps, sets, **counts)

    def apply() -> TemporalMaintenance:
        for name, weight in student.weights.items() if config.iterations else ():
            layers[name].store_banks([weight], originals[name])
        for name, parameters in sets.items():
            layers[name].store_input(*parameters)
        cached: dict[str, list[str]] = {}
        for name, table in features.items():
            cached.setdefault(str(table.dtype).removeprefix("torch."), []).append(name)
        plan = TemporalPlan(len(points), probe.block.names, tuple(sets), cached, asdict(config), probe.upstream)
        attach_sets(model, plan, probe.timesteps.to(device_of(model)), features)
        channels = {name: layer.logical_shape[0] for name, layer in layers.items()}
        errors = {name: {"ptq": before[name], "reconstructed": reconstructed[name]} for name in targets}
        return TemporalMaintenance(**plan.summary(probe.timesteps.tolist(), channels), errors=errors)

    return apply


def choose_cached(block: TemporalBlock, errors: Mapping[str, float], above: float | None) -> list[str]:
    """Layers whose outputs are worth storing: those with a larger error than `above`, and what only they read.

    A layer that others of the block read is stored if all of them are: then it need not be computed.

    Args:
        errors (`Mapping[str, float]`): of each layer, as reconstructed.
        above (`float`, *optional*): None stores nothing.
    """
    chosen: set[str] = set()
    for name in reversed(block.names):  # readers come after what they read
        readers = block.readers(name)
        worth = all(reader in chosen for reader in readers) if readers else errors[name] > (above or 0)
        if worth and above is not None:
            chosen.add(name)
    return [name for name in block.names if name in chosen]


@torch.no_grad()
def _errors_of_set(student: StudentBlock, roots: Mapping[str, Tensor], targets: Mapping[str, Tensor]) -> dict:
    """Relative error of each layer, the largest over the entries' own timesteps."""
    outputs = student.run(roots)
    return {
        name: ((y - targets[name])[:, 0].norm(dim=-1) / targets[name][:, 0].norm(dim=-1).clamp_min(1e-30)).max().item()
        for name, y in outputs.items()
    }

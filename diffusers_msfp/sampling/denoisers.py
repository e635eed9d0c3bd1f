"""Which of a pipeline's models predict noise, by what schedulers they are led, and what they put out."""

import copy
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..compat.diffusers import Scheduler, labels_by_name
from ..compat.wrappers import unwrap
from ..errors import ConfigError, ShapeError
from ..layers import QuantLayer
from ..results import Result, plain
from .timestep import timestep_argument

R = TypeVar("R", bound=Result)
logger = logging.getLogger(__name__)

_MAIN = ("unet", "transformer", "prior")
DENOISERS = (
    *_MAIN,
    "decoder",
    "transformer_2",
    "prior_prior",
    "unconditional_transformer",
    "image_unet",
    "text_unet",
    "super_res_first",
    "super_res_last",
)
"""Names of such models in pipelines; under another than the first three only what takes a timestep is one."""

_FOCUS = "_denoiser_in_view"
PIXELS_PER_BATCH = 2**14


def is_denoiser(name: str, kind: type | None) -> bool:
    """Whether a pipeline's component of this name and class predicts noise; so it does where the class is unknown."""
    return name in DENOISERS and (name in _MAIN or kind is None or timestep_argument(kind).name is not None)


def denoisers_of(pipe: DiffusionPipeline, *, required: bool = True) -> dict[str, nn.Module]:
    """All networks of a pipeline that predict noise, by name; only one where `focus` says so.

    Raises:
        ConfigError: there is none, but `required`; or it is no pipeline but a model.
    """
    if isinstance(pipe, nn.Module):
        raise ConfigError(
            f"A pipeline is needed here, since a {type(pipe).__name__} alone cannot be sampled. Pass the pipeline that "
            f"it belongs to."
        )
    focused = vars(pipe).get(_FOCUS)
    names = DENOISERS if focused is None else (focused,)
    parts = {name: getattr(pipe, name, None) for name in names}
    models = {name: unwrap(part) for name, part in parts.items() if isinstance(part, nn.Module)}
    found = {name: model for name, model in models.items() if is_denoiser(name, type(model))}
    if not found and required:
        raise ConfigError(
            f"A pipeline must have a `unet`, `transformer` or `prior` (or one of {', '.join(DENOISERS[3:])}), but "
            f"{type(pipe).__name__} has none."
        )
    return found


def denoiser_name(pipe: DiffusionPipeline) -> str:
    """Under which name a pipeline has the network that predicts noise, the first of them where there are several."""
    return next(iter(denoisers_of(pipe)))


def denoiser_of(pipe: DiffusionPipeline) -> nn.Module:
    """The network that predicts noise, the first of them where there are several."""
    return next(iter(denoisers_of(pipe).values()))


def each_quantized(
    pipe: DiffusionPipeline, teacher: DiffusionPipeline
) -> dict[str, tuple[DiffusionPipeline, DiffusionPipeline]]:
    """A quantized pipeline and its float original for each quantized denoiser, looking at this one only.

    Where there are several, those that stay float are named in a warning. Both are asked for the same classes: where
    one has lost their names, as checkpoints of diffusers may, it has the other's.

    Returns:
        `dict`: name → the two pipelines; the first denoiser where none is quantized.

    Raises:
        ConfigError: the teacher lacks one.
        ShapeError: it has another model there.
    """
    models = denoisers_of(pipe)
    named = labels_by_name(teacher) or labels_by_name(pipe)
    pipe, teacher = (labelled(each, named) for each in (pipe, teacher))
    if len(models) == len(denoisers_of(teacher)) == 1:
        require_same_class(denoiser_of(pipe), denoiser_of(teacher))
        return {next(iter(models)): (pipe, teacher)}
    found = [name for name, model in models.items() if is_quantized(model)] or list(models)[:1]
    warn_of_float(type(pipe).__name__, [name for name in models if name not in found])
    missing = [name for name in found if name not in denoisers_of(teacher)]
    if missing:
        raise ConfigError(
            f"The teacher must have the denoisers of the quantized pipeline, but {type(teacher).__name__} has no "
            f"`{missing[0]}`."
        )
    for name in found:
        require_same_class(models[name], denoisers_of(teacher)[name])
    return {name: (focus(pipe, name), focus(teacher, name)) for name in found}


def require_same_class(model: nn.Module, teacher: nn.Module) -> None:
    """Refuse a teacher that is another model than the one that was quantized, before it is called as if it were.

    Raises:
        ShapeError: its class is another one.
    """
    if type(model) is not type(teacher):
        raise ShapeError(
            f"The teacher must be the model that was quantized, a {type(model).__name__}, but got "
            f"{type(teacher).__name__}."
        )


def batch_size_for(models: Sequence[nn.Module], num_samples: int) -> int:
    """As many samples at once as keep the latents near 16 000 positions."""
    for model in models:
        size = getattr(model.config, "sample_size", None)
        if size:
            height, width = size if isinstance(size, Sequence) else (size, size)
            return max(1, min(16, num_samples, PIXELS_PER_BATCH // (height * width)))
    return 1


def num_classes_of(pipe: DiffusionPipeline) -> int | None:
    """How many class labels a pipeline's models know; None where they take none."""
    models = [m for m in pipe.components.values() if isinstance(m, nn.Module) and hasattr(m, "config")]
    numbers = [getattr(m.config, name, None) for m in models for name in ("num_embeds_ada_norm", "num_class_embeds")]
    return next((number for number in numbers if number), None)


def labels_of(pipe: DiffusionPipeline) -> Sequence[int]:
    """The class labels that a pipeline names (`id2label`), else all that its models know; empty where there are none.

    A model may have embeddings for more labels than it was trained on.
    """
    named = labels_by_name(pipe)
    return sorted(set(named.values())) if named else range(num_classes_of(pipe) or 0)


def asked_for(pipe: DiffusionPipeline, arguments: Mapping[str, Any], size: int) -> list[str]:
    """What each picture of a call was asked to be, by its prompt or the name of its class; empty where nothing was.

    Args:
        pipe (`DiffusionPipeline`): that was called.
        arguments (`Mapping[str, Any]`): with these.
        size (`int`): pictures that it made.
    """
    names: dict[int, str] = {}
    for name, label in labels_by_name(pipe).items():
        names.setdefault(label, name)
    given = next((arguments[name] for name in ("prompt", "class_labels") if arguments.get(name) is not None), ())
    each = [given] * size if isinstance(given, (str, int)) else list(given)
    asked = [names.get(one, f"class {one}") if isinstance(one, int) else str(one) for one in each]
    return asked if len(asked) == size else []


@cache
def say_unnamed(kind: str, number: int) -> None:
    """Say, once, that all classes are taken which a pipeline's models know."""
    logger.warning(
        "%s names no classes (`id2label`), so labels are drawn from all %d that its model knows. Where it was trained "
        'on fewer, name these: `pipe.labels = {"ship": 8, …}`.',
        kind,
        number,
    )


def labelled(pipe: DiffusionPipeline, labels: Mapping[str, int]) -> DiffusionPipeline:
    """A pipeline with these names of its classes: itself if it has them, else a shallow copy."""
    if labels_by_name(pipe) == labels:
        return pipe
    copied = copy.copy(pipe)
    vars(copied)["labels"] = dict(labels)
    return copied


def warn_of_float(owner: str, names: Sequence[str]) -> None:
    """Say which denoisers of a pipeline are left alone."""
    if names:
        told = " and ".join(f"`{name}`" for name in names)
        logger.warning("%s: the denoiser %s stays float.", owner, told)


@dataclass(frozen=True, kw_only=True)
class ByDenoiser(Result):
    """What a verb found for each of several denoisers.

    Args:
        denoisers (`Mapping[str, Result]`): by name.
    """

    denoisers: Mapping[str, Result]

    def to_dict(self) -> dict[str, Any]:
        """Denoiser → its own result's `to_dict`."""
        return plain(self.denoisers)


def by_denoiser(results: Mapping[str, R]) -> R | ByDenoiser:
    """Results by denoiser; of a single one its own alone."""
    return ByDenoiser(denoisers=dict(results)) if len(results) > 1 else next(iter(results.values()))


def work_folders(folder: str | Path | None, names: Iterable[str]) -> dict[str, Path | None]:
    """Where each denoiser's run keeps its state: in the folder itself, or in one below it where there are several."""
    names = list(names)
    if folder is None or len(names) == 1:
        return {name: None if folder is None else Path(folder) for name in names}
    return {name: Path(folder) / name for name in names}


def is_quantized(model: nn.Module) -> bool:
    """Whether a model has quantized layers."""
    return any(isinstance(module, QuantLayer) for module in model.modules())


def focus(pipe: DiffusionPipeline, name: str) -> DiffusionPipeline:
    """A shallow copy of a pipeline of which one denoiser only is looked at; it runs as the pipeline does."""
    copied = copy.copy(pipe)
    vars(copied)[_FOCUS] = name
    return copied


def scheduler_of(pipe: DiffusionPipeline) -> Scheduler:
    """The scheduler that leads a pipeline's (first) denoiser: a prior or a decoder may have one of its own."""
    stage = denoiser_name(pipe).partition("_")[0]  # prior, decoder, super
    own = {"prior": "prior_scheduler", "decoder": "decoder_scheduler", "super": "super_res_scheduler"}.get(stage)
    found = getattr(pipe, own or "scheduler", None)
    return pipe.scheduler if found is None else found


def model_output(output: Any) -> Tensor:
    """What a denoiser predicts: the first field of its output object or tuple.

    Raises:
        ConfigError: it is no tensor.
    """
    first = output if isinstance(output, Tensor) else output[0]  # output objects count their fields like tuples
    if isinstance(first, list | tuple) and len({getattr(each, "shape", None) for each in first}) == 1:
        first = torch.stack(list(first))  # a tensor for each sample
    if not isinstance(first, Tensor):
        raise ConfigError(f"A denoiser's first output must be a tensor, but got {type(first).__name__}.")
    return first


@contextmanager
def attention_kept(pipe: DiffusionPipeline) -> Iterator[None]:
    """Where an error ends the block, models get the attention processors back that a pipeline had exchanged.

    Pipelines with perturbed-attention guidance exchange them for the time of a call, and give them back at its end.
    """
    parts = getattr(pipe, "components", None) or {}
    models = [part for part in parts.values() if hasattr(part, "set_attn_processor")]
    before = [(model, attention_of(model)) for model in models]
    try:
        yield
    except BaseException:
        for model, own in before:
            if own != attention_of(model):
                model.set_attn_processor(dict(own or {}))
        raise


def attention_of(model: object) -> dict[str, Any] | None:
    """A model's attention processors by name; None where it does not say."""
    return getattr(model, "attn_processors", None)

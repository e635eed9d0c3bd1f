"""What must hold of a checkpoint before it is published: it loads, it samples, it is packed."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline, ModelMixin
from safetensors import SafetensorError

from ..checkpoint.describe import component_dirs, weights_by_variant
from ..checkpoint.opening import opened
from ..errors import CheckpointError, ConfigError, MSFPError
from ..evaluation import sample_images
from ..layers import QuantLayer
from ..layers.stored import name_in_files
from ..results import OnProgress
from ..sampling.observation import calibration_state, quantized_models


def all_at_once(*checks: Callable[[], object]) -> None:
    """Run checks and say together what is wrong.

    Args:
        checks (`Callable[[], object]`): each may raise an `MSFPError`.

    Raises:
        MSFPError: the only one that came, as it is.
        ConfigError: several came; all of them in one message.
    """
    found: list[MSFPError] = []
    for check in checks:
        try:
            check()
        except MSFPError as error:
            found.append(error)
    if len(found) == 1:
        raise found[0]
    if found:
        listed = " ".join(f"({number}) {error}" for number, error in enumerate(found, 1))
        raise ConfigError(f"{len(found)} things must be put right before this can be published: {listed}")


@dataclass(frozen=True)
class Checked:
    """What the checks found.

    Args:
        pipe (`DiffusionPipeline`): as it was loaded.
        variant (`str`, *optional*): that it was loaded as; None for plain weights.
        images (`np.ndarray`, `(N, H, W, channels)`): samples in [0, 1].
    """

    pipe: DiffusionPipeline
    variant: str | None
    images: np.ndarray


def check_checkpoint(
    folder: Path,
    *,
    variant: str | None = None,
    num_samples: int,
    num_inference_steps: int,
    seed: int,
    prompts: list[str] | None = None,
    on_progress: OnProgress | None = None,
) -> Checked:
    """Load a checkpoint as its users will, in every variant, and sample from it.

    Args:
        folder (`Path`): a pipeline with at least one quantized component.
        variant (`str`, *optional*): that is sampled; the plain one by default, where there is one.
        num_samples, num_inference_steps, seed, prompts, on_progress: see `sample_images`.

    Raises:
        CheckpointError: it does not load, is not calibrated, holds float copies of packed weights or other tensors that
            no model reads, or samples NaN.
    """
    files = {name: weights_by_variant(path) for name, path in component_dirs(folder).items()}
    there = {each for found in files.values() for each in found}
    if not there:
        raise CheckpointError(f"{folder} must hold weights as safetensors, but it holds none.")
    if variant is not None and variant not in there:
        known = ", ".join(sorted(f"`{each}`" if each else "plain ones" for each in there))
        raise CheckpointError(f"{folder} must hold weights of the variant `{variant}`, but it has {known}.")
    wanted = sorted(there, key=lambda each: (each != variant, each or ""))
    for each in reversed(wanted):  # the first one last: it is sampled
        pipe = _load(folder, each)
        for name, found in files.items():
            _check_tensors(found.get(each, ()), getattr(pipe, name))
    if any(calibration_state(model) == "observing" for model in quantized_models(pipe)):
        raise CheckpointError(
            f"A published checkpoint must be calibrated, but {folder} still observes its activations. Call "
            f"`calibrate(pipe)` and save it."
        )
    try:
        images = sample_images(
            pipe,
            num_samples=num_samples,
            num_inference_steps=num_inference_steps,
            seed=seed,
            prompts=prompts,
            on_progress=on_progress,
        )
    except (MSFPError, RuntimeError) as error:
        raise CheckpointError(f"A published checkpoint must sample, but {folder} does not: {error}") from error
    if not np.isfinite(images).all():
        raise CheckpointError(f"Samples must be finite, but those of {folder} hold NaN: damaged or badly calibrated.")
    return Checked(pipe, wanted[0], images)


def _load(folder: Path, variant: str | None) -> DiffusionPipeline:
    try:
        return DiffusionPipeline.from_pretrained(folder, variant=variant, use_safetensors=True)
    except MSFPError:
        raise
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise CheckpointError(f"A published checkpoint must load, but {folder} does not: {error}") from error


def _check_tensors(files: Sequence[Path], model: ModelMixin) -> None:
    """The files of a model hold its tensors, packed ones as bytes, and no others."""
    packed = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, QuantLayer)}
    known = {name_in_files(name) for name in model.state_dict()}
    seen: set[str] = set()
    for file in files:
        with opened(file) as handle:
            found = {key: handle.get_slice(key).get_dtype() for key in handle.keys()}
        for key, dtype in found.items():
            if key in seen or key not in known or (key in packed and dtype != "U8"):
                raise CheckpointError(
                    f"Files must hold each of the model's tensors once, packed ones as bytes, and nothing else, but "
                    f"{file} holds `{key}` as {dtype}, {'a second time' if key in seen else 'which nothing reads'}. "
                    f"Save the quantized pipeline to a new folder."
                )
        seen |= found.keys()

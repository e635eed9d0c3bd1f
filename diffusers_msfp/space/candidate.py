"""A pipeline on the page: what it takes, what it is called, what it weighs, which adapter it uses when."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import cached_property
from inspect import signature, unwrap
from typing import Any, cast

import torch
from diffusers import (
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    ModelMixin,
    UniPCMultistepScheduler,
)
from diffusers.utils import BaseOutput

from ..compat.diffusers import labels_by_name
from ..engines.choose import resident_bytes
from ..errors import ConfigError
from ..methods.routes import routing_of
from ..plugin.config import config_of
from ..sampling.calls import call_arguments, require_positive, unseen
from ..sampling.denoisers import denoiser_of, num_classes_of
from ..sampling.observation import quantized_models
from ..sampling.solvers import takes_ddim
from .denoise import decoder_of

SOLVERS = {
    "DDIM": DDIMScheduler,
    "DPM-Solver++": DPMSolverMultistepScheduler,
    "UniPC": UniPCMultistepScheduler,
}
SMALL = 256  # pixels
MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class Candidate:
    """One pipeline, and how the page asks it for pictures.

    Args:
        pipe (`DiffusionPipeline`): shared by all visitors, never changed.

    Raises:
        ConfigError: a pipeline that needs more than noise, a prompt or a class, such as one for inpainting, or that
            makes no pictures.
    """

    pipe: DiffusionPipeline

    def __post_init__(self) -> None:
        made = _outputs(type(self.pipe))
        if made and not any("images" in names for names in made.values()):
            raise ConfigError(
                f"The page shows pictures, but {type(self.pipe).__name__} puts out a {' or a '.join(made)}, which "
                f"holds none. Draw by `diffusers-msfp sample`, which takes the first frames of videos."
            )
        call_arguments(self.pipe, None, 1, {})

    @property
    def denoiser(self) -> ModelMixin:
        """The pipeline's (first) denoiser."""
        return cast(ModelMixin, denoiser_of(self.pipe))

    @cached_property
    def name(self) -> str:
        """The scheme of a quantized one, the dtype of another."""
        denoiser = self.denoiser
        if list(quantized_models(denoiser)):
            return config_of(denoiser).scheme
        return str(denoiser.dtype).removeprefix("torch.")

    @cached_property
    def parameters(self) -> frozenset[str]:
        """Names of what the pipeline's call takes."""
        return frozenset(signature(cast(Any, self.pipe).__call__).parameters)

    @cached_property
    def guidance_scale(self) -> float | None:
        """Its default; None where the pipeline takes none, or finds its own."""
        parameter = signature(cast(Any, self.pipe).__call__).parameters.get("guidance_scale")
        default = None if parameter is None else parameter.default
        return float(default) if isinstance(default, int | float) else None

    @cached_property
    def classes(self) -> list[tuple[str, int]]:
        """Name and number of each class label, in alphabetical order; empty where there are none."""
        if "class_labels" not in self.parameters or "prompt" in self.parameters:
            return []
        named = labels_by_name(self.pipe)
        return sorted(named.items()) if named else [(str(i), i) for i in range(num_classes_of(self.pipe) or 0)]

    @cached_property
    def schedulers(self) -> dict[str, type]:
        """The pipeline's own, unless it needs a thousand steps, and deterministic solvers that can take its place."""
        own = type(self.pipe.scheduler)
        mine = {} if own in (DDPMScheduler, *SOLVERS.values()) else {own.__name__.removesuffix("Scheduler"): own}
        return mine | (SOLVERS if takes_ddim(self.pipe.scheduler) else {}) or {own.__name__: own}

    @property
    def draws_small(self) -> bool:
        """Whether its pictures are so small that one wants to see their pixels."""
        size = cast(Any, self.denoiser).config.get("sample_size") or SMALL
        return decoder_of(self.pipe) is None and max(size if isinstance(size, Sequence) else [size]) < SMALL

    @cached_property
    def weight_bytes(self) -> int:
        """Size of the denoiser's stored tensors."""
        return self.denoiser.get_memory_footprint()

    @property
    def memory_bytes(self) -> int:
        """Memory that the denoiser's tensors take now, what engines keep ready included."""
        return resident_bytes(self.denoiser)

    @cached_property
    def intervals(self) -> list[list[tuple[int, int, int]]]:
        """`[layer group][(first timestep, last timestep, adapter), …]`; empty where there is no choice of adapters."""
        routing = routing_of(self.denoiser)
        return [] if routing is None or routing.num_adapters == 1 else routing.intervals()

    def request(
        self,
        *,
        seed: float | None,
        num_inference_steps: int,
        prompt: str | None = None,
        negative_prompt: str | None = None,
        class_label: int | None = None,
        guidance_scale: float | None = None,
    ) -> Callable[[], dict]:
        """Check what a visitor wants; the function that is returned makes the arguments of a call.

        Raises:
            ConfigError: something that the pipeline cannot do.
        """
        if seed is None or seed != int(seed) or not 0 <= seed <= MAX_SEED:
            raise ConfigError(f"The seed must be a whole number from 0 to {MAX_SEED}, but got {seed}.")
        require_positive(num_inference_steps=num_inference_steps)
        given: dict[str, Any] = {"output_type": "np"}
        if "prompt" in self.parameters:
            if not (prompt or "").strip():
                raise ConfigError("The prompt must say what to draw, but it is empty. Write a few words.")
            if negative_prompt and "negative_prompt" in self.parameters:
                given["negative_prompt"] = [negative_prompt]
        if self.classes:
            if class_label not in [number for _, number in self.classes]:
                raise ConfigError(f"The class must be one of the list, but got {class_label}.")
            given["class_labels"] = [class_label]
        if self.guidance_scale is not None and guidance_scale is not None:
            given["guidance_scale"] = guidance_scale
        make = call_arguments(self.pipe, [prompt] if prompt else None, num_inference_steps, given)
        return lambda: make(0, 1, torch.Generator().manual_seed(unseen(int(seed)))).arguments


def _outputs(kind: type) -> dict[str, list[str]]:
    """What a class of pipelines may put out by its code: class → its fields."""
    call = unwrap(cast(Any, kind).__call__)
    found = {name: getattr(call, "__globals__", {}).get(name) for name in call.__code__.co_names}
    outputs = {name: cls for name, cls in found.items() if isinstance(cls, type) and issubclass(cls, BaseOutput)}
    return {
        name: [field.name for field in fields(cast(Any, cls))] for name, cls in outputs.items() if is_dataclass(cls)
    }


def require_comparable(quantized: Candidate, reference: Candidate) -> None:
    """Refuse two pipelines that cannot be called alike.

    Raises:
        ConfigError: they are of different kinds or draw pictures of different shapes.
    """
    kinds = [
        (
            type(each.pipe).__name__,
            *(cast(Any, each.denoiser).config.get(key) for key in ("in_channels", "sample_size")),
        )
        for each in (quantized, reference)
    ]
    if kinds[0] != kinds[1]:
        told = [f"{name} with {channels} channels at {size}" for name, channels, size in kinds]
        raise ConfigError(f"The reference must be a {told[0]}, as the quantized pipeline is, but got a {told[1]}.")

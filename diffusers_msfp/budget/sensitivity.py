"""What each choice for each layer does to the model's output, as the sampler uses it: measured, one forward a choice.

The measure is the numerator of `traj_rel_l2`: `Σ γ_t² ‖Δ‖²` over a reference's trajectories, as a share of
`Σ γ_t² ‖reference‖²`. Errors of single layers are nearly uncorrelated, so their squares add up to the model's.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..checkpoint.journal import Journal
from ..compat.torch import tree_leaves
from ..errors import NonFiniteError
from ..layers.convert import replace_modules
from ..results import OnProgress
from ..sampling.calls import call_arguments
from ..sampling.denoisers import denoiser_of, model_output, scheduler_of
from ..sampling.denoising_factor import RunFactors
from ..sampling.trajectory import DenoisingStep, rollout
from .palette import Palette, scheme_for


@dataclass(frozen=True)
class Samples:
    """Calls of a reference, with what each counts.

    Args:
        pipe (`DiffusionPipeline`): whose denoiser was called.
        steps (`list[DenoisingStep]`): the calls.
        factors (`list[float]`): γ_t of each; 1 where the sampler has none.
        energy (`float`): `Σ γ_t² ‖reference‖²`.
    """

    pipe: DiffusionPipeline
    steps: list[DenoisingStep]
    factors: list[float]
    energy: float

    @classmethod
    def of(
        cls,
        pipe: DiffusionPipeline,
        *,
        num_samples: int,
        num_inference_steps: int,
        seed: int,
        prompts: Sequence[str] | None = None,
        **arguments: Any,
    ) -> "Samples":
        """Draw trajectories of a float pipeline."""
        make = call_arguments(pipe, prompts, num_inference_steps, arguments)
        sampler = RunFactors(scheduler_of(pipe), num_inference_steps)
        steps = rollout(pipe, make, 0, num_samples, seed, sampler)
        timesteps = [float(step.timesteps[0]) for step in steps]
        known = sampler.of(timesteps) or dict.fromkeys(timesteps, 1.0)
        factors = [known[timestep] for timestep in timesteps]
        energy = sum(f * f * step.output.double().square().sum().item() for f, step in zip(factors, steps, strict=True))
        return cls(pipe, steps, factors, energy)

    def digest(self) -> str:
        """SHA-256 of what the model is called with and answers."""
        digest = hashlib.sha256()
        for step, factor in zip(self.steps, self.factors, strict=True):
            digest.update(f"{factor:.6g}".encode())
            for leaf in tree_leaves((step.args, step.kwargs, step.output)):
                if isinstance(leaf, Tensor):
                    digest.update(leaf.detach().float().cpu().contiguous().numpy().data)
        return digest.hexdigest()

    @torch.no_grad()
    def error(self, model: nn.Module) -> float:
        """`traj_rel_l2` squared of a model on these samples.

        Raises:
            NonFiniteError: an output holds NaN or infinity.
        """
        found = 0.0
        for step, factor in zip(self.steps, self.factors, strict=True):
            output = step.counted(model_output(step.run(model)))
            found += factor * factor * (output.double() - step.output.double()).square().sum().item()
        if not math.isfinite(found):
            raise NonFiniteError(
                f"A model's output must be finite to be compared, but that of this {type(model).__name__} in "
                f"{step.output.dtype} is not. Load it in float32 or bfloat16."
            )
        return found / self.energy


def state_digest(model: nn.Module, *, values: bool = True) -> str:
    """SHA-256 of a float model's parameters and buffers: names and shapes, and values where they are asked for."""
    digest = hashlib.sha256(type(model).__name__.encode())
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        if values:
            digest.update(tensor.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def measure(
    samples: Samples,
    palette: Palette,
    *,
    around: str | None = None,
    journal: Path | None = None,
    settings: dict | None = None,
    on_progress: OnProgress | None = None,
) -> dict[str, dict[str, float]]:
    """Error of the model's output when one layer is quantized in one way, for all of both.

    Args:
        samples (`Samples`), palette (`Palette`): of one pipeline.
        around (`str`, *optional*): all other layers are quantized so, and what they cost is subtracted; by default they
            stay float.
        journal (`Path`, *optional*): where what is measured is written down, and where a run that was killed goes on if
            model, samples and settings are the same.
        settings (`dict`, *optional*): what else the result depends on.
        on_progress (`OnProgress`, *optional*): called with (done, total, part=…).

    Returns:
        `dict[str, dict[str, float]]`: layer → scheme → share of the output's energy, see `Samples.error`.
    """
    model = denoiser_of(samples.pipe)
    book = None
    if journal is not None:
        identity = {"model": state_digest(model), "samples": samples.digest(), "around": around}
        book = Journal(journal, identity | {"settings": settings})
        book.keep(book.entries)
    known = {(entry["layer"], entry["scheme"]): entry["error"] for entry in (book.entries if book else ())}
    originals = {name: model.get_submodule(name) for name in palette.layers}
    others = originals if around is None else {n: own[scheme_for(n, around)] for n, own in palette.layers.items()}
    found: dict[str, dict[str, float]] = {name: {} for name in palette.layers}
    pairs = [(name, scheme) for name, options in palette.layers.items() for scheme in options]
    with replaced(model, others):
        base = samples.error(model) if around else 0.0
        for done, (name, scheme) in enumerate(pairs, start=1):
            if (name, scheme) not in known:
                with replaced(model, {name: palette.layers[name][scheme]}):
                    known[name, scheme] = samples.error(model) - base
                if book is not None:
                    book.add({"layer": name, "scheme": scheme, "error": known[name, scheme]})
            found[name][scheme] = known[name, scheme]
            if on_progress is not None:
                on_progress(done, len(pairs), part=name)
    return found


@contextmanager
def replaced(model: nn.Module, new: Mapping[str, nn.Module]) -> Iterator[None]:
    """While this lasts, modules of a model are others."""
    old = {name: model.get_submodule(name) for name in new}
    replace_modules(model, new)
    try:
        yield
    finally:
        replace_modules(model, old)

"""Learned rounding of a whole model: part after part, each from what the parts before it really hand on.

Inputs come from the quantized model with all earlier parts done, targets from the full-precision model (BRECQ, arXiv
2102.05426, with AdaRound on floating-point grids as in arXiv 2408.06995), both along the teacher's own trajectories
with many timesteps in a batch. The hardened weight with the least error on examples kept apart is stored, so a part
never gets worse there than nearest rounding.
"""

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor

from ...compat.wrappers import seen_through, sees_through
from ...errors import ConfigError, NonFiniteError, StateError
from ...layers import QuantLayer
from ...layers.convert import layers_by_name, prepare_layers
from ...numerics import unpack
from ...results import OnProgress, Result
from ...sampling.calls import call_arguments
from ...sampling.denoisers import ByDenoiser, by_denoiser, denoiser_of, each_quantized, work_folders
from ...sampling.trajectory import Trajectories
from ...sampling.used_output import used_channels
from ...schemes import check_patterns, matches
from ..blocks import reconstruction_units
from ..checks import check_student, original_weight
from ..routes import maintained_layers
from . import annealed_exponent
from .config import RoundingConfig
from .folder import RoundingFolder
from .parts import Examples, RoundedPart

EVALUATIONS = 10
HELD_OUT = 8  # one of so many trajectories judges and does not teach: its steps resemble each other


@dataclass(frozen=True, kw_only=True)
class LearnedRounding(Result):
    """What became of the weights.

    Args:
        parts (`Sequence[Mapping[str, Any]]`): each with `part`, number of `layers`, `examples` and `iterations`, and
            the mean squared error of the part's output on examples kept apart `before` and `after`.
        seconds (`float`): of the run.
        weights (`int`): their number.
        changed (`float`): share of weights no longer rounded to nearest.
        sparsity, sparsity_before (`float`): share of exact zeros.
        maxval_over_amax (`float`): mean over channels: sparsity depends on where the range search clips.
    """

    parts: Sequence[Mapping[str, Any]]
    seconds: float
    weights: int
    changed: float
    sparsity_before: float
    sparsity: float
    maxval_over_amax: float


class Reconstructor:
    """One run of learned rounding; `learn_rounding` is the short form. Arguments are the same."""

    @sees_through
    def __init__(
        self,
        pipe: DiffusionPipeline,
        teacher: DiffusionPipeline,
        config: RoundingConfig | None = None,
        *,
        work_dir: str | Path | None = None,
        prompts: list[str] | None = None,
        on_progress: OnProgress | None = None,
        **arguments: Any,
    ) -> None:
        self.config, self.on_progress = config or RoundingConfig(), on_progress
        self._before: dict[str, tuple[Tensor, Tensor]] = {}
        view, *others = each_quantized(pipe, teacher).values()
        if others:
            raise ConfigError(
                f"One denoiser is rounded at a time, but {type(pipe).__name__} has several quantized ones. Call "
                f"`learn_rounding(pipe, teacher)`, which takes one after the other."
            )
        pipe, teacher = view
        config, self.model, self.teacher = self.config, denoiser_of(pipe), denoiser_of(teacher)
        check_student(self.model, self.teacher, "rounding")
        maintained = maintained_layers(self.model)
        layers = {name: layer for name, layer in layers_by_name(self.model).items() if name not in maintained}
        if not layers:
            raise StateError(
                "Learned rounding needs layers without input parameters for each timestep, but all layers of this "
                "model have some. Learn rounding first, then maintain temporal features with `fsc='all'`."
            )
        check_patterns(config.exclude, list(layers), "exclude")
        self.originals = {
            name: original_weight(self.teacher, layer)
            for name, layer in layers.items()
            if not any(matches(pattern, name) for pattern in config.exclude)
        }
        self.folder = RoundingFolder(work_dir, self.model, teacher, config, prompts, arguments)
        make_arguments = call_arguments(teacher, prompts, config.num_inference_steps, arguments)
        self.batch = min(config.batch_size, config.num_samples)
        trajectories = Trajectories(teacher, make_arguments, self.batch, config.seed)
        self.length = len(trajectories.steps())
        self.steps = [trajectories[number] for number in range(config.num_samples // self.batch)]
        self.used = used_channels(teacher, self.teacher, self.steps[0].args, self.steps[0].kwargs)
        found = reconstruction_units(self.model, self.steps[0], layerwise=config.granularity == "layer")
        chosen = {name: [key for key in inner if key in self.originals] for name, inner in found.items()}
        self.parts = {name: inner for name, inner in chosen.items() if inner}
        if not self.parts:
            raise ConfigError(f"Some layer must be left to learn, but `exclude` {list(config.exclude)} matches all.")

    def run(self) -> LearnedRounding:
        """Learn, part by part, and store the weights; see `learn_rounding`."""
        started, layers = time.perf_counter(), layers_by_name(self.model)
        layers = {key: layers[key] for inner in self.parts.values() for key in inner}
        before = {
            key: (layer.packed_weight.detach().clone(), layer.weight_error.clone()) for key, layer in layers.items()
        }
        self._before = before
        required = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]
        self.model.requires_grad_(False)
        records = []
        try:
            for number, (name, inner) in enumerate(self.parts.items()):
                own = {key: layers[key] for key in inner}
                record = self.folder.load(number, own)
                if record is None:
                    with seen_through(self.model, self.teacher):
                        weights, record = self._learn(number, name, inner)
                    for key, weight in weights.items():
                        own[key].store_banks([weight], self.originals[key].to(torch.float32))
                    self.folder.save(number, own, record)
                records.append(record)
                if self.on_progress is not None:
                    self.on_progress(number + 1, len(self.parts), part=name)
        except BaseException:
            self.restore()
            raise
        finally:
            for parameter, needed in required:
                parameter.requires_grad_(needed)
        prepare_layers(self.model)
        seconds = time.perf_counter() - started
        return LearnedRounding(parts=records, seconds=seconds, **_summary(layers, before, self.originals))

    def restore(self) -> None:
        """Give the layers the weights that they had before `run`."""
        layers = layers_by_name(self.model)
        for key, (weight, error) in self._before.items():
            layers[key].put_weight(weight, error)
        prepare_layers(self.model)

    def _learn(self, number: int, name: str, inner: list[str]) -> tuple[dict[str, Tensor], dict]:
        """The rounded weights of one part, and what became of it."""
        config, originals = self.config, {key: self.originals[key] for key in inner}
        # first: it is handed no codes
        part = RoundedPart(self.model, name, originals, scale_aware=config.scale_aware, used=self.used)
        try:
            memory = config.memory_mb * 2**20
            steps, used = self.steps, self.used
            examples = Examples.collect(self.model, self.teacher, name, steps, self.batch, memory, used, self.length)
            generator = torch.Generator().manual_seed(config.seed + number)
            order = torch.randperm(len(examples), generator=generator, device="cpu")
            judges = examples.samples[order] < max(1, int(examples.samples.max() + 1) // HELD_OUT)
            if judges.sum() > len(order) // 4:  # too few trajectories: single examples judge
                judges = torch.arange(len(order), device="cpu") < max(1, len(order) // HELD_OUT)
            judging, learning = order[judges].split(config.batch_size), order[~judges]
            learning = learning if len(learning) else order
            start = least = part.hard_loss(examples, judging)
            best, since, done = part.hard_weights(), 0, 0
            optimizer = torch.optim.Adam(part.logits(), lr=config.learning_rate)
            every = max(1, config.iterations // EVALUATIONS)
            while done < config.iterations and since < config.patience and start > 0:
                rows = learning[torch.randint(len(learning), (config.batch_size,), generator=generator, device="cpu")]
                loss = part.loss(*examples.batch(rows)) / start
                exponent = annealed_exponent(done / config.iterations)
                if exponent is not None and config.penalty:
                    loss = loss + config.penalty * part.penalty(exponent)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                done += 1
                if done % every == 0 or done == config.iterations:
                    error, since = part.hard_loss(examples, judging), since + 1
                    if error < least:
                        least, best, since = error, part.hard_weights(), 0
        finally:
            part.close()
        if not (math.isfinite(start) and math.isfinite(least)):
            raise NonFiniteError(f"The outputs of `{name}` must be finite, but got NaN or infinity.")
        counts = {"layers": len(inner), "examples": len(examples), "iterations": done}
        return best, {"part": name, **counts, "before": start, "after": least}


def _summary(layers: dict[str, QuantLayer], before: dict, originals: dict[str, Tensor]) -> dict:
    """What became of the weights of all layers."""
    weights = changed = zeros = zeros_before = 0
    ratios = []
    for key, layer in layers.items():
        (rows, length), bits = layer.matrix_shape, layer.weight_format.bits
        then, now = (unpack(packed.view(rows, -1), bits, length) for packed in (before[key][0], layer.packed_weight))
        weights += now.numel()
        changed += int((now != then).sum())
        zeros_before += int((then == 0).sum())  # -0 is never stored
        zeros += int((now == 0).sum())
        amax = originals[key].to(torch.float32).reshape(layer.rows_shape).abs().amax(1)
        ratios.append((layer.weight_qparams().maxval.amax(1) / amax)[amax > 0])
    return {
        "weights": weights,
        "changed": changed / weights,
        "sparsity_before": zeros_before / weights,
        "sparsity": zeros / weights,
        "maxval_over_amax": torch.cat(ratios).mean().item(),
    }


@sees_through
def learn_rounding(
    pipe: DiffusionPipeline, teacher: DiffusionPipeline, config: RoundingConfig | None = None, **arguments: Any
) -> LearnedRounding | ByDenoiser:
    """Learn, in place, which way the weights of a quantized pipeline's denoisers round.

    Formats, scales and activation ranges stay; no byte is added and nothing changes at run time. Layers that temporal
    maintenance has rounded already keep what it gave them.

    Args:
        pipe (`DiffusionPipeline`): quantized and calibrated, without adapters.
        teacher (`DiffusionPipeline`): the full-precision original; its scheduler draws the examples.
        config (`RoundingConfig`, *optional*): settings.
        work_dir (`str` or `Path`, *optional*): keeps finished parts; a run found there is resumed.
        prompts (`list[str]`, *optional*): taken in turn where the pipeline takes prompts.
        on_progress (`OnProgress`, *optional*): called with (done, total, part=name) after each part.
        **arguments: passed on to the pipeline, e.g. `guidance_scale=…`.

    Returns:
        `LearnedRounding`; where several denoisers are quantized, a `ByDenoiser` of these.

    Raises:
        ConfigError: settings or pipelines that do not fit.
        StateError: the model is observing, offloaded, or has what this method forbids; the teacher is quantized.
        ShapeError: the teacher is another model. Nothing is changed after these.
        NonFiniteError: outputs that are not finite; the model is as it was.

    Source:
        arXiv 2408.06995 section V-B, as reconstructed; see `SoftRounding`.

    Example:
        ```py
        pipe = DiffusionPipeline.from_pretrained("model-w4a8")
        learn_rounding(pipe, DiffusionPipeline.from_pretrained("model"))
        pipe.save_pretrained("model-w4a8-rounded")
        ```
    """
    views = each_quantized(pipe, teacher)
    work_dir = arguments.pop("work_dir", None)
    folders = work_folders(work_dir, views)
    runs = {
        name: Reconstructor(*view, config, work_dir=folders[name], **arguments) for name, view in views.items()
    }  # all are checked before the first changes anything
    try:
        return by_denoiser({name: run.run() for name, run in runs.items()})
    except BaseException:
        for run in runs.values():
            run.restore()
        raise

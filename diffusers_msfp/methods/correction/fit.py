"""Fit the correction of a quantized pipeline's output, step by step on its own trajectories.

What a quantized denoiser does wrong has a part that is the same for all samples: it predicts a little too much or too
little noise, and a constant beside it. Both add up over a trajectory, unlike the rest of the error. The least squares
fit of each timestep is taken on samples to which the corrections of the earlier steps were applied already.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ...compat.wrappers import sees_through
from ...errors import ConfigError, NonFiniteError, NothingToDoError, UnsupportedError
from ...results import OnProgress, Result
from ...sampling.calls import batched_calls, call_arguments, quiet, require_positive
from ...sampling.denoisers import ByDenoiser, by_denoiser, denoiser_of, each_quantized, model_output, scheduler_of
from ...sampling.solvers import with_sampler
from ...sampling.timestep import first_timestep, require_timesteps
from ...sampling.used_output import Index, after_calls, place_of, sample_of, used_part, watching_samples
from ..checks import check_student, require_takes
from ..routes import require_full_strength
from .attach import attach_correction, without_correction
from .table import CorrectionTable, axis_of_channels, channels_of, map_prediction


@dataclass(frozen=True)
class CorrectionConfig:
    """Settings of `correct_output`.

    Args:
        num_samples (`int`): trajectories.
        num_inference_steps (`int`): of the sampler whose timesteps are the table's.
        with_sample (`bool`): fit `b_t`, the share of the model's input, too. On the embedded model this lowers the
            error at high noise and costs what the pictures gained: what is added is the same for the steps that follow,
            and what it replaces was not.
        seed (`int`): of the samples' noise.

    Raises:
        ConfigError: a value that makes no sense.

    Example:
        >>> CorrectionConfig(num_samples=16).num_inference_steps
        20
    """

    num_samples: int = 32
    num_inference_steps: int = 20
    with_sample: bool = False
    seed: int = 1

    def __post_init__(self) -> None:
        require_positive(num_samples=self.num_samples, num_inference_steps=self.num_inference_steps)


class _PartUsed(Exception):
    """The pipeline throws a part of the output away, which its first step has shown: what was fitted on all is void."""


class _Sums:
    """Sums over samples of what least squares needs, by channel, float64 on the CPU."""

    def __init__(self) -> None:
        self.count = 0
        self.mean = self.products = torch.zeros((), dtype=torch.float64, device="cpu")

    def add(self, columns: Tensor) -> None:
        """Take `(K, C, n)`: outputs, samples where they count, and targets."""
        columns = columns.to("cpu", torch.float64)
        n = columns.shape[-1]
        mean = columns.mean(-1)
        centred = columns - mean[..., None]
        products = torch.einsum("kcn,lcn->kl", centred, centred)
        apart, total = mean - self.mean, self.count + n  # joined as by Chan et al. (1979)
        joined = torch.einsum("kc,lc->kl", apart, apart) * (self.count * n / total)
        self.products = self.products + products + joined
        self.mean, self.count = self.mean + apart * (n / total), total

    def solve(self) -> tuple[Tensor, Tensor]:
        """Coefficients `(K - 1,)` of the columns before the last, and a constant `(C,)` for each channel."""
        gram, right = self.products[:-1, :-1], self.products[:-1, -1]
        if not self.products.isfinite().all():
            raise NonFiniteError("Corrections need finite outputs, but the model or its teacher does not give them.")
        coefficients = torch.linalg.lstsq(gram, right[:, None], driver="gelsd").solution[:, 0]
        if not gram[0, 0] > 0:  # an output without variation
            coefficients = torch.zeros_like(coefficients)
            coefficients[0] = 1.0
        return coefficients, self.mean[-1] - torch.einsum("k,kc->c", coefficients, self.mean[:-1])

    def errors(self, coefficients: Tensor) -> tuple[float, float]:
        """Squared error as the model is, and with these coefficients and the best constants."""
        ends = torch.zeros(len(self.products), dtype=torch.float64, device="cpu")
        ends[0], ends[-1] = 1.0, -1.0
        apart = self.mean[0] - self.mean[-1]
        before = ends @ self.products @ ends + self.count * apart.square().sum()
        solved = torch.cat([coefficients, torch.tensor([-1.0], dtype=torch.float64, device="cpu")])
        return before.item(), (solved @ self.products @ solved).clamp_min(0).item()


@dataclass(frozen=True, kw_only=True)
class OutputCorrection(Result):
    """What was fitted.

    Args:
        timesteps (`Sequence[float]`): ascending.
        a, b (`Sequence[float]`): coefficients by timestep.
        error_before, error_after (`Sequence[float]`): relative error of the output by timestep, on the pipeline's own
            samples.
    """

    timesteps: Sequence[float]
    a: Sequence[float]
    b: Sequence[float]
    error_before: Sequence[float]
    error_after: Sequence[float]


@sees_through
def correct_output(
    pipe: DiffusionPipeline,
    teacher: DiffusionPipeline,
    config: CorrectionConfig | None = None,
    *,
    prompts: Sequence[str] | None = None,
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> OutputCorrection | ByDenoiser:
    """Correct what a quantized pipeline's denoiser predicts, in place: `a_t * output + b_t * sample + c_t`.

    The table is a few numbers for each timestep, applied in the model's forward; samplers with other timesteps get what
    lies between its entries. A correction that the model has already is replaced.

    Args:
        pipe (`DiffusionPipeline`): quantized and calibrated.
        teacher (`DiffusionPipeline`): the full-precision original.
        config (`CorrectionConfig`, *optional*): settings.
        prompts (`Sequence[str]`, *optional*): taken in turn where the pipeline takes prompts.
        on_progress (`OnProgress`, *optional*): called after each step with (done, total, `note`).
        **arguments: passed on to the pipeline, e.g. `guidance_scale=…`.

    Returns:
        `OutputCorrection`; for each denoiser by name where several are quantized.

    Raises:
        ConfigError: pipelines that do not fit. Nothing is changed then.
        NothingToDoError: outputs whose channels are not where tables have them; perturbed-attention guidance. Nor then.
        StateError: the model is observing, or its timestep-aware adapters are disabled or scaled.
        ShapeError: the teacher is another model.
        NonFiniteError: an output that is not finite.

    Source:
        Output correction by linear regression as in PTQD (arXiv 2305.10657), which corrects the mean and correlated
        part of the error and changes the sampler's variance for the rest; here the table belongs to the model, and is
        fitted in the order of the steps.

    Example:
        ```py
        pipe = quantize_pipeline(DiffusionPipeline.from_pretrained("model"), "w4a4")
        correct_output(pipe, DiffusionPipeline.from_pretrained("model"))
        ```
    """
    config = config or CorrectionConfig()
    views = each_quantized(pipe, teacher)
    for own, original in views.values():
        check_student(denoiser_of(own), denoiser_of(original), "correction", learns=False)
        require_full_strength(denoiser_of(own), "A correction of the output")
        require_takes(denoiser_of(own), denoiser_of(original))
    fitted = {name: _fit(*view, config, prompts, arguments, on_progress) for name, view in views.items()}
    results = {}
    for name, (own, _) in views.items():  # only now are models changed
        table, results[name] = fitted[name]
        attach_correction(denoiser_of(own), table)
    return by_denoiser(results)


@torch.no_grad()
def _fit(
    pipe: DiffusionPipeline,
    teacher: DiffusionPipeline,
    config: CorrectionConfig,
    prompts: Sequence[str] | None,
    arguments: dict,
    on_progress: OnProgress | None,
) -> tuple[CorrectionTable, OutputCorrection]:
    model, original = denoiser_of(pipe), denoiser_of(teacher)
    argument = require_timesteps(model)
    runner = with_sampler(pipe, arguments=arguments)
    make_arguments = call_arguments(runner, prompts, config.num_inference_steps, arguments)
    sums: dict[float, _Sums] = {}
    done, total = 0, 0
    used: Index = ()
    last: tuple[Tensor, Tensor] | None = None

    def look(_model: nn.Module, args: tuple, kwargs: dict, output: Any) -> Any:
        nonlocal done, last
        prediction = used_part(pipe, model_output(output), args, kwargs)
        require_channels(model, prediction)
        target = used_part(pipe, model_output(original(*args, **kwargs)), args, kwargs)
        sample, timestep = sample_of(args, kwargs), first_timestep(argument.of(args, kwargs))
        beside = config.with_sample and sample.shape == prediction.shape
        last = sample, prediction
        columns = [each[used] for each in ([prediction, sample, target] if beside else [prediction, target])]
        known = sums.setdefault(timestep, _Sums())
        known.add(torch.stack([_by_channel(each) for each in columns]))
        solved = known.solve()
        table = CorrectionTable(*_table({timestep: solved}, prediction.device))
        done += 1
        if on_progress is not None:
            before, after = known.errors(solved[0])
            on_progress(done, max(done, total), note=f"error × {(after / before) ** 0.5 if before else 1:.3f}")
        return map_prediction(output, channels_of(prediction), lambda each: table.correct(each, sample, timestep))

    def learn(sample: Tensor) -> None:
        nonlocal used
        if last and not used and (found := place_of(sample, *last)):
            used = found
            raise _PartUsed

    def run() -> None:
        nonlocal done, total
        calls = batched_calls(make_arguments, [model], config.num_samples, config.seed)
        done, total = 0, len(calls) * config.num_inference_steps
        for call in calls:
            call.run(runner)

    watched = watching_samples(scheduler_of(runner), learn)
    with without_correction(model), quiet(runner), after_calls(model, look), watched:
        try:
            try:
                run()
            except _PartUsed:
                sums.clear()
                run()
        except UnsupportedError as error:
            raise NothingToDoError(f"{error} Leave the correction out.") from error
    if not sums:
        raise ConfigError(f"{type(pipe).__name__} must call its denoiser, but never does with these arguments.")
    order = sorted(sums)
    solved = {t: sums[t].solve() for t in order}
    errors = [sums[t].errors(solved[t][0]) for t in order]
    energy = [(sums[t].products[-1, -1] + sums[t].count * sums[t].mean[-1].square().sum()).item() for t in order]
    before, after = (
        [(pair[i] / e) ** 0.5 if e else 0.0 for pair, e in zip(errors, energy, strict=True)] for i in (0, 1)
    )
    table = CorrectionTable(*_table(solved, next(model.parameters()).device))
    return table, OutputCorrection(
        timesteps=order,
        a=table.a[:, 0].tolist(),
        b=table.b[:, 0].tolist(),
        error_before=before,
        error_after=after,
    )


def require_channels(model: nn.Module, prediction: Tensor) -> None:
    """Refuse an output whose channels are not where tables take them to be: frames or places would be corrected."""
    own, given = (getattr(getattr(model, "config", None), f"{name}_channels", None) for name in ("out", "in"))
    known = [size for size in (own, given) if isinstance(size, int)]
    if prediction.ndim == 5:
        known = known[:1]  # frames may be as many as `in_channels`, which of a video count conditions beside it
    halves = [own / 2] if isinstance(own, int) and prediction.ndim > 3 else []  # variances stand beside it
    axis = axis_of_channels(prediction)
    elsewhere = [size for index, size in enumerate(prediction.shape) if index not in (0, axis)]
    channels, next_to_them = prediction.shape[axis], elsewhere[0]
    unclear = not known or channels == next_to_them or (channels in halves and next_to_them in known)
    if prediction.ndim == 5 and unclear:
        raise UnsupportedError(
            f"A video's output can be corrected whose channels can be told from its frames, but that of this "
            f"{type(model).__name__} is {tuple(prediction.shape)}"
            + (". Pass on another number of frames." if known else ", and its config names no `out_channels`.")
        )
    if channels not in (*known, *halves) and not set(known).isdisjoint(elsewhere):
        raise UnsupportedError(
            f"An output can be corrected that has its channels ({' or '.join(map(str, known))}) in axis {axis}, but "
            f"that of this {type(model).__name__} is {tuple(prediction.shape)}."
        )


def _by_channel(x: Tensor) -> Tensor:
    """`(B, C, …)`, or `(B, N, C)`, as `(C, n)`."""
    return x.transpose(0, axis_of_channels(x)).flatten(1)


def _table(solved: dict[float, tuple[Tensor, Tensor]], device: torch.device) -> tuple[Tensor, ...]:
    """Timesteps, a, b and c of a table, float32."""
    timesteps = torch.tensor(list(solved), dtype=torch.float32, device=device)
    constants = torch.stack([constant for _, constant in solved.values()]).to(device, torch.float32)
    a, b = (
        constants.new_tensor([float(part[i]) if i < len(part) else 0.0 for part, _ in solved.values()]) for i in (0, 1)
    )
    return timesteps, *(each[:, None].expand_as(constants).contiguous() for each in (a, b)), constants

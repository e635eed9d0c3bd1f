"""`plan_budget`: measure once what every choice does to the output, then share a budget out."""

import platform
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..compat.wrappers import sees_through
from ..errors import ConfigError
from ..layers.convert import quant_layers
from ..results import OnProgress, in_stage
from ..sampling.calls import require_positive
from ..sampling.denoisers import denoiser_of, denoisers_of, scheduler_of
from ..sampling.solvers import with_sampler
from .knapsack import Solution
from .palette import CHOICES, STEP_CHOICES, check_choices, make_palette
from .psnr import error_for
from .record import BudgetPlan
from .runs import Pictures, step_seconds
from .sensitivity import Samples, measure, state_digest
from .size import layer_bytes
from .table import Table

CLOSE_DB = 0.3
"""A real run this near to a target for PSNR ends the search, and this far below it still meets it."""
NEAR_DB = 1.0
MAX_RUNS = 5
"""Real runs in a search for a PSNR; twice as many where none of them meets the target by less than `NEAR_DB`."""


@sees_through(changes=False)
def plan_budget(
    pipe: DiffusionPipeline,
    *,
    target_bytes: float | None = None,
    target_psnr: float | None = None,
    target_step: float | None = None,
    choices: Sequence[str] | None = None,
    num_samples: int = 2,
    num_inference_steps: int = 20,
    num_calibration: int = 16,
    num_pictures: int = 64,
    step_batch: int = 1,
    seed: int = 0,
    sampler: str | None = None,
    prompts: Sequence[str] | None = None,
    work_dir: str | Path | None = None,
    on_progress: OnProgress | None = None,
    **arguments: Any,
) -> BudgetPlan:
    """Choose bits and formats for each layer of a denoiser by what they do to its output, within a budget.

    Each layer is quantized alone in each way, and the model run on a few samples of its own trajectories: how far its
    output moves, weighted as the sampler weights it, is what that choice costs. These costs add up, so the best choice
    for a budget is a knapsack problem. The pipeline is not changed.

    Args:
        pipe (`DiffusionPipeline`): float, with one denoiser.
        target_bytes (`float`, *optional*): of the denoiser's weight files, never exceeded; the error is least.
        target_psnr (`float`, *optional*): decibels, pictures against the float pipeline's; bytes are least. Some
            choices are sampled for it, to know what an error means in decibels.
        target_step (`float`, *optional*): seconds of a step of `step_batch` pictures on this machine; the error is
            least.
        choices (`Sequence[str]`, *optional*): schemes that layers may get; by default weights of 4 bits, alone
            and in groups of 32, 6 and 8 bits with 8-bit inputs; for `target_step` those that differ in time.
        num_samples (`int`): trajectories on which errors are measured.
        num_inference_steps, sampler, seed: of the trajectories, see `compare_pipelines`; calibration and pictures use
            other seeds.
        num_calibration (`int`): samples that set the ranges of inputs while errors are measured.
        num_pictures (`int`): of each real run for `target_psnr`.
        step_batch (`int`): pictures of the step that `target_step` limits; with guidance each is two rows.
        prompts (`Sequence[str]`, *optional*): taken in turn where the pipeline takes prompts.
        work_dir (`str` or `Path`, *optional*): where measured errors are kept; the same call goes on there.
        on_progress (`OnProgress`, *optional*): called with (done, total, stage=…).
        **arguments: passed on to the pipeline.

    Returns:
        `BudgetPlan`: `plan.config(pipe)` is what `quantize_pipeline` takes; `plan.write(file)` keeps it.

    Raises:
        ConfigError: not one target; one that cannot be met, with the nearest that can; a pipeline that is quantized
            already or has several denoisers.

    Source:
        The knapsack is that of HAWQ-V2 and its like; the measure, from real outputs along the sampler's path, is ours.

    Example:
        ```py
        plan = plan_budget(pipe, target_bytes=1.2e6)
        quantize_pipeline(pipe, plan.config(pipe))
        ```
    """
    started = time.perf_counter()
    target, value = _target(bytes=target_bytes, psnr=target_psnr, step=target_step)
    require_positive(num_samples=num_samples, num_calibration=num_calibration, num_pictures=num_pictures)
    require_positive(step_batch=step_batch)
    require_positive(num_inference_steps=num_inference_steps)
    choices = check_choices(choices or (STEP_CHOICES if target == "step" else CHOICES))
    model = _denoiser(pipe)
    pipe = with_sampler(pipe, sampler, arguments=arguments)
    calling = {"num_inference_steps": num_inference_steps, "prompts": prompts} | arguments
    samples = Samples.of(pipe, num_samples=num_samples, seed=seed + 1, **calling)
    palette = make_palette(
        pipe,
        choices,
        num_samples=num_calibration,
        seed=seed,
        on_progress=in_stage(on_progress, "ranges"),
        **calling,
    )
    settings = {
        "choices": list(choices),
        "num_samples": num_samples,
        "num_inference_steps": num_inference_steps,
        "num_calibration": num_calibration,
        "seed": seed,
        "sampler": type(scheduler_of(pipe)).__name__,
    }
    errors = measure(
        samples,
        palette,
        journal=None if work_dir is None else Path(work_dir) / "sensitivities.jsonl",
        settings=settings | {"prompts": prompts and list(prompts), "arguments": repr(sorted(arguments.items()))},
        on_progress=in_stage(on_progress, "errors"),
    )
    rest, sizes = layer_bytes(model, palette)
    around, times = 0.0, None
    if target == "step":
        timed = Samples.of(pipe, num_samples=step_batch, seed=seed + 1, **calling)
        around, times = step_seconds(timed, palette, in_stage(on_progress, "times"))
        settings |= {
            "step_batch": step_batch,
            "processor": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
        }
    table = Table(errors, sizes, rest, times, around)
    runs: list[tuple[float, float]] = []
    if target == "psnr":
        settings |= {"num_pictures": num_pictures}
        pictures = Pictures(pipe, palette, num_samples=num_pictures, seed=seed + 2, on_progress=on_progress, **calling)
        solution = for_psnr(table, value, pictures.psnr, runs)
    else:
        solution = table.least_error(target, value)
    return table.plan(
        solution,
        runs,
        component=palette.component,
        structure=state_digest(model, values=False),
        model=state_digest(model),
        target=target,
        target_value=value,
        settings=settings,
        seconds=time.perf_counter() - started,
    )


def _target(**given: float | None) -> tuple[str, float]:
    wanted = {name: value for name, value in given.items() if value is not None}
    if len(wanted) != 1:
        names = ", ".join(f"`target_{name}`" for name in given)
        raise ConfigError(f"A plan has one target ({names}), but got {len(wanted)}. Give exactly one.")
    ((name, value),) = wanted.items()
    if not 0 < value < float("inf"):
        raise ConfigError(f"`target_{name}` must be a number above 0, but got {value!r}.")
    return name, float(value)


def _denoiser(pipe: DiffusionPipeline) -> nn.Module:
    """The one float denoiser of a pipeline."""
    if isinstance(pipe, nn.Module):
        raise ConfigError(
            f"A plan is made with a pipeline's own sampler, but got a {type(pipe).__name__} alone. Pass the pipeline "
            f"that it belongs to."
        )
    models = denoisers_of(pipe)
    if len(models) != 1:
        raise ConfigError(f"A plan serves one denoiser, but {type(pipe).__name__} has {', '.join(models)}.")
    if any(True for _ in quant_layers(denoiser_of(pipe))):
        raise ConfigError("A plan is made for a float model, but this one is quantized. Load the original.")
    return denoiser_of(pipe)


def for_psnr(
    table: Table, target: float, psnr: Callable[[Mapping[str, str]], float], runs: list[tuple[float, float]]
) -> Solution:
    """The smallest choice that gives a PSNR, found by sampling the ends and then what looks right.

    Args:
        psnr (`Callable`): samples a choice.
        runs (`list`): takes what was measured.

    Returns:
        `Solution`: of those that were sampled the smallest that is at most `CLOSE_DB` below the target.
    """
    smallest, best = table.ends()
    for choice in (smallest, best):
        runs.append((table.sums(choice)[1], psnr(choice)))
    (_, low), (_, high) = runs
    if target > high + CLOSE_DB:
        raise ConfigError(
            f"`target_psnr` can be at most {high:.1f} dB with these choices, but got {target:g}. Take that, or allow "
            f"other `choices`."
        )
    if low >= target - CLOSE_DB:
        return table.least_bytes(table.sums(smallest)[1])
    least = table.sums(best)[1]
    met = [table.least_bytes(least)]
    while len(runs) < MAX_RUNS or (len(runs) < 2 * MAX_RUNS and not _is_near(target, runs)):
        solution = table.least_bytes(max(error_for(target, runs), least))
        choice = table.choice(solution.options)
        error = table.sums(choice)[1]
        if any(error == known for known, _ in runs):
            break
        found = psnr(choice)
        runs.append((error, found))
        met += [solution] if found >= target - CLOSE_DB else []
        if abs(found - target) <= CLOSE_DB:
            break
    return min(met, key=lambda each: table.sums(table.choice(each.options))[0])


def _is_near(target: float, runs: Sequence[tuple[float, float]]) -> bool:
    """Whether one of the runs, whose PSNR does not fall evenly with the error, meets a target without giving more."""
    return any(-CLOSE_DB <= found - target <= NEAR_DB for _, found in runs)

"""Targets on the command line: read, planned for, shown."""

import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from rich.table import Table
from torch import nn

from ...budget import PLAN_FILE, BudgetPlan, plan_budget
from ...budget.record import is_plan
from ...budget.sensitivity import state_digest
from ...checkpoint.describe import read_config
from ...checkpoint.journal import Journal
from ...compat.diffusers import no_init_weights
from ...errors import ConfigError
from ...outputs import require_writable_file, writing
from ...recipes import DEFAULT_RECIPE
from ...sampling.denoisers import denoiser_of
from ...schemes import DEFAULT_SCHEME
from .calls import call_settings
from .interrupts import keeping
from .load import fetch, load_pipeline
from .store import only_run
from .terminal import megabytes, progress, stderr

BYTES = {"": 1, "B": 1, "kB": 1e3, "KB": 1e3, "MB": 1e6, "GB": 1e9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}
SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}


@dataclass(frozen=True)
class BudgetRequest:
    """What `quantize` is to keep to.

    Args:
        targets (`Mapping[str, float]`): arguments of `plan_budget`: one target, or none for a plan that was stored.
        file (`Path`, *optional*): where the plan is stored, or lies.
        overwrite (`bool`): an older plan may be replaced.
    """

    targets: Mapping[str, float]
    file: Path | None = None
    overwrite: bool = False

    @classmethod
    def parse(
        cls, bytes: str | None, psnr: float | None, step: str | None, file: Path | None, overwrite: bool = False
    ) -> "BudgetRequest":
        """From what a user writes.

        Raises:
            ConfigError: several targets, or a number without sense.
        """
        targets = {
            "target_bytes": None if bytes is None else _with_unit(bytes, BYTES, "--target-bytes", "1.2MB"),
            "target_psnr": psnr,
            "target_step": None if step is None else _with_unit(step, SECONDS, "--target-step", "90ms"),
        }
        given = {name: value for name, value in targets.items() if value is not None}
        if len(given) > 1:
            raise ConfigError(f"One target can be kept at a time, but got {' and '.join(given)}. Leave one out.")
        return cls(given, file, overwrite)

    def refuse_beside(
        self,
        scheme: str,
        overrides: Mapping[str, str] | None,
        components: Sequence[str] | None,
        kept: Sequence[str] | None,
        recipe: str,
        correction: bool | None,
    ) -> None:
        """Refuse what says otherwise what a plan says, and what adds bytes to a file whose bytes are limited.

        Raises:
            ConfigError: something of that, or a file that is there already.
        """
        if scheme != DEFAULT_SCHEME or overrides or components:
            raise ConfigError(
                "A plan chooses schemes for all layers. Leave `--scheme`, `--override`, `--component` out."
            )
        if kept:
            raise ConfigError(
                f"A plan counts and measures all layers as quantized, but `--modules-to-not-convert` leaves "
                f"{', '.join(kept)} float. Leave it out."
            )
        if "target_bytes" in self.targets and (recipe != DEFAULT_RECIPE or correction):
            raise ConfigError(
                "Recipes and the correction may add tensors, so `--target-bytes` cannot be promised with them. Make "
                "the plan with `--plan FILE` first; then run the recipe with `--plan FILE` alone."
            )
        if self.file is not None and self.targets:
            require_writable_file(self.file)
            if self.file.exists() and not self.overwrite:
                raise ConfigError(
                    f"{self.file} must not exist yet where a target is given, but it does. Leave the target out to "
                    f"use that plan, name another file, or pass `--overwrite`."
                )
            if self.file.exists() and not is_plan(self.file):
                raise ConfigError(f"`--overwrite` replaces plans only, but {self.file} holds something else.")

    def plan(
        self,
        source: str,
        out: Path,
        *,
        config: str | None,
        variant: str | None,
        guidance_scale: float | None,
        prompts: list[str] | None,
        **shown: Any,
    ) -> BudgetPlan:
        """Make the plan, or read it, and say what it is.

        Args:
            source, config, variant: of the float pipeline.
            out (`Path`): beside which lies what is measured, until `done`.
            guidance_scale, prompts, **shown: of the samples.
        """
        if not self.targets:
            made = BudgetPlan.read(Path(str(self.file)))
            made.config(_float_model(source, made, config, variant))  # refuses another architecture
        else:
            pipe = load_pipeline(source, config=config, variant=variant)
            arguments = call_settings(pipe, prompts, guidance_scale, samples=True)
            asked = {**self.targets, **shown, "prompts": prompts, **arguments}
            made = _planned(pipe, _work(out), asked)
        show(made)
        return made

    def components(self, source: str, made: BudgetPlan) -> list[str] | None:
        """What of the source the plan is for; a model on its own has no names."""
        path = Path(source)
        return None if (path / "config.json").is_file() else [made.component]

    def done(self, out: Path, made: BudgetPlan) -> None:
        """The checkpoint is there: a new plan is stored, and what was measured for it goes."""
        if self.targets and self.file is not None:
            made.write(self.file)
        shutil.rmtree(_work(out), ignore_errors=True)


def _planned(pipe: DiffusionPipeline, work: Path, asked: Mapping[str, Any]) -> BudgetPlan:
    """A new plan, or the one that an interrupted run of the same arguments has made: measured times are never equal."""
    with writing(work):
        work.mkdir(parents=True, exist_ok=True)
    kept = f"{work} keeps what is measured, and the same command goes on with it"
    with only_run(work, f"plan in {work}"), keeping(kept), progress("planning") as report:
        finished = Journal(
            work / "plan.jsonl", {"asked": repr(sorted(asked.items())), "model": state_digest(denoiser_of(pipe))}
        )
        if finished.entries:
            return BudgetPlan.from_dict(finished.entries[0], str(finished.file))
        made = plan_budget(pipe, work_dir=work, on_progress=report, **asked)
        finished.keep([made.to_dict()])
        return made


def show(plan: BudgetPlan) -> None:
    """The front of a plan, with the place of what was chosen, on standard error."""
    columns = {
        "bytes": lambda point: megabytes(point.bytes),
        "traj_rel_l2": lambda point: f"{point.error:.4f}",
        "PSNR": lambda point: point.psnr_db and f"{point.psnr_db:.1f} dB",
        "step": lambda point: point.step_seconds and f"{1e3 * point.step_seconds:.1f} ms",
        "layers": lambda point: ", ".join(f"{count} × {scheme}" for scheme, count in point.bits.items()),
    }
    nearest = min(plan.front, key=lambda point: abs(point.bytes - plan.bytes))
    shown = {name: cell for name, cell in columns.items() if any(map(cell, plan.front))}
    table = Table("", *shown)
    for point in plan.front:
        table.add_row("→" if point is nearest else "", *(cell(point) or "–" for cell in shown.values()))
    stderr.print(table)
    stderr.print(
        f"plan: at most {plan.bytes:,} bytes, traj_rel_l2 {plan.error:.4f} as predicted, in {plan.seconds:.0f} s; why "
        f"each layer got what it got is in {PLAN_FILE}, which `inspect` and `report` read.",
        soft_wrap=True,
    )


def _float_model(source: str, plan: BudgetPlan, config: str | None, variant: str | None) -> nn.Module | Any:
    """The model that a plan is to be used for, as far as its names and shapes are known, which is without weights."""
    path = fetch(source, variant)
    if path.is_file():
        return load_pipeline(source, config=config)
    folder = path if (path / "config.json").is_file() else path / plan.component
    cls: Any = getattr(diffusers, str(read_config(folder).get("_class_name")), None)
    if not hasattr(cls, "from_config"):
        raise ConfigError(f"This plan is for a pipeline's `{plan.component}`, but {source} has none. Make a new plan.")
    with no_init_weights(), init_empty_weights():
        return cls.from_config(cls.load_config(folder))


def _work(out: Path) -> Path:
    return out.with_name(f".{out.name}.plan")


def _with_unit(text: str, units: Mapping[str, float], option: str, example: str) -> float:
    found = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([A-Za-z]*)\s*", text)
    if found is None or found[2] not in units or float(found[1]) <= 0:
        raise ConfigError(f"`{option}` must read like {example}, but got {text!r}.")
    return float(found[1]) * units[found[2]]

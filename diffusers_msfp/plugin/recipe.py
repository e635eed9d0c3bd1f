"""The stages of recipes: each takes a quantized, calibrated pipeline and its float original, and works in place."""

import hashlib
import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from diffusers import DiffusionPipeline

from ..checkpoint.journal import Journal
from ..errors import ConfigError, NonFiniteError, NothingToDoError
from ..methods import METHODS
from ..methods.correction.fit import CorrectionConfig
from ..recipes import CORRECTION, RECIPES
from ..results import OnProgress, plain
from ..sampling.solvers import without_ancestral

logger = logging.getLogger(__name__)


WORK = ".work"


def plan_stages(
    recipe: str, settings: Mapping[str, Mapping], *, correction: int = 0, **shared: Any
) -> list[tuple[str, object]]:
    """Stages of a recipe with their configs.

    Args:
        recipe (`str`): name in `RECIPES`.
        settings (`Mapping[str, Mapping]`): stage → settings that replace the recipe's.
        correction (`int`): end with the correction of the output, fitted on this many samples or the default, if that
            is less; 0 for none.
        **shared: settings of all stages that have them, where neither says otherwise.

    Raises:
        ConfigError: an unknown recipe or setting, a value that makes no sense, settings of a stage that the recipe
            does not have.
    """
    stages = RECIPES[recipe] + ((CORRECTION,) if correction else ())
    for name in settings:
        if name not in {stage.name for stage in stages}:
            have = ", ".join(stage.name for stage in stages) or "none"
            raise ConfigError(f"Settings must belong to a stage of recipe `{recipe}` ({have}), but got {name!r}.")
    plan = []
    for stage in stages:
        kind = METHODS[stage.name]
        known = [field.name for field in fields(kind.config)]
        wanted = dict(settings.get(stage.name, {}))
        if stage is CORRECTION:
            wanted.setdefault("num_samples", min(correction, CorrectionConfig.num_samples))
        unknown = [key for key in wanted if key not in known]
        if unknown:
            raise ConfigError(f"A setting of `{stage.name}` must be one of {', '.join(known)}, but got {unknown[0]!r}.")
        _require_types(stage.name, kind.config, wanted)
        try:
            common = {key: value for key, value in shared.items() if key in known}
            plan.append((stage.name, kind.config(**common | dict(stage.settings) | wanted)))
        except TypeError as error:
            given = ", ".join(f"{key}={value!r}" for key, value in wanted.items())
            raise ConfigError(
                f"Settings of `{stage.name}` must have the types that `{kind.config.__name__}` says, but got {given}."
            ) from error
    return plan


def _require_types(stage: str, config: type, wanted: Mapping[str, object]) -> None:
    """Refuse values that are no numbers, or no truth values, where a setting is one.

    Raises:
        ConfigError: so it is.
    """
    hints = get_type_hints(config)
    for key, value in wanted.items():
        kinds = set(get_args(hints[key]) or (hints[key],))
        if not kinds <= {bool, int, float, str, type(None)}:
            continue
        kinds |= {int} if float in kinds else set()
        if type(value) not in kinds:
            names = " or ".join(sorted("none" if kind is type(None) else kind.__name__ for kind in kinds))
            raise ConfigError(f"`{stage}.{key}` must be {names}, but got {value!r}.")


class RecipeRun:
    """A recipe at work in a folder, which keeps the pipeline after each stage and where a killed run goes on.

    Args:
        folder (`Path`): holds `0-calibration`, `1-temporal`, `2-rounding` and so on, checkpoints like any other, and a
            journal.
        plan (`list[tuple[str, object]]`): see `plan_stages`.
        identity (`dict`): all else that the result depends on; stages of a run with another one are dropped, and so
            are those from the first one on that has other settings.
    """

    def __init__(self, folder: Path, plan: list[tuple[str, object]], identity: dict) -> None:
        self.folder, self.plan = folder, plan
        self._journal = Journal(folder / "stages.jsonl", identity)
        self.figures: list[dict] = []
        for index, entry in enumerate(self._journal.entries[: len(plan)]):
            if entry["settings"] != self._settings(index):
                break
            self.figures.append(entry)
        kept = {self.calibrated.name, *(self._stage_folder(index).name for index in range(len(self.figures)))}
        for old in folder.glob("[0-9]*-*"):
            if self._journal.differs or not (old.name in kept or old.name.endswith(WORK)):
                shutil.rmtree(old)
        self._journal.keep(self.figures)

    @property
    def calibrated(self) -> Path:
        """Where the checkpoint before the first stage lies, once it is written."""
        return self.folder / "0-calibration"

    @property
    def latest(self) -> Path | None:
        """The checkpoint after the last stage that is finished, or after calibration; None before."""
        if self.figures:
            return self._stage_folder(len(self.figures) - 1)
        return self.calibrated if self.calibrated.is_dir() else None

    def _settings(self, index: int) -> list[str]:
        """Of a stage and of those before it."""
        return [f"{name}: {config}" for name, config in self.plan[: index + 1]]

    def _stage_folder(self, index: int) -> Path:
        return self.folder / f"{index + 1}-{self.plan[index][0]}"

    def run(
        self,
        pipe: DiffusionPipeline,
        original: DiffusionPipeline,
        *,
        prompts: Sequence[str] | None,
        save: Callable[[DiffusionPipeline, Path], None],
        progress: Callable[[str], AbstractContextManager[OnProgress]],
        arguments: Mapping[str, object] | None = None,
    ) -> None:
        """Run the stages that are left, in place.

        Args:
            pipe (`DiffusionPipeline`): as the last finished stage left it.
            original (`DiffusionPipeline`): float.
            prompts (`Sequence[str]`, *optional*): for pipelines that take prompts.
            save (`Callable`): writes a pipeline to a folder, completely or not at all.
            progress (`Callable`): a bar with a title; gives an `OnProgress`.
            arguments (`Mapping[str, object]`, *optional*): passed on to the pipelines, like `guidance_scale`.
        """
        teacher = without_ancestral(original, arguments)
        for index, (name, config) in list(enumerate(self.plan))[len(self.figures) :]:
            kind, started = METHODS[name], time.perf_counter()
            digest = hashlib.sha256("".join(self._settings(index)).encode()).hexdigest()[:8]
            work = self.folder / f"{index + 1}-{name}-{digest}{WORK}"
            options = dict(arguments or {}) | ({"work_dir": work} if kind.resumes else {})
            with progress(f"stage {index + 1} of {len(self.plan)}: {name}") as report:
                if kind.reports:
                    options["on_progress"] = report
                try:
                    result = plain(kind.run(pipe, teacher, config, prompts=prompts, **options))
                except NothingToDoError as error:
                    logger.warning("Stage `%s` is left out: %s", name, error)
                    result = {"left_out": str(error)}
                except NonFiniteError as error:  # of these settings, not of the source
                    raise ConfigError(f"Stage `{name}` must have settings that keep numbers finite. {error}") from error
            save(pipe, self._stage_folder(index))
            for figures in (result, *(part for part in result.values() if isinstance(part, dict))):
                figures.pop("losses", None)
            entry = {
                "stage": name,
                "settings": self._settings(index),
                "seconds": time.perf_counter() - started,
                "figures": result,
            }
            entry = json.loads(json.dumps(entry))  # as a run that goes on will read it
            self._journal.add(entry)
            self.figures.append(entry)
            shutil.rmtree(work, ignore_errors=True)

"""A plan: what each layer gets, what it was chosen from and why; kept as a JSON file with a checksum.

Whoever reads a plan needs no model: `inspect` and the report say from it why a layer got what it got.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline
from torch import nn

from ..checkpoint.describe import read_config
from ..compat.wrappers import unwrap
from ..errors import CheckpointError, ConfigError
from ..outputs import write_file
from ..plugin.config import MSFPConfig
from ..results import OPTIONAL, Result, plain
from ..sampling.denoisers import denoiser_of
from ..schemes import SCHEMES, resolve
from .sensitivity import state_digest

PLAN_FILE = "budget.json"
"""A plan's name in the folder of a checkpoint that was made by it."""
VERSION = 1
TARGETS = ("bytes", "psnr", "step")


@dataclass(frozen=True, kw_only=True)
class Option(Result):
    """One form of one layer.

    Args:
        scheme (`str`): its name in `SCHEMES`, whose inner layers' formats are tried.
        bytes (`int`): in the weight file.
        error (`float`): this layer's alone, as a share of the output's energy, see `sensitivity`.
        seconds (`float`, *optional*): of a step.
    """

    scheme: str
    bytes: int
    error: float
    seconds: float | None = field(default=None, metadata=OPTIONAL)


@dataclass(frozen=True, kw_only=True)
class PlannedLayer(Result):
    """One layer of a plan.

    Args:
        name (`str`), scheme (`str`): of the layer; what it gets.
        options (`tuple[Option, ...]`): what it was chosen from.
    """

    name: str
    scheme: str
    options: tuple[Option, ...]

    @property
    def chosen(self) -> Option:
        """The option that it gets."""
        return next(option for option in self.options if option.scheme == self.scheme)

    @property
    def reason(self) -> str:
        """Why, in figures: what more or less would have changed."""
        own, words = self.chosen, []
        for other in self.options:
            if other is not own:
                saved = other.bytes - own.bytes
                factor = other.error / own.error if own.error > 0 else float("inf")
                words.append(f"{other.scheme}: {saved:+,d} bytes, {factor:.3g} × its error")
        return f"error {own.error:.2e} of the output; " + "; ".join(words)


@dataclass(frozen=True, kw_only=True)
class FrontPoint(Result):
    """One of the best choices for a size.

    Args:
        bytes (`int`): of the weight file.
        error (`float`): predicted `traj_rel_l2`.
        psnr_db (`float`, *optional*): what that means, where it was calibrated.
        step_seconds (`float`, *optional*): of a step, where layers were timed.
        bits (`Mapping[str, int]`): scheme → layers.
    """

    bytes: int
    error: float
    psnr_db: float | None = field(default=None, metadata=OPTIONAL)
    step_seconds: float | None = field(default=None, metadata=OPTIONAL)
    bits: Mapping[str, int]


@dataclass(frozen=True, kw_only=True)
class BudgetPlan(Result):
    """What `plan_budget` decided, and all that it knew.

    Args:
        component (`str`): the pipeline's denoiser, which alone is planned for.
        structure, model (`str`): SHA-256 of its class and its tensors' names and shapes; with their values.
        target (`str`): `"bytes"`, `"psnr"` or `"step"`.
        target_value (`float`): what that was to be: bytes, decibels or seconds.
        settings (`Mapping[str, Any]`): of samples and calibration.
        layers (`tuple[PlannedLayer, ...]`): all of them.
        bytes (`int`): of the denoiser's weight files; never less than they will be.
        error (`float`): predicted `traj_rel_l2`.
        error_bound (`float`): that no choice for the same target can be below, if errors add up; of a target for PSNR
            the least bytes.
        psnr_db, step_seconds (`float`, *optional*): predicted, where that was measured.
        front (`tuple[FrontPoint, ...]`): from the smallest to the best.
        runs (`tuple[tuple[float, float], ...]`): (squared error as predicted, PSNR in decibels) of real runs.
        seconds (`float`): that planning took.

    Example:
        ```py
        plan = BudgetPlan.read("model/budget.json")
        print(plan.reasons["conv_in"])
        ```
    """

    component: str
    structure: str
    model: str
    target: str
    target_value: float
    settings: Mapping[str, Any]
    layers: tuple[PlannedLayer, ...]
    bytes: int
    error: float
    error_bound: float
    psnr_db: float | None = field(default=None, metadata=OPTIONAL)
    step_seconds: float | None = field(default=None, metadata=OPTIONAL)
    front: tuple[FrontPoint, ...]
    runs: tuple[tuple[float, float], ...]
    seconds: float

    @property
    def scheme_overrides(self) -> dict[str, str]:
        """Layer → scheme for `MSFPConfig`; exact, since a longer name comes later and the last match wins."""
        return {layer.name: layer.scheme for layer in sorted(self.layers, key=lambda each: len(each.name))}

    @property
    def aim(self) -> str:
        """What was asked for, in words."""
        value = self.target_value
        return {
            "bytes": f"a file of at most {value / 1e6:.4g} MB",
            "psnr": f"pictures at {value:g} dB PSNR",
            "step": f"a step of at most {1e3 * value:.4g} ms",
        }[self.target]

    @property
    def reasons(self) -> dict[str, str]:
        """Layer → why it gets what it gets."""
        return {layer.name: f"{layer.scheme}: {layer.reason}" for layer in self.layers}

    @property
    def scheme(self) -> str:
        """What most layers get."""
        return Counter(layer.scheme for layer in self.layers).most_common(1)[0][0]

    def config(self, model: DiffusionPipeline | nn.Module) -> MSFPConfig:
        """The request that quantizes a model in this way.

        Args:
            model (`DiffusionPipeline` or `nn.Module`): that the plan was made for, or its pipeline; weights may differ.

        Raises:
            ConfigError: another architecture, or other shapes.
        """
        denoiser = unwrap(model) if isinstance(model, nn.Module) else denoiser_of(model)
        if state_digest(denoiser, values=False) != self.structure:
            raise ConfigError(
                f"A plan serves the architecture that it was made for, with {len(self.layers)} layers "
                f"({self.layers[0].name}, …), but this {type(denoiser).__name__} has other tensors. Make a new plan."
            )
        components = None if isinstance(model, nn.Module) else [self.component]
        return MSFPConfig(self.scheme, scheme_overrides=self.scheme_overrides, components_to_quantize=components)

    def to_dict(self) -> dict[str, Any]:
        """See `Result.to_dict`; with the format's version and a checksum of all else."""
        content = {"version": VERSION} | super().to_dict()
        return content | {"checksum": _checksum(content)}

    def text(self) -> str:
        """What its file holds."""
        return json.dumps(self.to_dict(), indent=1) + "\n"

    def write(self, file: str | Path) -> None:
        """Store the plan, complete or not at all.

        Raises:
            ConfigError: it cannot be written there.
        """
        write_file(Path(file), self.text())

    @classmethod
    def read(cls, file: str | Path) -> "BudgetPlan":
        """Read what `write` wrote.

        Raises:
            CheckpointError: no such file, a damaged one, one of a newer version, or something else.
        """
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(f"{file} must be a plan that `plan_budget` made, but it cannot be read.") from error
        return cls.from_dict(content, str(file))

    @classmethod
    def from_dict(cls, content: object, source: str = "A plan") -> "BudgetPlan":
        """Read what `to_dict` gave.

        Raises:
            CheckpointError: see `read`.
        """
        if not isinstance(content, dict) or "version" not in content or "checksum" not in content:
            raise CheckpointError(f"{source} must be a plan that `plan_budget` made, but it is something else.")
        if content["version"] != VERSION:
            raise CheckpointError(
                f"{source} must have version {VERSION}, but it has {content['version']!r}: made by another release. "
                f"Make a new plan."
            )
        given = {key: value for key, value in content.items() if key != "checksum"}
        if _checksum(given) != content["checksum"]:
            raise CheckpointError(
                f"{source} must be as `plan_budget` wrote it, but its checksum is another: damaged, or changed by "
                f"hand. Make a new plan; single layers are changed by `scheme_overrides`."
            )
        own = {each.name for each in fields(cls)}
        if not given.keys() - {"version"} <= own:
            raise CheckpointError(f"{source} has keys that this release does not know. Make a new plan.")
        try:
            layers = tuple(
                PlannedLayer(
                    name=layer["name"],
                    scheme=layer["scheme"],
                    options=tuple(Option(**option) for option in layer["options"]),
                )
                for layer in given["layers"]
            )
            front = tuple(FrontPoint(**point) for point in given["front"])
            runs = tuple((error, psnr) for error, psnr in given["runs"])
            rest = {key: value for key, value in given.items() if key in own - {"layers", "front", "runs"}}
            return cls(**rest, layers=layers, front=front, runs=runs)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"{source} is malformed ({error}): not one that `plan_budget` wrote.") from error

    def __post_init__(self) -> None:
        unknown = {layer.scheme for layer in self.layers} - set(SCHEMES)
        if self.target not in TARGETS or not self.layers or unknown:
            raise CheckpointError(
                f"A plan must have layers, known schemes and a target ({', '.join(TARGETS)}), but got "
                f"{self.target!r}, {len(self.layers)} layers and unknown schemes {sorted(unknown)}."
            )
        overrides = self.scheme_overrides
        for layer in self.layers:
            if resolve(layer.name, self.scheme, overrides) is not SCHEMES[layer.scheme].inner:
                raise CheckpointError(f"A plan must say one scheme for each layer, but `{layer.name}` has several.")


def is_plan(file: Path) -> bool:
    """Whether a file is a plan of some release, damaged or not."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"version", "checksum", "layers"} <= content.keys()


def stored_plan(folder: str | Path | None) -> BudgetPlan | None:
    """The plan in a checkpoint's folder, where there is one by which the checkpoint was quantized.

    Raises:
        CheckpointError: it is damaged.
    """
    file = None if folder is None else Path(folder) / PLAN_FILE
    if folder is None or file is None or not file.is_file():
        return None
    plan = BudgetPlan.read(file)
    own = Path(folder) / str(plan.component)  # or a model on its own
    quantized = (read_config(own) or read_config(Path(folder))).get("quantization_config") or {}
    asked = quantized.get("scheme"), quantized.get("scheme_overrides") or {}
    return plan if asked == (plan.scheme, plan.scheme_overrides) else None  # another one lies beside it


def _checksum(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(cast(Any, plain(content)), sort_keys=True).encode()).hexdigest()

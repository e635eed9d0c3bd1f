"""A checkpoint made ready: all files of its repository, among them the card, its pictures and its results."""

import inspect
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from diffusers import DiffusionPipeline

from ..checkpoint.describe import component_dirs, file_bytes
from ..checkpoint.digest import fingerprint
from ..evaluation import image_grid
from ..methods.talora import AdapterBank
from ..outputs import png_of
from ..plugin import MSFPPipelineMixin
from ..results import OnProgress
from ..sampling.observation import quantized_models
from .base import require_base, require_license
from .card import PREVIEW, ROUTER, TIMESTEPS, is_routed, render_card
from .checks import Checked, all_at_once, check_checkpoint
from .layout import Files, read_layout
from .plots import plot_router, plot_timesteps
from .results import CHECKPOINT, Results, read_results

PICTURE_SIDE = 96


@dataclass(frozen=True)
class PreparedRepository:
    """What is to be published.

    Args:
        files (`dict`): path in the repository → source.
        left_out (`list[str]`): files of the checkpoint's folder that are not published.
        missing (`dict[str, str]`): what was not measured → the command that measures it.
        arguments (`str`): of `from_pretrained`, as source text.
    """

    files: Files
    left_out: list[str]
    missing: dict[str, str]
    arguments: str

    @property
    def snippet(self) -> str:
        """The two lines that load it."""
        return (
            "import diffusers, diffusers_msfp  # pip install diffusers-msfp\n"
            f"pipe = diffusers.DiffusionPipeline.from_pretrained({self.arguments})"
        )


def prepare(
    folder: Path,
    repo: str,
    origin: Mapping[str, str | None],
    *,
    revision: str | None = None,
    variant: str | None = None,
    results: Iterable[Path] = (),
    num_samples: int = 8,
    num_inference_steps: int = 20,
    seed: int = 0,
    prompts: list[str] | None = None,
    on_progress: OnProgress | None = None,
) -> PreparedRepository:
    """Check a checkpoint and write its card; the folder is not changed.

    Args:
        folder (`Path`): the checkpoint.
        repo (`str`): Hub id.
        origin (`Mapping[str, str | None]`): `base_model`, `license`, and what the base's card says beside them; for a
            base that is not on the Hub `base_elsewhere`, its URL or `none`, in the place of `base_model`.
        revision (`str`, *optional*): branch that it will be on.
        variant (`str`, *optional*): that is sampled and named on the card.
        results (`Iterable[Path]`): results files beside those in `folder`.
        num_samples, num_inference_steps, seed, prompts, on_progress: of the card's samples.

    Raises:
        CheckpointError: see `read_layout` and `check_checkpoint`.
        ConfigError: no licence, or results that cannot be read.
    """
    all_at_once(lambda: require_base(origin), lambda: require_license(origin, folder))
    origin = _licensed({key: value for key, value in origin.items() if key != "base_elsewhere" or value})
    files, left = read_layout(folder, origin["base_model"])
    found = read_results(folder, results)
    checked = check_checkpoint(
        folder,
        variant=variant,
        num_samples=num_samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        prompts=prompts,
        on_progress=on_progress,
    )
    found.require_of(fingerprint(quantized_models(checked.pipe)))
    named = {"revision": revision, "variant": checked.variant}
    arguments = [json.dumps(repo), *(f"{key}={json.dumps(value)}" for key, value in named.items() if value)]
    facts: dict[str, Any] = {
        "repo": repo,
        "arguments": ", ".join(arguments),
        "pipeline_tag": origin.pop("pipeline_tag", None) or task_of(type(checked.pipe)),
        **origin,
        "pipeline_class": type(checked.pipe).__name__,
        "components": describe(folder, checked),
        "preview": {"num_samples": num_samples, "num_inference_steps": num_inference_steps, "seed": seed},
    }
    files |= pages(facts, found)
    files[PREVIEW] = png_of(image_grid(checked.images, columns=min(num_samples, 8), scale=_scale(checked)))
    used = {path.resolve() for path in found.files.values()}
    left = [location for location in left if (folder / location).resolve() not in used]
    return PreparedRepository(files, left, found.missing(origin["base_model"] or "BASE"), facts["arguments"])


def pages(facts: Mapping, results: Results) -> Files:
    """The card, what it says beside the measurements, and its plots; from files alone."""
    files: Files = {"README.md": render_card(facts, results).encode(), CHECKPOINT: as_json(facts)}
    files |= {location: as_json(content) for location, content in results.published().items()}
    if results.by_timestep:
        files[TIMESTEPS] = plot_timesteps(results.by_timestep)
    for part in facts["components"].values():
        if is_routed(part):
            files[ROUTER] = plot_router(part["adapters"]["intervals"], part["adapters"]["num_adapters"])
    return files


def as_json(content: object) -> bytes:
    """For people and programs."""
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def describe(folder: Path, checked: Checked) -> dict[str, dict]:
    """Quantized components of a loaded checkpoint; `engines` are this machine's and stay out."""
    report = MSFPPipelineMixin.quantization_report(cast(MSFPPipelineMixin, checked.pipe))
    for name, part in report.items():
        del part["engines"]
        model = getattr(checked.pipe, name)
        banks = [module for module in model.modules() if isinstance(module, AdapterBank)]
        part["adapter_parameters"] = sum(parameter.numel() for bank in banks for parameter in bank.parameters())
        part["parameters"] = model.num_parameters() - part["adapter_parameters"]
        part["file_bytes"] = file_bytes(component_dirs(folder)[name], checked.variant)
    return report


def task_of(cls: type[DiffusionPipeline]) -> str:
    """The Hub's name for what a pipeline does."""
    inputs = inspect.signature(cls.__call__).parameters
    if "prompt" not in inputs:
        return "unconditional-image-generation"
    return "image-to-image" if "image" in inputs else "text-to-image"


def _licensed(origin: dict[str, str | None]) -> dict[str, str | None]:
    """Licence as metadata wants it."""
    if origin["license"] == "other" and not origin.get("license_name"):
        origin |= {"license_name": "license", "license_link": "LICENSE"}
    return origin


def _scale(checked: Checked) -> int:
    return max(1, PICTURE_SIDE // checked.images.shape[1])

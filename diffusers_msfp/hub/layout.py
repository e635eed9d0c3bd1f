"""What a published repository holds: all that a plain download of it needs, and what people read.

diffusers fetches from a pipeline's repository each model's weights and `config.json`, the folders of the other
components, and `pipeline.py`; nothing else. So tensors elsewhere are refused instead of published: who loads the
checkpoint would miss them.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import diffusers
from diffusers import DiffusionPipeline

from ..budget.record import PLAN_FILE, stored_plan
from ..checkpoint.describe import WEIGHTS, config_of_origin, read_config
from ..errors import CheckpointError, ConfigError

Files = dict[str, Path | bytes]
"""Path in the repository → a file to copy, or what to write."""

MODEL_INDEX = "model_index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
TENSORS = (".safetensors", *PICKLES)
LIBRARIES = ("diffusers", "transformers")
_MODEL_FILE = re.compile(rf"(config\.json|{WEIGHTS}[\w.-]*\.safetensors(\.index[\w.-]*\.json)?)")

PIPELINE = '''\
"""Loads this repository where `diffusers_msfp` is installed but not imported.

    DiffusionPipeline.from_pretrained(REPO, custom_pipeline="pipeline", trust_remote_code=True)

With `import diffusers_msfp` before it, the plain call does the same, and runs no code from here.
"""

from diffusers import {cls}

from diffusers_msfp import MSFPPipelineMixin


class MSFP{cls}(MSFPPipelineMixin, {cls}):
    """`{cls}` that also knows `talora_summary`, `quantization_report` and the other verbs of the mixin."""
'''


def read_layout(folder: Path, base_model: str | None) -> tuple[Files, list[str]]:
    """The files of a checkpoint that are published, and what is left out.

    Args:
        folder (`Path`): a pipeline as `save_pretrained` writes it; not changed.
        base_model (`str`, *optional*): stands in the configs instead of the path that the base was loaded from.

    Returns:
        `tuple[dict, list[str]]`: path in the repository → source; paths in `folder` that stay behind.

    Raises:
        CheckpointError: pickles, tensors that a plain download would miss, or missing folders.
        ConfigError: no pipeline, or one that names classes from elsewhere.
    """
    index = pipeline_index(folder)
    files: Files = {MODEL_INDEX: _config(folder / MODEL_INDEX, base_model)}
    for name, (library, _) in components(index).items():
        own = [path for path in sorted((folder / name).rglob("*")) if path.is_file() and not _hidden(path, folder)]
        if not own:
            raise CheckpointError(f"{folder} must hold the folder of `{name}`, but it is missing or empty.")
        is_model = library == "diffusers" and any(path.suffix in TENSORS for path in own)
        for path in own:
            if not is_model or _MODEL_FILE.fullmatch(path.name):
                location = path.relative_to(folder).as_posix()
                files[location] = _config(path, base_model) if path.name == "config.json" else path
    plans = [folder / PLAN_FILE] if stored_plan(folder) is not None else []
    files |= {path.name: path for path in [*folder.glob("LICENSE*"), *plans] if path.is_file()}
    files["pipeline.py"] = PIPELINE.format(cls=index["_class_name"]).encode()
    others = [path for path in sorted(folder.rglob("*")) if path.is_file() and not _hidden(path, folder)]
    left = [location for path in others if (location := path.relative_to(folder).as_posix()) not in files]
    for location in [*files, *left]:
        if location.endswith(PICKLES):
            raise CheckpointError(
                f"Weights are published as safetensors, but {folder / location} is a pickle, which can run code when "
                f"it is opened. Remove it, or load the pipeline and call `save_pretrained` to another folder."
            )
    missed = [location for location in left if location.endswith(".safetensors")]
    if missed:
        raise CheckpointError(
            f"Everything that is needed must be fetched by a plain download, but {folder / missed[0]} would not be. "
            f"Load it into the pipeline (adapters: `pipe.load_talora`) and save that to another folder, or move the "
            f"file away."
        )
    return files, left


def pipeline_index(folder: Path) -> dict:
    """`model_index.json` of a pipeline that plain diffusers can open.

    Raises:
        ConfigError: there is none, or its classes are not stock ones.
    """
    index = read_config(folder, MODEL_INDEX)
    if not index:
        raise ConfigError(
            f"{folder} must be a pipeline's folder (with {MODEL_INDEX}), but it is not: a model without its pipeline "
            f"cannot be sampled by those who find it. Save the whole pipeline."
        )
    name = index.get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, DiffusionPipeline)):
        raise ConfigError(f"{MODEL_INDEX} must name one of diffusers' own pipelines, but got {name!r}.")
    for part, (library, class_name) in components(index).items():
        beside_pipelines = getattr(diffusers.pipelines, library, None)  # such as Stable Diffusion's safety checker
        if library not in LIBRARIES and not hasattr(beside_pipelines, class_name):
            raise ConfigError(
                f"Components must be classes of {' or '.join(LIBRARIES)}, but `{part}` is {library}.{class_name}: a "
                f"plain download refuses it."
            )
    return index


def components(index: Mapping) -> dict[str, tuple[str, str]]:
    """Name → library and class of a pipeline's components that are there.

    Raises:
        CheckpointError: a name that is no plain folder name, or an entry of another kind.
    """
    found = {}
    for name, entry in index.items():
        if not isinstance(entry, list) or not any(entry):
            continue
        if len(entry) != 2 or not all(isinstance(part, str) for part in entry) or not name.isidentifier():
            raise CheckpointError(f"{MODEL_INDEX} must map components to [library, class], but got {name!r}: {entry}.")
        found[name] = (entry[0], entry[1])
    return found


def _hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(folder).parts)


def _config(path: Path, base_model: str | None) -> Path | bytes:
    """A config without the path on this machine that the base was loaded from."""
    if read_config(path.parent, path.name).get("_name_or_path") in (None, base_model):
        return path
    return config_of_origin(path, base_model)

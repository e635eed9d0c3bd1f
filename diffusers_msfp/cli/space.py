"""`space`: the page that shows a quantized model beside full precision, here or as a Hugging Face Space."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from diffusers import DiffusionPipeline, ModelMixin
from huggingface_hub import ModelCard, ModelCardData

from ..assets import EMBEDDED_MODEL, TUNED_MODELS
from ..errors import ConfigError
from ..hub.base import base_of as remembered_base
from ..hub.base import link_from, on_the_hub
from ..outputs import writing
from ..results import Result
from ..sampling.denoisers import denoiser_of
from ..sampling.observation import calibration_state, quantized_models
from ..space import Candidate, build_page, is_space, launch, require_comparable, require_gradio, write_space
from .shared.load import SourceError, load_pipeline, require_variant
from .shared.store import check_target, publish, scratch_folder
from .shared.terminal import stderr

EMBEDDED_TITLE = "Fashion-MNIST in four bits"


def space_run(
    source: str | None = None,
    *,
    reference: str | None = None,
    title: str | None = None,
    variant: str | None = None,
    port: int | None = None,
    on_start: Callable[[str], None] | None = None,
) -> None:
    """Serve the page until Ctrl-C, which ends it as it should.

    Args:
        source, reference, title, variant: see `open_page`.
        port (`int`, *optional*): the first free one from 7860 on by default.
        on_start (`Callable[[str], None]`, *optional*): called with the page's address.
    """
    page = open_page(source, reference=reference, title=title, variant=variant)
    address = launch(page, port)
    (on_start or print_address)(address)
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        pass
    finally:
        page.close(verbose=False)


@dataclass(frozen=True, kw_only=True)
class Address(Result):
    """Where a page is served.

    Args:
        address (`str`): its URL.
    """

    address: str


def print_address(address: str) -> None:
    """Tell people where the page is."""
    stderr.print(f"The page is at [bold]{address}[/] (Ctrl+C stops it)", soft_wrap=True)


def open_page(
    source: str | None = None, *, reference: str | None = None, title: str | None = None, variant: str | None = None
) -> Any:
    """Load pipelines and build their page.

    Args:
        source (`str`, *optional*): folder or Hub id of a quantized pipeline; by default the fine-tuned `w4a4` that the
            package brings.
        reference (`str`, *optional*): the full-precision pipeline; by default the one that the source's model card
            names as its base, or the embedded model. Without one the page shows the quantized pipeline alone.
        title (`str`, *optional*): of the page; the source's name by default.
        variant (`str`, *optional*): of the weights, where a pipeline has it.

    Returns:
        `gradio.Blocks`.

    Raises:
        SourceError: something cannot be loaded, or `source` is not quantized.
        ConfigError: Gradio is not installed, or the two cannot be compared.
    """
    require_gradio()
    if source is None:
        source, title = str(TUNED_MODELS["w4a4"]), title or EMBEDDED_TITLE
        reference = reference or str(EMBEDDED_MODEL)
    with stderr.status(f"opening {source}"):
        require_variant(variant, source, reference)
        quantized = load_pipeline(source, variant=variant)
    _require_quantized(quantized, source)
    dtype = cast(ModelMixin, denoiser_of(quantized)).dtype
    original = _original(source, reference, dtype, variant)
    pipes = [pipe.to("cuda") if torch.cuda.is_available() else pipe for pipe in (quantized, original) if pipe]
    candidates = [Candidate(pipe) for pipe in pipes]
    if len(candidates) == 2:
        require_comparable(*candidates)
    return build_page(title or _name(source), *candidates)


def _require_quantized(pipe: DiffusionPipeline, source: str) -> None:
    if not list(quantized_models(pipe)):
        raise SourceError(f"{source} must be quantized, but it is not: run `diffusers-msfp quantize` first.")


def _original(source: str, reference: str | None, dtype: torch.dtype, variant: str | None) -> DiffusionPipeline | None:
    """The full-precision pipeline; None, with a note, where it is not known or the one on the card cannot be had."""
    wanted = reference or base_of(source)
    if wanted is None:
        stderr.print(f"{source} does not say what it was made from; `--reference` names it.", soft_wrap=True)
        return None
    try:
        with stderr.status(f"opening {wanted}"):
            return load_pipeline(wanted, variant=variant, dtype=dtype)
    except SourceError as error:
        if reference:
            raise
        stderr.print(f"No full precision beside it: {error}", soft_wrap=True)
        return None


def _card(source: str) -> ModelCardData:
    """What a checkpoint's model card says; nothing where there is none."""
    readme = Path(source) / "README.md"
    if Path(source).exists() and not readme.is_file():
        return ModelCardData()
    try:
        return ModelCard.load(readme if readme.is_file() else source, ignore_metadata_errors=True).data
    except (OSError, ValueError):
        return ModelCardData()


def base_of(source: str) -> str | None:
    """The model that a checkpoint was made from, as its model card says."""
    base = _card(source).base_model
    return next(iter(base), None) if isinstance(base, list) else base or None


def _name(source: str) -> str:
    return Path(source).resolve().name if Path(source).exists() else source.rpartition("/")[2]


def _license(source: str, reference: str | None) -> dict[str, str]:
    """What the card of a checkpoint, or else that of its base, says of the licence; a note where neither does."""
    remembered = remembered_base(Path(source)) if reference is None and Path(source).is_dir() else None
    for location, copied in ((source, "model"), (reference or remembered, "reference")):
        card = _card(location) if location is not None else None
        if location is None or card is None or not isinstance(card.license, str):
            continue
        found = {key: card.get(key) for key in ("license", "license_name", "license_link")}
        link = found["license_link"]
        if isinstance(link, str):
            found["license_link"] = link_from(link, copied if Path(location).is_dir() else on_the_hub(location))
        return {key: value for key, value in found.items() if isinstance(value, str)}
    stderr.print(
        "The model's licence is not known, so the Space names none: add `license:` to its README.md.", soft_wrap=True
    )
    return {}


@dataclass(frozen=True, kw_only=True)
class CreatedSpace(Result):
    """What `space_create` wrote.

    Args:
        out, title (`str`), reference (`str`, *optional*): folder, heading, full-precision pipeline.
        files (`Sequence[str]`): names, sorted.
        bytes (`int`): of all files.
    """

    out: str
    title: str
    reference: str | None
    files: Sequence[str]
    bytes: int


def space_create(
    source: str,
    out: str | Path,
    *,
    reference: str | None = None,
    title: str | None = None,
    variant: str | None = None,
    overwrite: bool = False,
) -> CreatedSpace:
    """Write a Space that serves the page of a quantized pipeline.

    Args:
        source (`str`): folder of a quantized pipeline, which is copied into the Space, or a Hub id, of which the Space
            names and this reads the card alone.
        out (`str` or `Path`): folder to write; appears only when it is complete.
        reference (`str`, *optional*): folder or Hub id of the full-precision pipeline; by default what the source's
            model card names as its base, or none.
        title (`str`, *optional*): the source's name by default.
        variant (`str`, *optional*): of the weights, where a pipeline has it.
        overwrite (`bool`): replace a Space that is there.

    Raises:
        SourceError: a folder that holds no quantized pipeline, or neither a folder nor a Hub id.
        ConfigError: `out` exists, or holds something else than a Space.
    """
    out = check_target(out, overwrite, read=[source, reference], ours=is_space, what="Spaces")
    require_variant(variant, source, reference)
    if Path(source).exists():
        pipe = load_pipeline(source, variant=variant)
        _require_quantized(pipe, source)
        Candidate(pipe)  # refuses what a page cannot ask for pictures
        if any(calibration_state(model) == "observing" for model in quantized_models(pipe)):
            raise ConfigError(
                f"A Space needs a calibrated model, but {source} still observes its ranges. Call `calibrate(pipe)` and "
                f"save it first."
            )
    title, reference = title or _name(source), reference or base_of(source)
    for location in (source, reference):
        if location is not None and not Path(location).is_dir() and location.count("/") != 1:
            raise SourceError(f"{location} must be a folder or a Hub id like `user/model`, but it is none of them.")
    license = _license(source, reference)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        with scratch_folder(out) as scratch:
            made = Path(scratch) / "made"
            made.mkdir()
            files = write_space(made, title, source, reference, variant=variant, **license)
            size = sum((made / file).stat().st_size for file in files)
            publish(made, out)
    return CreatedSpace(out=str(out), title=title, reference=reference, files=files, bytes=size)

"""Find and load what a user names: a pipeline's folder, a component's folder, a Hub id, a single file."""

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, cast

import diffusers
import torch
from diffusers import AutoModel, DiffusionPipeline, ModelMixin
from torch import nn

from ...checkpoint.describe import file_bytes, read_config, weights_by_variant
from ...checkpoint.tensor_files import bytes_per_number
from ...compat.diffusers import single_file_origin, single_file_part
from ...errors import SEE_DOCTOR, ConfigError, MSFPError, first_line
from ...plugin.config import MSFPConfig
from ...plugin.files.streaming import StreamedModel
from ...sampling.denoisers import denoisers_of
from .terminal import stderr

DTYPES = ("float32", "bfloat16", "float16")

OTHER_QUANTIZERS = {"sdnq": "sdnq"}
"""Methods that diffusers knows only after an import: `quant_method` → package."""


class SourceError(MSFPError):
    """Something named on the command line that cannot be loaded."""


def fetch(source: str, variant: str | None = None) -> Path:
    """Where a source lies: a folder or file as it is, a Hub id's pipeline in the cache, downloaded if need be.

    Raises:
        SourceError: there is nothing, or nothing of this variant.
    """
    path = Path(source)
    if path.exists():
        return path
    _require_hub_id(source)
    try:
        return Path(DiffusionPipeline.download(source, variant=variant))
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise SourceError(f"{source} cannot be loaded: {first_line(error)}") from error


def require_variant(variant: str | None, *sources: str | Path | None) -> None:
    """Refuse a variant that none of the sources can have; those that lack it are read without.

    Raises:
        SourceError: no folder among them has weights of it.
    """
    locations = [Path(source) for source in sources if source is not None]
    if variant is None or any(not location.exists() for location in locations):  # the Hub knows
        return
    known = {each for location in locations for found in _variants(location).values() for each in found}
    if variant not in known:
        names = ", ".join(sorted(f"`{name}`" if name else "plain ones" for name in known)) or "none"
        where = " and ".join(map(str, locations))
        raise SourceError(
            f"{where} must hold weights of the variant `{variant}`, but there are {names}. Leave `--variant` out, or "
            f"name one that is there."
        )


def variant_of(source: str | Path, variant: str | None = None) -> str | None:
    """The variant to read of a folder's weights: the one that is wanted if it is there, else one that alone is there.

    Args:
        source (`str` or `Path`): a pipeline's or model's folder; anything else is not looked at.
        variant (`str`, *optional*): what is wanted.

    Raises:
        SourceError: there are several variants, and no plain weights.
    """
    found = _variants(Path(source))
    if not found or any(variant in each for each in found.values() if variant is not None):
        return variant
    lacking = {part: set(each) for part, each in found.items() if None not in each}
    if not lacking:
        return None
    common = set.intersection(*lacking.values())
    if len(common) != 1:
        names = ", ".join(sorted(f"`{name}`" for each in lacking.values() for name in each))
        raise SourceError(f"{source} must hold plain weights, but there are {names} alone. Name one with `--variant`.")
    (only,) = common
    stderr.print(
        f"{source} has no plain weights but those of the variant `{only}`, which are read (`--variant {only}`).",
        soft_wrap=True,
        highlight=False,
    )
    return only


def _variants(folder: Path) -> dict[Path, dict[str | None, list[Path]]]:
    """Weights by variant of each model in a folder."""
    parts = (folder, *components_on_disk(folder)) if folder.is_dir() else ()
    return {part: found for part in parts if (found := weights_by_variant(part))}


def load_any(source: str, *, variant: str | None = None, **arguments: Any) -> DiffusionPipeline | ModelMixin:
    """A pipeline, or the model in a component's own folder, quantized by whatever package is installed.

    Args:
        source, variant: see `load_pipeline`.
        **arguments: for `from_pretrained`.

    Raises:
        SourceError: there is nothing, it cannot be read, or the package that quantized it is not installed.
    """
    folder = Path(source)
    if folder.is_dir():
        _import_quantizers(folder)
    if not (folder / "config.json").is_file() or (folder / "model_index.json").is_file():
        return load_pipeline(source, variant=variant, **arguments)
    try:
        return AutoModel.from_pretrained(source, variant=variant_of(source, variant), **arguments).eval()
    except MSFPError:
        raise
    except (OSError, ValueError, AttributeError, ImportError) as error:
        raise SourceError(f"{source} cannot be loaded: {first_line(error)}") from error


def _import_quantizers(folder: Path) -> None:
    """Import the packages without which diffusers cannot read this checkpoint."""
    for part in (folder, *components_on_disk(folder)):
        method = (read_config(part).get("quantization_config") or {}).get("quant_method")
        package = OTHER_QUANTIZERS.get(method) if isinstance(method, str) else None
        if package is not None:
            try:
                importlib.import_module(package)
            except ImportError as error:
                raise SourceError(
                    f"{part} is quantized by `{package}`, which is not installed: `pip install {package}`. {SEE_DOCTOR}"
                ) from error


def load_pipeline(
    source: str, *, config: str | None = None, variant: str | None = None, **arguments: Any
) -> DiffusionPipeline:
    """A pipeline from a folder, a Hub id or a single file.

    Args:
        source (`str`): where it is.
        config (`str`, *optional*): folder or Hub id with the configs for a single file; found by diffusers if absent.
        variant (`str`, *optional*): read its weights where a model has them, like `"fp16"`; see `variant_of`.
        **arguments: for `from_pretrained`; all parts are float32 unless they say otherwise, as transformers' parts
            would not be by themselves.

    Raises:
        SourceError: there is no pipeline, or it cannot be read.
    """
    path = Path(source)
    arguments["dtype"] = arguments.get("dtype") or torch.float32
    if path.is_file():
        return _from_single_file(path, config, **arguments)
    if not path.exists():
        _require_hub_id(source)
    elif not (path / "model_index.json").is_file():
        raise SourceError(f"A pipeline's folder must hold model_index.json, but {source} has none.")
    try:
        return DiffusionPipeline.from_pretrained(source, variant=variant_of(source, variant), **arguments)
    except MSFPError:
        raise
    except (OSError, ValueError, AttributeError, ImportError, RecursionError) as error:
        raise SourceError(f"{source} cannot be loaded: {first_line(error)}") from error


def _require_hub_id(source: str) -> None:
    if source.count("/") != 1 or source[0] in ".~/":
        raise SourceError(f"{source} must be a folder, a file or a Hub id like `user/model`, but it is none of them.")


def open_component(
    folder: Path, request: MSFPConfig, max_shard_size: int | str, variant: str | None = None
) -> StreamedModel:
    """The float model in a folder, its weights, of a variant where it has that, still unread.

    Raises:
        SourceError: its config names no diffusers model, or it cannot be read.
    """
    name = read_config(folder).get("_class_name")
    cls = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not (isinstance(cls, type) and issubclass(cls, ModelMixin)):
        raise SourceError(
            f"{folder} must be a pipeline's folder (with model_index.json) or a diffusers model's (with config.json), "
            f"but config.json names {name!r}."
        )
    try:
        return StreamedModel.from_folder(cls, folder, request, max_shard_size, variant=variant)
    except MSFPError:
        raise
    except (OSError, ValueError) as error:
        raise SourceError(f"{folder} cannot be loaded: {first_line(error)}") from error


@contextmanager
def reading_single_file(path: Path) -> Iterator[None]:
    """Say of what goes wrong in here that a file is no checkpoint that diffusers can read.

    Raises:
        SourceError: instead of what diffusers' converters raise.
    """
    if path.suffix not in (".safetensors", ".ckpt", ".pt", ".pth", ".bin"):
        raise SourceError(f"A single-file checkpoint must end in .safetensors or .ckpt, but got {path}.")
    try:
        yield
    except MSFPError:
        raise
    except Exception as error:
        if not isinstance(error, _UNREADABLE) and type(error).__name__ != "SafetensorError":
            raise
        raise SourceError(
            f"{path} cannot be loaded as a single-file checkpoint: {first_line(error)} If its configs are not found, "
            f"name a folder with them: `--config DIR`."
        ) from error


_UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, IndexError, UnpicklingError)
"""What diffusers' converters raise on a file that they do not know."""


def _from_single_file(path: Path, config: str | None, **given: Any) -> DiffusionPipeline:
    """The float pipeline in a single file; its class is the one that its configs name.

    Components that the file lacks, such as a VAE, come from the folder with the configs where that has their weights.

    Args:
        **given: components that are there already.
    """
    with reading_single_file(path):
        where = single_file_origin(path) if config is None else config
        index: Any = DiffusionPipeline.load_config(where)
        name = index.get("_class_name")
        cls: Any = getattr(diffusers, str(name), None)
        if not hasattr(cls, "from_single_file"):
            raise SourceError(f"{where} must name a pipeline that loads single files, but got {name}.")
        while True:
            try:
                return cls.from_single_file(str(path), config=where, **given)
            except Exception as error:
                part = single_file_part(error)
                if part is None or part in given:
                    raise
                given[part] = _beside_configs(path, Path(where), part, index[part], given["dtype"])


def _beside_configs(path: Path, folder: Path, name: str, entry: list, dtype: torch.dtype) -> nn.Module:
    """A component that a single file lacks, from a pipeline's folder."""
    if not any(True for _ in (folder / name).glob("*.safetensors")):
        raise SourceError(
            f"{path} must hold all models of its pipeline, but it lacks `{name}`. Name a folder that has the weights "
            f"of {name} beside its config (`--config DIR`), or that of the denoiser alone (`--config DIR/unet`)."
        )
    stderr.print(f"{path} lacks {name}, which is read from {folder / name}.", soft_wrap=True, highlight=False)
    cls = getattr(importlib.import_module(entry[0]), entry[1])
    return cls.from_pretrained(folder / name, dtype=dtype)


def components_on_disk(folder: Path) -> list[Path]:
    """Folders of a pipeline's models."""
    return [p for p in sorted(folder.iterdir()) if p.is_dir() and read_config(p)]


def model_bytes(source: str, model: nn.Module, name: str, variant: str | None = None) -> int:
    """Size of a component's weights as they are stored: of its files, or its share of a single one."""
    place = fetch(source, variant)
    if place.is_file():
        numbers = sum(each.numel() for each in (*model.parameters(), *model.buffers()))
        return round(numbers * (bytes_per_number(place) or cast(ModelMixin, model).dtype.itemsize))
    folder = place / name if name != "." else place
    return file_bytes(folder, variant) or cast(ModelMixin, model).get_memory_footprint()


def denoisers_bytes(source: str, loaded: DiffusionPipeline | ModelMixin, variant: str | None = None) -> int:
    """Size of the weights of all denoisers of a pipeline, or of the model alone."""
    models = {".": loaded} if isinstance(loaded, ModelMixin) else denoisers_of(loaded)
    return sum(model_bytes(source, model, name, variant) for name, model in models.items())


def refuse_quantized(folder: Path) -> None:
    """Refuse what is already quantized; a single file never is."""
    for part in [folder, *(components_on_disk(folder) if folder.is_dir() else ())]:
        method = (read_config(part).get("quantization_config") or {}).get("quant_method")
        if method:
            raise SourceError(f"A float checkpoint is needed, but {part} is already quantized ({method}).")


def loading_in(dtype: str) -> dict[str, torch.dtype]:
    """Arguments for `load_any` by which a checkpoint runs in a dtype.

    Raises:
        ConfigError: it is none of `DTYPES`.
    """
    if dtype not in DTYPES:
        raise ConfigError(f"`dtype` must be one of {', '.join(DTYPES)}, but got {dtype!r}.")
    return {} if dtype == DTYPES[0] else {"dtype": getattr(torch, dtype)}

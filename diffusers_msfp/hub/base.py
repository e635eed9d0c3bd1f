"""What is known of the float model that a checkpoint was made from."""

import re
from pathlib import Path

import yaml
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..checkpoint.describe import read_config
from ..errors import ConfigError
from .layout import MODEL_INDEX, components

TAKEN = ("license", "license_name", "license_link", "pipeline_tag")
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+?)[/\\]snapshots")


def base_of(folder: Path) -> str | None:
    """The Hub id that a checkpoint's configs remember; None where they remember none, or a path."""
    index = read_config(folder, MODEL_INDEX)
    for config in [index, *(read_config(folder / name) for name in components(index))]:
        origin = config.get("_name_or_path")
        if isinstance(origin, str):
            if match := _CACHED.search(origin):
                return f"{match[1]}/{match[2]}"
            if re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", origin) and not Path(origin).exists():
                return origin
    return None


def check_repo_id(name: str, what: str) -> str:
    """Refuse what cannot be a Hub id of the form `user/name`."""
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ConfigError(f"{what} must be a Hub id like `user/name`, but got {name!r}: {error}") from error
    if name.count("/") != 1:
        raise ConfigError(f"{what} must be a Hub id like `user/name`, but got {name!r}.")
    return name


def card_of(api: HfApi, base_model: str) -> dict:
    """What the base's card says of licence and task; empty where it has no card or the Hub cannot be reached.

    Raises:
        ConfigError: there is no such repository.
    """
    try:
        data = ModelCard.load(api.hf_hub_download(base_model, "README.md")).data.to_dict()
    except GatedRepoError:
        return {}
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"The base must be a repository on the Hub, but {base_model} is not, or it is private and needs another "
            f"token. Name it with `base_model` (`--base-model`)."
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError, yaml.YAMLError):
        return {}
    return {key: data[key] for key in TAKEN if isinstance(data.get(key), str)}

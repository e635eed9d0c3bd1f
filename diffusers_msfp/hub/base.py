"""What is known of the float model that a checkpoint was made from."""

import re
from collections.abc import Mapping
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
FLOAT_BASE = "float_base"
_CACHED = re.compile(r"models--([\w.-]+?)--([\w.-]+?)[/\\]snapshots")


NO_BASE = "none"
_ON_THE_HUB = re.compile(r"https?://(?:www\.)?huggingface\.co/([\w.-]+/[\w.-]+)/?")
_URL = re.compile(r"https?://[^\s<>()\[\]\"]+")


def named_base(name: str | None) -> tuple[str | None, str | None]:
    """What the user says of the base: its Hub id, and where it lies if it is not on the Hub.

    Args:
        name (`str`, *optional*): a Hub id, a URL, or `none`; the URL of a model on the Hub counts as its id.

    Returns:
        `tuple`: Hub id, if it has one; else the URL, or `none`. Both None where nothing is said.

    Raises:
        ConfigError: it is none of them.
    """
    if name is None:
        return None, None
    if name == NO_BASE:
        return None, NO_BASE
    if found := _ON_THE_HUB.fullmatch(name):
        return found[1], None
    if _URL.fullmatch(name):
        return None, name
    if name.startswith(("http://", "https://")):
        raise ConfigError(f"The URL of a base must have no blanks, brackets or quotes, but got {name!r}.")
    return check_repo_id(name, "`base_model`"), None


def require_base(origin: Mapping[str, str | None]) -> None:
    """Refuse an origin without a base.

    Args:
        origin (`Mapping`): see `prepare`.

    Raises:
        ConfigError: nothing is said of it.
    """
    if not (origin.get("base_model") or origin.get("base_elsewhere")):
        raise ConfigError(
            "A card must name the model that was quantized, but none is known: pass `--base-model` with its Hub id, "
            "its URL, or `none` if it is not public."
        )


def require_license(origin: Mapping[str, str | None], folder: Path) -> None:
    """Refuse an origin without a licence that the Hub knows.

    Args:
        origin (`Mapping`): see `prepare`.
        folder (`Path`): the checkpoint, which may hold the text of another one.

    Raises:
        ConfigError: none is known, it is no identifier, or it has no text.
    """
    name, base = origin.get("license"), origin.get("base_model")
    if not name:
        reason = f"the card of {base} does not, or cannot be read" if base else "there is no base on the Hub to ask"
        raise ConfigError(
            f"A card must say the licence, but {reason}: pass `--license ID`, like `apache-2.0`, or `other` with the "
            f"text in the checkpoint's file LICENSE."
        )
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise ConfigError(f"A licence must be one of the Hub's identifiers, like `apache-2.0`, but got {name!r}.")
    if name == "other" and not origin.get("license_name") and not (folder / "LICENSE").is_file():
        raise ConfigError(f"The licence `other` must come with its text, but {folder} has no file LICENSE.")


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


def on_the_hub(repo: str) -> str:
    """Where the files of a repository's main branch are."""
    return f"https://huggingface.co/{repo}/blob/main"


def link_from(link: str, where: str) -> str:
    """A card's link, which may be to a file beside the card, from elsewhere."""
    return link if "://" in link else f"{where}/{link}"


def card_of(api: HfApi, base_model: str) -> dict:
    """What the base's card says of licence and task; empty where it has no card or the Hub cannot be reached.

    Of a quantized model also what that was made from, as `FLOAT_BASE`; None where its card does not say.

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
            f"token. Name it with `base_model` (`--base-model`): a Hub id, a URL, or `none`."
        ) from error
    except (EntryNotFoundError, HfHubHTTPError, OSError, ValueError, yaml.YAMLError):
        return {}
    known = {key: data[key] for key in TAKEN if isinstance(data.get(key), str)}
    if "license_link" in known:
        known["license_link"] = link_from(known["license_link"], on_the_hub(base_model))
    if data.get("base_model_relation") == "quantized" or "msfp" in (data.get("tags") or ()):
        base = data.get("base_model")
        base = next(iter(base), None) if isinstance(base, list) else base
        known[FLOAT_BASE] = base if isinstance(base, str) and base.count("/") == 1 else None
    return known


def float_base(api: HfApi, base_model: str | None, known: dict) -> tuple[str | None, dict]:
    """What a quantized base was made from, over as many quantized ones as there are, and what its card says.

    Args:
        base_model (`str`, *optional*), known (`dict`): where to begin, see `card_of`.

    Returns:
        `tuple`: its Hub id, None where a card does not say; `card_of` it.
    """
    passed = set()
    while base_model is not None and FLOAT_BASE in known:
        passed.add(base_model)
        base_model = None if known[FLOAT_BASE] in passed else known[FLOAT_BASE]
        known = card_of(api, base_model) if base_model else {}
    return base_model, known

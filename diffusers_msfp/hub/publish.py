"""`publish`: check a checkpoint, write its card, upload it in one commit, compare what arrived.

One commit, not the client's `upload_folder`: that one commits large folders in parts, and an interrupted upload would
leave a repository that looks complete. Contents travel before the commit and are kept by the Hub, so a second try
sends only what is missing.
"""

import hashlib
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.hf_api import RepoFile

from ..errors import ConfigError, HubError, MSFPError
from ..outputs import named, overlap, refuse_repository, require_writable, writing
from ..results import OPTIONAL, OnProgress, Result
from .base import FLOAT_BASE, base_of, card_of, check_repo_id, float_base, named_base, require_base, require_license
from .checks import all_at_once
from .layout import Files, components, pipeline_index
from .prepare import prepare
from .results import read_results

_BLOCK = 2**20


@dataclass(frozen=True, kw_only=True)
class Published(Result):
    """What `publish` did, or would do.

    Args:
        repo, base_model, license, snippet (`str`): Hub id; of the card; the lines that load it.
        files (`Mapping[str, int]`): path in the repository → bytes.
        left_out (`Sequence[str]`): files of the folder that are not published.
        missing (`Mapping[str, str]`): what was not measured → the command that measures it.
        out (`str`, *optional*): where a dry run wrote.
        commit, url (`str`, *optional*), removed (`Sequence[str]`, *optional*): of an upload; weights and configs of an
            earlier version that are no longer there.
    """

    repo: str
    base_model: str
    license: str
    files: Mapping[str, int]
    left_out: Sequence[str]
    missing: Mapping[str, str]
    snippet: str
    out: str | None = field(default=None, metadata=OPTIONAL)
    commit: str | None = field(default=None, metadata=OPTIONAL)
    url: str | None = field(default=None, metadata=OPTIONAL)
    removed: Sequence[str] | None = field(default=None, metadata=OPTIONAL)


def publish(
    folder: str | Path,
    repo: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    private: bool = False,
    revision: str | None = None,
    variant: str | None = None,
    create_pr: bool = False,
    dry_run: bool | str | Path | None = None,
    results: Iterable[str | Path] = (),
    prompts: list[str] | None = None,
    num_samples: int = 8,
    num_inference_steps: int = 20,
    seed: int = 0,
    token: str | None = None,
    endpoint: str | None = None,
    on_progress: OnProgress | None = None,
) -> Published:
    """Publish a quantized pipeline on the Hub; nothing in its folder is changed.

    Args:
        folder (`str` or `Path`): a calibrated pipeline as `save_pretrained` or `diffusers-msfp quantize` wrote it.
            Results of `evaluate`, `compare` and `bench` are found in its `results/*.json` and where `evaluate` puts
            them.
        repo (`str`): Hub id, `user/name`; made if it does not exist.
        license (`str`, *optional*): its identifier; by default what the base's card says.
        base_model (`str`, *optional*): Hub id of the float model, by default what the checkpoint's configs say; of one
            that is not on the Hub its URL, which the card links to, or `"none"`. The card's metadata name a base on the
            Hub only.
        private (`bool`): make a private repository; a public one that exists already is refused.
        revision (`str`, *optional*): branch, made if it does not exist.
        variant (`str`, *optional*): that is sampled and named on the card; all that are there are published.
        create_pr (`bool`): open a pull request instead of committing.
        dry_run (`bool`, `str` or `Path`, *optional*): write there what would be uploaded, and stop; True for
            `<folder>-publish`.
        results (`Iterable`): more results files.
        prompts, num_samples, num_inference_steps, seed: of the card's samples.
        token (`str`, *optional*): of the Hub, by default the one that is logged in.
        endpoint (`str`, *optional*): another Hub than the client's.
        on_progress (`OnProgress`, *optional*): called with (done, total) after each denoising step.

    Returns:
        `Published`.

    Raises:
        CheckpointError: the checkpoint does not load, does not sample, or holds what should not be published.
        ConfigError: licence or base are not known, arguments contradict each other, or a dry run cannot be written.
        HubError: the Hub refused, was not reached, or holds other bytes than were sent.

    Example:
        ```py
        publish("model-w4a4", "user/model-w4a4", dry_run=True)  # writes model-w4a4-publish
        ```
    """
    folder, more = named(Path(folder)), [Path(path) for path in results]
    api = HfApi(endpoint=endpoint, token=token)
    origin: dict[str, str | None] = {"license": license, "base_elsewhere": None}

    target = None
    if dry_run:
        target = folder.with_name(f"{folder.name}-publish") if dry_run is True else Path(dry_run)
        _check_target(target, folder)

    def check_arguments() -> None:
        check_repo_id(repo, "`repo`")
        if create_pr and revision:
            raise ConfigError(f"A pull request goes to main, but got `revision={revision!r}` too. Leave it out.")

    def find_origin() -> None:
        origin["base_model"], origin["base_elsewhere"] = named_base(base_model)
        if not origin["base_elsewhere"]:
            origin["base_model"] = origin["base_model"] or base_of(folder)
        known = card_of(api, origin["base_model"]) if origin["base_model"] else {}
        if base_model is None and FLOAT_BASE in known:  # fused or fine-tuned from a quantized one
            origin["base_model"], known = float_base(api, origin["base_model"], known)
        known.pop(FLOAT_BASE, None)
        if license and license != known.get("license"):
            known = {key: value for key, value in known.items() if not key.startswith("license")} | {"license": license}
        origin.update(known)
        require_base(origin)

    all_at_once(
        check_arguments,
        lambda: pipeline_index(folder),
        find_origin,
        lambda: require_license(origin, folder),
        lambda: read_results(folder, more),
    )
    index = pipeline_index(folder)
    prepared = prepare(
        folder,
        repo,
        origin,
        revision=revision,
        variant=variant,
        results=more,
        num_samples=num_samples,
        num_inference_steps=num_inference_steps,
        seed=seed,
        prompts=prompts,
        on_progress=on_progress,
    )
    report: dict[str, Any] = {
        "repo": repo,
        "base_model": origin["base_model"] or origin["base_elsewhere"],
        "license": origin["license"],
        "files": {location: _size(source) for location, source in prepared.files.items()},
        "left_out": prepared.left_out,
        "missing": prepared.missing,
        "snippet": prepared.snippet,
    }
    if target is not None:
        return Published(**report, out=str(_write(prepared.files, target)))
    try:
        return Published(
            **report, **_upload(api, repo, prepared.files, set(components(index)), private, revision, create_pr)
        )
    except MSFPError:
        raise
    except Exception as error:  # noqa: BLE001 – what the client's transport raises differs by its version
        raise HubError(
            f"{repo} must be reachable and writable, but: {_reason(error)}. It holds all of this version or nothing of "
            f"it; what was sent is kept, and the same command goes on."
        ) from error


def _upload(
    api: HfApi, repo: str, files: Files, owned: set[str], private: bool, revision: str | None, create_pr: bool
) -> dict:
    """One commit on top of what is there, compared afterwards."""
    api.create_repo(repo, private=private, exist_ok=True)
    if private and not api.model_info(repo).private:
        raise ConfigError(f"`private` must come true, but {repo} exists and is public. Make it private on the Hub.")
    if revision:
        api.create_branch(repo, branch=revision, exist_ok=True)
    parent = api.model_info(repo, revision=revision).sha
    stale = sorted(p for p in _tree(api, repo, parent) if p.partition("/")[0] in owned and p not in files)
    operations = [CommitOperationAdd(location, source) for location, source in files.items()]
    commit: CommitInfo = api.create_commit(
        repo,
        [*operations, *(CommitOperationDelete(location) for location in stale)],
        commit_message="Publish an MSFP-quantized checkpoint",
        revision=revision,
        create_pr=create_pr,
        parent_commit=parent,
    )
    verify(api, repo, commit.oid, files)
    return {"commit": commit.oid, "url": commit.pr_url or commit.commit_url, "removed": stale}


def verify(api: HfApi, repo: str, revision: str, files: Files) -> None:
    """Compare sizes and hashes that the Hub computed with those of the files.

    Raises:
        HubError: they differ, or a file is missing.
    """
    tree = _tree(api, repo, revision)
    for location, source in files.items():
        there = tree.get(location)
        size = _size(source)
        if there is None or there.size != size:
            what = f"{there.size} bytes" if there else "nothing"
            raise HubError(f"{location} of {repo} must have {size} bytes at {revision}, but it has {what}.")
        kept, expected = (there.lfs.sha256, _sha256(source)) if there.lfs else (there.blob_id, _git_hash(source))
        if kept != expected:
            raise HubError(f"{location} of {repo} must hash to {expected} at {revision}, but it is {kept}.")


def _reason(error: Exception) -> str:
    """What the client says, and what it says was the cause, each line once."""
    chain = [error, error.__cause__] if error.__cause__ else [error]
    lines = [line.strip(" .:") for one in chain for line in (str(one).strip() or type(one).__name__).splitlines()]
    return ": ".join(dict.fromkeys(line for line in lines if line and not line.startswith("For more information")))


def _tree(api: HfApi, repo: str, revision: str | None) -> dict[str, RepoFile]:
    entries = api.list_repo_tree(repo, recursive=True, revision=revision)
    return {entry.path: entry for entry in entries if isinstance(entry, RepoFile)}


def _blocks(source: Path | bytes) -> Iterable[bytes]:
    if isinstance(source, bytes):
        yield source
        return
    with open(source, "rb") as file:
        while block := file.read(_BLOCK):
            yield block


def _size(source: Path | bytes) -> int:
    return len(source) if isinstance(source, bytes) else source.stat().st_size


def _hash(digest: Any, source: Path | bytes) -> str:
    for block in _blocks(source):
        digest.update(block)
    return digest.hexdigest()


def _sha256(source: Path | bytes) -> str:
    return _hash(hashlib.sha256(), source)


def _git_hash(source: Path | bytes) -> str:
    return _hash(hashlib.sha1(b"blob %d\0" % _size(source), usedforsecurity=False), source)


def _check_target(out: Path, folder: Path) -> None:
    """Refuse a dry run where something else lies, or nothing can be written."""
    if out.exists() and not all((out / name).is_file() for name in ("README.md", "pipeline.py")):
        raise ConfigError(f"{out} must be new or hold an earlier dry run, but it holds something else. Remove it.")
    refuse_repository(out, "A dry run")
    if overlap(out, folder):
        raise ConfigError(f"A dry run must be written beside {folder}, but got {out}. Name another folder.")
    require_writable(out)


def _write(files: Files, out: Path) -> Path:
    """All files in a folder, complete or not at all; an earlier dry run there is replaced."""
    with writing(out):
        _write_all(files, out)
    return out


def _write_all(files: Files, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}-", suffix=".part") as scratch:
        made = Path(scratch) / "made"
        for location, source in files.items():
            target = made / location
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source) if isinstance(source, bytes) else shutil.copyfile(source, target)
        if out.exists():
            out.rename(Path(scratch) / "old")
        made.rename(out)

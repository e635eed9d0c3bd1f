"""What every benchmark shares: result rows with their origin, and where they are kept."""

import json
import platform
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import diffusers
import torch
from filelock import FileLock

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "model_cards" / "results"
SOURCES = ("diffusers_msfp", "tests")
"""What a result depends on."""


def _git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


CODE = {
    "git": _git("rev-parse", "--short", "HEAD"),
    "dirty": bool(_git("status", "--porcelain", "--", *SOURCES)),
}
"""The commit that this process runs; others may be made while it does."""


def origin() -> dict:
    """Machine, versions and commit of a result."""
    return {
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        **CODE,
    }


def of_this_code(folder: Path) -> Path:
    """Where a folder keeps what this code has made: another commit, or other changes to one, may make something else.

    Read it once, when a program starts.
    """
    changes = zlib.crc32(_git("diff", "HEAD", "--", *SOURCES).encode())
    for name in _git("ls-files", "--others", "--exclude-standard", "--full-name", "--", *SOURCES).splitlines():
        changes = zlib.crc32(name.encode() + (ROOT / name).read_bytes(), changes)  # `diff` does not know these
    return folder / (f"{CODE['git']}-{changes:08x}" if CODE["dirty"] else CODE["git"])


def write_results(name: str, command: str, rows: list[dict]) -> None:
    """Write `model_cards/results/<name>.json`; each row has the commit that it was made at, `git`."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    now = origin()
    old = read_results(name) if (RESULTS / f"{name}.json").exists() else {"rows": []}
    stamped = [{**row, "git": row.get("git") or (old["origin"] if row in old["rows"] else now)["git"]} for row in rows]
    content = {"command": command, "origin": now, "rows": stamped}
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def read_results(name: str) -> dict:
    """Read what `write_results` wrote."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def has_amx(row: dict) -> bool:
    """Whether a row with times is of a processor with AMX; older rows, which do not say, are not."""
    return "amx_int8" in row.get("instruction_sets", ())


def grouped(results: str, key: str) -> dict[str, list[dict]]:
    """The rows of a results file by their value under `key`."""
    groups = {}
    for row in read_results(results)["rows"]:
        groups.setdefault(row[key], []).append(row)
    return groups


def locked(name: str) -> FileLock:
    """Holds a results file for one of several processes."""
    return FileLock(Path(tempfile.gettempdir()) / f"{name}.lock")


def keep_rows(
    name: str,
    command: str,
    rows: Sequence[dict],
    by: Sequence[str],
    order: Callable[[dict], Any] | None = None,
    stays: Callable[[dict], bool] = lambda _row: True,
) -> None:
    """Put rows into a results file in the place of those that are equal to one of them under the keys `by`.

    Of the others those stay for which `stays` is true: what is compared may not be mixed.

    Several processes may share the work.
    """
    with locked(name):
        old = read_results(name)["rows"] if (RESULTS / f"{name}.json").exists() else []
        made = [[row.get(key) for key in by] for row in rows]
        kept = [row for row in old if [row.get(key) for key in by] not in made and stays(row)] + [*rows]
        write_results(name, command, kept if order is None else sorted(kept, key=order))

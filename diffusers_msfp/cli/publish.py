"""`publish`: a quantized checkpoint on the Hub, with its card."""

from pathlib import Path
from typing import Any

from .. import hub
from .shared.interrupts import NOTHING, keeping
from .shared.terminal import progress


def publish(source: str | Path, repo: str, **arguments: Any) -> hub.Published:
    """Publish a checkpoint and show how far its samples are; arguments and result as of `hub.publish`."""
    kept = f"{repo} holds all of this version or nothing of it, and the same command sends what is missing"
    with keeping(NOTHING if arguments.get("dry_run") else kept), progress("loading and sampling") as report:
        return hub.publish(source, repo, **arguments, on_progress=report)

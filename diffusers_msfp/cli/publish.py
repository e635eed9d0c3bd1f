"""`publish`: a quantized checkpoint on the Hub, with its card."""

from pathlib import Path

from .. import hub
from .terminal import progress


def publish(source: str | Path, repo: str, **arguments) -> dict:
    """Publish a checkpoint and show how far its samples are; arguments and result as of `hub.publish`."""
    with progress("loading and sampling") as report:
        return hub.publish(source, repo, **arguments, on_step=report)

"""`inspect` and `convert-checkpoint`: what a quantized checkpoint holds; an older one as the present format version."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..budget.record import BudgetPlan, stored_plan
from ..checkpoint.describe import CheckpointDescription, describe_checkpoint
from ..errors import ConfigError
from ..plugin.config import FORMAT_VERSION
from ..plugin.files.migrate import migrate, outdated_components
from ..results import Result
from .shared.load import require_variant, variant_of
from .shared.store import publish


@dataclass(frozen=True, kw_only=True)
class ConvertedCheckpoint(Result):
    """What `convert_checkpoint` did.

    Args:
        format_version (`int`): of all components now.
        converted, already (`Sequence[str]`): components that were raised, and that had it; `.` is the folder itself.
        out (`str`): the folder.
    """

    format_version: int
    converted: Sequence[str]
    already: Sequence[str]
    out: str


def convert_checkpoint(source: str | Path) -> ConvertedCheckpoint:
    """Raise a pipeline's or model's folder to the present format version, in place, completely or not at all.

    Every tensor keeps its bits. The new folder grows beside the old one, is loaded, and takes its place.

    Args:
        source (`str` or `Path`): the folder.

    Raises:
        MSFPError: no quantized checkpoint, a damaged or newer one, or links instead of files; nothing is changed.
    """
    folder = Path(source).absolute()
    if not folder.is_dir():
        raise ConfigError(f"A checkpoint to convert must be a folder, but {source} is none. Download it first.")
    old, already = outdated_components(folder)
    if old:
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-", suffix=".part") as scratch:
            made = Path(scratch) / "made"
            migrate(folder, old, made)
            publish(made, folder)
    return ConvertedCheckpoint(format_version=FORMAT_VERSION, converted=old, already=already, out=str(folder))


@dataclass(frozen=True, kw_only=True)
class InspectedCheckpoint(CheckpointDescription):
    """What `inspect` found.

    Args:
        plan (`BudgetPlan`, *optional*): by which bits and formats were chosen, where it lies in the folder.
    """

    plan: BudgetPlan | None

    def to_dict(self) -> dict[str, Any]:
        """Component → its description; of the planned one also `why`, layer → reason."""
        found = super().to_dict()
        if self.plan is not None and self.plan.component in found:
            found[self.plan.component]["why"] = self.plan.reasons
        return found


def inspect(source: str | Path, *, variant: str | None = None) -> InspectedCheckpoint:
    """Layers of a quantized checkpoint, with the weights of a variant where it has that; see `describe_checkpoint`."""
    require_variant(variant, source)
    found = describe_checkpoint(source, variant_of(source, variant))
    return InspectedCheckpoint(**vars(found), plan=stored_plan(source))

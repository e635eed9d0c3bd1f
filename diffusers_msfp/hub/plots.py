"""The card's pictures of figures: error over the timesteps, and which adapter serves which of them."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from ..errors import SEE_DOCTOR, UnsupportedError


def plot_timesteps(errors: Mapping[str, float]) -> bytes:
    """PNG of the denoiser's relative error; timestep → error."""
    figure, axes = _axes(3.2)
    timesteps = sorted(errors, key=float)
    axes.plot([float(t) for t in timesteps], [errors[t] for t in timesteps], marker=".")
    axes.set(yscale="log", xlabel="timestep (noise on the left, image on the right)", ylabel="relative error of ε")
    axes.invert_xaxis()
    axes.grid(alpha=0.3, which="both")
    return _png(figure)


def plot_router(intervals: Sequence[Sequence[tuple[int, int, int]]], num_adapters: int) -> bytes:
    """PNG with a bar for each layer group.

    Args:
        intervals: `[group][(first timestep, last timestep, adapter), …]`.
        num_adapters (`int`): for the legend; those that serve no timestep are in it too.
    """
    figure, axes = _axes(1.1 + 0.35 * len(intervals))
    for group, runs in enumerate(intervals):
        for first, last, adapter in runs:
            axes.barh(group, last - first + 1, left=first, color=f"C{adapter % 10}", edgecolor="white", linewidth=0.5)
    for adapter in range(num_adapters):
        axes.barh(0, 0, color=f"C{adapter % 10}", label=f"adapter {adapter}")
    axes.set_yticks(range(len(intervals)), [f"group {group}" for group in range(len(intervals))])
    axes.set(xlabel="timestep (noise on the left, image on the right)", xlim=(intervals[0][-1][1] + 1, 0))
    axes.legend(ncols=min(4, num_adapters), fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), frameon=False)
    return _png(figure)


def _axes(height: float) -> Any:
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UnsupportedError(
            'A card\'s plots need matplotlib, which is not installed: `pip install "diffusers-msfp[eval]"`. '
            f"{SEE_DOCTOR}"
        ) from error
    figure = Figure(figsize=(7, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure: Any) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=100, metadata={"Software": None})
    return file.getvalue()

"""What the page shows besides Gradio's components: enlarged pictures, figures as a table, adapters as a strip."""

from collections.abc import Sequence
from html import escape

import numpy as np
from PIL import Image

from .denoise import Step

SHOWN_SIZE = 512  # smaller pictures are enlarged to about this, in pixels
COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")  # Okabe and Ito's


STOPPED = '<p class="msfp-progress" role="status">Stopped.</p>'


def names_line(left: str, right: str) -> str:
    """Which side of the slider is which."""
    return f'<div class="msfp-names"><span>◀ {escape(left)}</span><span>{escape(right)} ▶</span></div>'


def enlarge(picture: np.ndarray, size: int = SHOWN_SIZE) -> Image.Image:
    """A picture `(H, W, 1 or 3)` in [0, 1], each pixel a square of whole pixels."""
    pixels = (np.clip(picture, 0, 1) * 255).round().astype(np.uint8)
    factor = max(1, size // max(pixels.shape[:2]))
    pixels = np.broadcast_to(pixels, (*pixels.shape[:2], 3)).repeat(factor, 0).repeat(factor, 1)
    return Image.fromarray(pixels)


def beside(pictures: Sequence[np.ndarray]) -> Image.Image:
    """Pictures in a row, for the gallery."""
    images = [enlarge(picture, SHOWN_SIZE // 2) for picture in pictures]
    gap = max(2, images[0].width // 64)
    sheet = Image.new(
        "RGB", (sum(image.width for image in images) + gap * (len(images) - 1), images[0].height), "white"
    )
    for index, image in enumerate(images):
        sheet.paste(image, (index * (image.width + gap), 0))
    return sheet


def figures_table(columns: Sequence[tuple[str, float, float, float | None]]) -> str:
    """Weights, memory and time of a step of one or two models.

    Args:
        columns (`Sequence[tuple[str, float, float, float | None]]`): name, bytes of weights, bytes in memory, seconds
            of a step; None where it is not known yet. With two, the second is compared with the first.
    """
    units = (("Weights", 1e6, "MB"), ("Memory", 1e6, "MB"), ("Time per step", 1e-3, "ms"))
    names, *figures = zip(*columns, strict=True)
    rows = []
    for (title, unit, name), values in zip(units, figures, strict=True):
        cells = "".join(f"<td>{'–' if v is None else f'{_figure(v / unit)} {name}'}</td>" for v in values)
        if len(values) == 2:
            cells += f"<td>{'–' if None in values else _ratio(*values)}</td>"
        rows.append(f'<tr><th scope="row">{title}</th>{cells}</tr>')
    heads = "".join(f'<th scope="col">{escape(name)}</th>' for name in names)
    heads += '<th scope="col"></th>' if len(columns) == 2 else ""
    return (
        f'<table class="msfp-figures"><thead><tr><td></td>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
        f'<p class="msfp-note">The denoiser as it is loaded here, one picture at a time. Memory counts what is kept '
        f"ready for the processor, not the passing results of layers.</p>"
    )


def _figure(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def _ratio(before: float, after: float) -> str:
    """How many times smaller or shorter."""
    ratio = max(before, after) / min(before, after)
    return "equal" if ratio < 1.05 else f"{ratio:.1f}× {'less' if after < before else 'more'}"


def adapter_at(intervals: Sequence[tuple[int, int, int]], timestep: float) -> int:
    """The adapter that serves a timestep; continuous ones take the nearest."""
    last = intervals[-1][1]
    nearest = min(max(round(timestep), 0), last)
    return next(adapter for first, end, adapter in intervals if first <= nearest <= end)


def adapter_strip(groups: Sequence[Sequence[tuple[int, int, int]]], visited: Sequence[float] = ()) -> str:
    """Which adapter serves which timesteps, from noise to picture, and the timesteps of the running trajectory.

    Args:
        groups (`Sequence[Sequence[tuple[int, int, int]]]`): intervals of each layer group, as `RoutingTable` has them.
        visited (`Sequence[float]`): timesteps so far, the current one last.
    """
    bars = []
    for group, intervals in enumerate(groups):
        total = intervals[-1][1] + 1
        parts = [f"adapter {a} for timesteps {last} to {first}" for first, last, a in reversed(intervals)]
        shapes = [
            f'<rect x="{_x(last, total)}" y="6" width="{(last - first + 1) / total * 1000:.2f}" height="18" '
            f'fill="{COLORS[adapter % len(COLORS)]}"/>'
            for first, last, adapter in intervals
        ]
        shapes += [f'<rect x="{_x(t, total)}" y="2" width="1.5" height="26" class="tick"/>' for t in visited]
        shapes += [f'<rect x="{_x(t, total, -2.5)}" y="0" width="6" height="30" class="now"/>' for t in visited[-1:]]
        title = f"Layer group {group + 1}: " if len(groups) > 1 else ""
        bars.append(
            f'<svg viewBox="0 0 1000 30" preserveAspectRatio="none" role="img" '
            f'aria-label="{title}{", ".join(parts)}">{"".join(shapes)}</svg>'
        )
    used = sorted({adapter for intervals in groups for _, _, adapter in intervals})
    now = {adapter_at(intervals, visited[-1]) for intervals in groups} if visited else set()
    legend = "".join(
        f'<span class="{"active" if adapter in now else ""}"><i style="background:{COLORS[adapter % len(COLORS)]}"></i>'
        f"adapter {adapter}</span>"
        for adapter in used
    )
    noise = groups[0][-1][1]
    return (
        f'<div class="msfp-strip"><div class="ends"><span>noise, t = {noise}</span><span>picture, t = 0</span></div>'
        f'{"".join(bars)}<div class="legend">{legend}</div></div>'
    )


def _x(timestep: float, total: int, shift: float = 0) -> str:
    return f"{(total - 1 - timestep) / total * 1000 + shift:.2f}"


def progress_line(step: Step | None = None, adapters: Sequence[int] = (), closeness: float | None = None) -> str:
    """Where the run stands.

    Args:
        step (`Step`, *optional*): None before the first.
        adapters (`Sequence[int]`): in use, one for each layer group.
        closeness (`float`, *optional*): PSNR of the two results in decibels.
    """
    if step is None:
        return '<p class="msfp-progress">Press <b>Generate</b>.</p>'
    if step.finished:
        told = f"Done: {step.total} steps"
        told += "" if closeness is None else f" · the two pictures agree to {closeness:.1f} dB PSNR"
    else:
        told = f"Step {step.index} of {step.total} · timestep {step.timestep:.0f}"
        told += f" · adapter {', '.join(map(str, adapters))}" if adapters else ""
    share = 100 if step.finished else 100 * step.index / step.total
    role = ' role="status"' if step.finished else ""  # read out once, not at every step
    return (
        f'<p class="msfp-progress"{role}>{told}</p>'
        f'<div class="msfp-bar" aria-hidden="true"><div style="width:{share:.1f}%"></div></div>'
    )

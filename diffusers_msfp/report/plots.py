"""Figures of a report as inline SVG; colours come from the page's style sheet, so that they follow light and dark.

Timesteps run from noise on the left to the image on the right.
"""

import math
from collections.abc import Mapping, Sequence
from typing import cast

from markupsafe import Markup

SHADES = 16
"""Colours of the heat map; 0 is the worst."""


def tag(name: str, *children: object, **attributes: object) -> Markup:
    """An element; text and attributes are escaped. `cls` stands for `class`, `_` in a name for `-`."""
    names = {key: "class" if key == "cls" else key.replace("_", "-") for key in attributes}
    written = Markup("").join(Markup(' {}="{}"').format(names[key], value) for key, value in attributes.items())
    inner = Markup("").join(cast("tuple[str, ...]", children))
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), written, inner)


def _svg(width: float, height: float, label: str, *children: Markup, **attributes: object) -> Markup:
    box = f"0 0 {width:g} {height:g}"
    return tag("svg", tag("title", label), *children, viewBox=box, role="img", aria_label=label, **attributes)


def _path(points: Sequence[tuple[float, float]]) -> str:
    return "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)


def error_curve(by_timestep: Mapping[str, float]) -> Markup:
    """Relative error of the predicted noise over timesteps, logarithmic.

    Args:
        by_timestep (`Mapping[str, float]`): see `compare_pipelines`; zeros are not drawn.
    """
    width, height, left, right, top, bottom = 520, 270, 52, 12, 14, 40
    values = {float(t): value for t, value in by_timestep.items() if value > 0}
    if not values:
        return Markup("")
    last, low, high = max(*values, 1.0), min(values.values()), max(values.values())
    floor = math.floor(math.log10(low) + 1e-9)
    ceiling = max(math.ceil(math.log10(high) - 1e-9), floor + 1)

    def x(timestep: float) -> float:
        return left + (1 - timestep / last) * (width - left - right)

    def y(value: float) -> float:
        return top + (ceiling - math.log10(value)) / (ceiling - floor) * (height - top - bottom)

    marks = []
    for decade in range(floor, ceiling + 1):
        for factor in (1, 2, 5) if decade < ceiling else (1,):
            value = factor * 10.0**decade
            marks.append(tag("path", cls="grid", d=f"M{left} {y(value):.1f}H{width - right}"))
            marks.append(tag("text", f"{100 * value:g} %", x=left - 7, y=f"{y(value) + 4:.1f}", text_anchor="end"))
    for timestep in _round_numbers(last):
        marks.append(tag("text", f"{timestep:g}", x=f"{x(timestep):.1f}", y=height - bottom + 18, text_anchor="middle"))
    marks.append(
        tag("text", "timestep: noise → image", x=(left + width - right) / 2, y=height - 4, text_anchor="middle")
    )
    points = [(x(t), y(v)) for t, v in values.items()]
    dots = [
        tag("circle", tag("title", f"t = {t:g}: {100 * v:.3g} %"), cls="dot", cx=f"{x(t):.1f}", cy=f"{y(v):.1f}", r=3.5)
        for t, v in values.items()
    ]
    line = tag("path", cls="line", d=_path(points))
    return _svg(width, height, "relative error of the predicted noise over timesteps", *marks, line, *dots, cls="chart")


def front_chart(front: Sequence[Mapping], chosen_bytes: int, chosen_error: float) -> Markup:
    """The front of a plan: predicted error of the output over bytes of the file, and what was chosen.

    Args:
        front (`Sequence[Mapping]`): `bytes` and `error` of each point, see `FrontPoint`.
        chosen_bytes (`int`), chosen_error (`float`): of the plan.
    """
    width, height, left, right, top, bottom = 520, 280, 58, 16, 32, 40
    points = [(point["bytes"], point["error"]) for point in front if point["error"] > 0]
    if not points or chosen_error <= 0:
        return Markup("")
    sizes, errors = [*(size for size, _ in points), chosen_bytes], [*(error for _, error in points), chosen_error]
    first, last = min(sizes), max(max(sizes), min(sizes) + 1)
    floor, ceiling = math.log10(min(errors)) - 0.05, math.log10(max(errors)) + 0.05

    def at(size: float, error: float) -> tuple[float, float]:
        x = left + (size - first) / (last - first) * (width - left - right)
        return x, top + (ceiling - math.log10(error)) / (ceiling - floor) * (height - top - bottom)

    marks = []
    for decade in range(math.floor(floor), math.ceil(ceiling) + 1):
        for value in (factor * 10.0**decade for factor in (1, 2, 3, 5)):
            if floor <= math.log10(value) <= ceiling:
                y = at(first, value)[1]
                marks.append(tag("path", cls="grid", d=f"M{left} {y:.1f}H{width - right}"))
                marks.append(tag("text", f"{100 * value:g} %", x=left - 7, y=f"{y + 4:.1f}", text_anchor="end"))
    for share in (0, 0.5, 1):
        size = first + share * (last - first)
        anchor = ("start", "middle", "end")[int(2 * share)]
        place = {"x": f"{at(size, errors[0])[0]:.1f}", "y": height - bottom + 18, "text_anchor": anchor}
        marks.append(tag("text", f"{size / 1e6:.3g} MB", **place))
    marks.append(tag("text", "size of the file", x=(left + width - right) / 2, y=height - 4, text_anchor="middle"))
    marks.append(tag("text", "error of the output (traj_rel_l2)", x=left - 50, y=14))
    line = tag("path", cls="line", d=_path([at(*point) for point in points]))
    x, y = at(chosen_bytes, chosen_error)
    words = tag("title", f"chosen: {chosen_bytes:,} bytes, {100 * chosen_error:.3g} %")
    dot = tag("circle", words, cls="dot", cx=f"{x:.1f}", cy=f"{y:.1f}", r=6)
    return _svg(width, height, "error of the output over the size of the file", *marks, line, dot, cls="chart")


def _round_numbers(last: float) -> list[float]:
    """Three to six of them from 0 on."""
    power = 10 ** math.floor(math.log10(last / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5 >= last)
    return [index * step for index in range(int(last / step) + 1)]


def histogram(name: str, seen: Mapping, signed: bool | None) -> Markup:
    """A layer's input: how often which value came (square root of the count), and the values of its grid as ticks.

    Args:
        name (`str`): of the layer.
        seen (`Mapping`): `input` of `layer_rows`.
        signed (`bool`, *optional*): of the grid; None for a float input.
    """
    width, body, tick = 180, 52, 9
    low, high = seen["bins"]
    span = (high - low) or 1.0
    most = math.sqrt(max(max(seen["counts"]), 1))
    step = width / len(seen["counts"])
    outline = [(0.0, float(body))]
    for index, count in enumerate(seen["counts"]):
        y = body * (1 - math.sqrt(count) / most)
        outline += [(index * step, y), ((index + 1) * step, y)]
    parts = [tag("path", cls="bars", d=_path([*outline, (width, body)]) + "Z")]
    kind = "float" if signed is None else "signed" if signed else "unsigned"
    height = body
    for levels in seen["levels"]:
        marks = "".join(f"M{(level - low) / span * width:.1f} {height + 2}v{tick}" for level in levels)
        parts.append(tag("path", cls=f"ticks {kind}", d=marks))
        height += tick + 3
    if low < 0 < high:
        parts.append(tag("path", cls="zero", d=f"M{-low / span * width:.1f} 0V{height}"))
    return _svg(width, height + 2, f"input of {name}", *parts, cls="histogram")


def router_strip(runs: Sequence[Sequence[int]]) -> Markup:
    """Which adapter serves which timesteps.

    Args:
        runs (`Sequence[Sequence[int]]`): (first timestep, last timestep, adapter), ascending.
    """
    width, height = 720, 34
    last = runs[-1][1] + 1
    parts = []
    for first, end, adapter in reversed(runs):
        left, share = (last - 1 - end) / last * width, (end - first + 1) / last * width
        words = tag("title", f"timesteps {first} to {end}: adapter {adapter}")
        parts.append(
            tag("rect", words, cls=f"adapter a{adapter % 6}", x=f"{left:.1f}", y=0, width=f"{share:.1f}", height=height)
        )
        if share > 24:
            parts.append(tag("text", adapter, x=f"{left + share / 2:.1f}", y=23, text_anchor="middle", cls="in-strip"))
    return _svg(width, height, "adapters over timesteps, noise on the left", *parts, cls="strip")


def shade_range(ratios: Sequence[float]) -> tuple[float, float]:
    """Ends of the heat map's scale in whole fives of decibels; what lies beyond gets the colour of the end."""
    if not ratios:
        return 0.0, 5.0
    ordered = sorted(ratios)
    low, high = ordered[len(ordered) // 100], ordered[-1 - len(ordered) // 10]
    low = 5.0 * math.floor(low / 5)
    return low, max(5.0 * math.ceil(high / 5), low + 5)


def shade(ratio: float, bounds: tuple[float, float]) -> int:
    """Which of the `SHADES` stands for a signal-to-noise ratio in decibels."""
    low, high = bounds
    return min(max(int((ratio - low) / (high - low) * SHADES), 0), SHADES - 1)

"""The page: one HTML file that loads nothing. There is no script in it, and its policy forbids the browser to fetch.

Every name comes from a checkpoint, so every one is escaped: Jinja's autoescape for text, `plots.tag` for figures.
"""

import json
import re
import shlex
from collections import Counter
from collections.abc import Mapping

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup, escape

from ..formats import FORMATS
from ..results import Result
from . import plots
from .pictures import QUANTIZED, REFERENCE

WORST = 12
IMPORTS = {"msfp": "diffusers, diffusers_msfp", "sdnq": "diffusers, sdnq"}
MEASURED = {
    "pictures": "pictures",
    "comparison": "error over timesteps",
    "snr": "every layer over timesteps",
    "inputs": "what each layer reads",
    "formats": "formats, errors of weights, engines",
    "speed": "speed",
    "denoisers": "layers of other denoisers",
}
"""What may be missing, in words."""

OPEN_BLOCKS_UP_TO = 80
"""Layers whose histograms are all shown at once; of more, block by block on demand."""


def render_report(report: Result) -> str:
    """The page of a report.

    Args:
        report (`Report`): with `name`, `reference` (or None), `bytes_quantized` and `bytes_reference` (or None) of the
            denoiser, see `cli.report`.
    """
    data = report.to_dict()
    environment = Environment(
        loader=PackageLoader("diffusers_msfp.report"),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {"number": number, "code": code, "megabytes": lambda size: f"{size / 1e6:.2f} MB"}
    layers = data["layers"]
    measured = [layer for layer in layers if layer["snr_db"] is not None]
    changed = [layer for layer in measured if not layer["unchanged"]]
    worst = sorted(changed, key=lambda layer: layer["snr_db"])[:WORST]
    ratios = [ratio for layer in changed for ratio in layer["snr_db_by_timestep"].values()]
    overrides = {key: value for layer in worst for key, value in (layer["advice"] or {}).items()}
    quantized = [layer for layer in layers if "weight_format" in layer]
    seen = [layer for layer in layers if layer["input"]]
    sections = {
        "pictures": ("Pictures", data["pictures"]),
        "error": ("Error", data["comparison"]),
        "layers": ("Layers", measured),
        "worst": ("What hurts most", worst),
        "formats": ("Formats and inputs", quantized or seen),
        "budget": ("Budget", data["budget"]),
        "router": ("Router", (data["adapters"] or {}).get("num_adapters", 0) > 1),
        "speed": ("Engines and speed", data["speed"] or quantized),
        "method": ("How to read it", True),
    }
    absent: dict[str, list[str]] = {}
    for section, reason in data["missing"].items():
        absent.setdefault(reason, []).append(MEASURED[section])
    return environment.get_template("report.html.j2").render(
        data=data,
        reasons=data["budget"]["reasons"] if data["budget"] else {},
        plots=plots,
        bounds=plots.shade_range(ratios),
        changed=changed,
        unchanged=len(measured) - len(changed),
        worst=worst,
        overrides=data["config"].get("scheme_overrides", {}) | overrides if overrides else {},
        scheme=data["config"].get("scheme"),
        blocks=_by_block(changed),
        seen=_by_block(seen),
        anchors={anchor: title for anchor, (title, there) in sections.items() if there},
        absent=absent,
        opened=len(layers) <= OPEN_BLOCKS_UP_TO,
        formats=_formats(layers),
        refusals=Counter(pair for layer in layers for pair in layer.get("engine_refusals", {}).items()).items(),
        engines=Counter(layer["engine"] for layer in layers if "engine" in layer).most_common(),
        quantized=quantized,
        loading=loading_code(data),
        making=making_commands(data),
        psnr_meaning=psnr_meaning(data["comparison"]["image_psnr_db"]) if data["comparison"] else "",
        baseline=next((name for name in data["speed"] or () if name != QUANTIZED), None),
        QUANTIZED=QUANTIZED,
        REFERENCE=REFERENCE,
    )


def number(value: float | None, digits: int = 3) -> str:
    """A number for people; a dash where there is none."""
    return "–" if value is None else f"{value:.{digits}g}"


def code(text: str) -> Markup:
    """What stands between backticks as code."""
    return Markup(re.sub("`([^`]+)`", r"<code>\1</code>", str(escape(text))))


def psnr_meaning(psnr_db: float) -> str:
    """What a PSNR of pictures with equal noise looks like."""
    for least, words in (
        (40, "differences cannot be seen"),
        (30, "differences are hard to see"),
        (20, "details differ"),
        (0, "contents differ in places; whether the pictures are good, it does not say"),
    ):
        if psnr_db >= least:
            return words
    return "the pictures have little in common"


def loading_code(data: Mapping) -> str:
    """Two lines of Python that load the checkpoint."""
    whole = data["component"] != "."
    name, cls = ("pipe", "DiffusionPipeline") if whole else ("model", data["model"])
    dtype = "" if data["dtype"] == "float32" else f", dtype=torch.{data['dtype']}"
    imports = IMPORTS.get(data["method"], "diffusers") + (", torch" if dtype else "")
    return f"import {imports}\n{name} = diffusers.{cls}.from_pretrained({json.dumps(data['name'])}{dtype})"


def making_commands(data: Mapping) -> str | None:
    """The command that quantizes like this, as far as the checkpoint tells; None for other packages' checkpoints."""
    if data["method"] != "msfp":
        return None
    config = data["config"]
    words = ["diffusers-msfp", "quantize", data["reference"] or "SRC", "--scheme", config["scheme"]]
    for pattern, scheme in config.get("scheme_overrides", {}).items():
        words += ["--override", f"{pattern}={scheme}"]
    for option, key in (
        ("--modules-to-not-convert", "modules_to_not_convert"),
        ("--component", "components_to_quantize"),
    ):
        for value in config.get(key) or ():
            words += [option, value]
    return shlex.join([*words, "--out", "DIR" if data["adapters"] else data["name"]])


def _by_block(layers: list[dict]) -> dict[str, list[dict]]:
    """Layers with `short`, their names within the block, in order."""
    blocks: dict[str, list[dict]] = {}
    for layer in layers:
        short = layer["name"].removeprefix(f"{layer['block']}.")
        blocks.setdefault(layer["block"], []).append(layer | {"short": short})
    return blocks


def _formats(layers: list[dict]) -> dict[str, list[tuple[str, int, str]]]:
    """For weights and inputs: format, number of layers, and whether it is signed, unsigned or float."""

    def kind(name: str) -> str:
        return ("signed" if FORMATS[name].signed else "unsigned") if name in FORMATS else "float"

    counts = {
        what: Counter(layer[key] or "float" for layer in layers if key in layer).most_common()
        for what, key in (("weights", "weight_format"), ("inputs", "input_format"))
    }
    return {what: [(name, count, kind(name)) for name, count in found] for what, found in counts.items()}

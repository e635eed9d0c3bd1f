"""Model cards: what a checkpoint holds and what was measured, from files alone.

A card is a function of two things that are published beside it: `results/checkpoint.json` (see `describe`) and the
results files. It never computes a figure that they do not hold.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml
from huggingface_hub import ModelCard, ModelCardData
from jinja2 import Environment, StrictUndefined

from ..errors import ConfigError
from .base import NO_BASE
from .results import Results

TEMPLATE = Path(__file__).with_name("card.md.jinja")
PREVIEW, TIMESTEPS, ROUTER = "preview.png", "results/timesteps.png", "results/router.png"

FIGURES = {
    "frechet_distance": "Fréchet distance",
    "spatial_frechet_distance": "Fréchet distance, spatial features",
    "precision": "precision",
    "recall": "recall",
    "psnr_db": "PSNR for equal noise (dB)",
    "ssim": "SSIM for equal noise",
}
PAIRS = {
    "candidate_to_reference": "to full precision",
    "candidate_to_real": "to real pictures",
    "reference_to_real": "full precision's to real pictures",
}
SETS = {"candidate": "this model", "reference": "full precision", "real": "real pictures"}


def render_card(facts: Mapping, results: Results) -> str:
    """The README of a published checkpoint.

    Args:
        facts (`Mapping`): `repo`, `base_model` (or None and `base_elsewhere`, see `named_base`), `license` (and
            `license_name`, `license_link`), `pipeline_class`, `pipeline_tag`, `arguments` (of `from_pretrained`, as
            source text), `components` (as `quantization_report`, without `engines`; with `parameters` of the base,
            `adapter_parameters` and `file_bytes`), `preview` (`num_samples`, `num_inference_steps`, `seed`).
        results (`Results`): measurements.

    Raises:
        ConfigError: metadata that the Hub would not accept.
    """
    tuned = [part["adapters"] for part in facts["components"].values() if part["adapters"]]
    routed = any(map(is_routed, facts["components"].values()))
    data = ModelCardData(
        license=facts["license"],
        license_name=facts.get("license_name"),
        license_link=facts.get("license_link"),
        base_model=facts["base_model"],
        base_model_relation="quantized" if facts["base_model"] else None,
        library_name="diffusers",
        pipeline_tag=facts["pipeline_tag"],
        tags=["diffusers", "msfp", "quantized", *schemes(facts), *(["talora"] if routed else [])],
    )
    environment = Environment(  # noqa: S701 – markdown, of values that are checked
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=StrictUndefined
    )
    environment.filters |= {"table": table, "megabytes": lambda size: f"{size / 1e6:,.1f} MB"}
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        card_data=data.to_yaml(),
        facts=facts,
        results=results,
        name=facts["repo"].partition("/")[2],
        schemes=" and ".join(f"`{scheme}`" for scheme in schemes(facts)),
        components=component_rows(facts),
        reads=any(set(part["input_formats"]) - {"float"} for part in facts["components"].values()),
        quality=list(quality_rows(results.evaluation or {})),
        speed=list(speed_rows(results.speed or {})),
        tuned=tuned,
        beside=[plan for plan in tuned if plan["placement"] == "side"],
        routed=routed,
        maintained=[part["temporal"] for part in facts["components"].values() if part.get("temporal")],
        corrected=[n for part in facts["components"].values() if (n := part.get("output_correction"))],
        base_url=base_url(facts),
        missing=results.missing(facts["base_model"] or "BASE"),
        omitted=(results.evaluation or {}).get("omitted", {}),
        plots={"preview": PREVIEW, "timesteps": TIMESTEPS, "router": ROUTER},
    )
    check_card(text, needs_base=not facts.get("base_elsewhere"))
    return text


def is_routed(part: Mapping) -> bool:
    """Whether different timesteps of a component may have different adapters."""
    return bool(part["adapters"]) and part["adapters"]["num_adapters"] > 1


def base_url(facts: Mapping) -> str | None:
    """Where the float model can be looked at; None if nowhere."""
    elsewhere = facts.get("base_elsewhere")
    if elsewhere:
        return None if elsewhere == NO_BASE else elsewhere
    return f"https://huggingface.co/{facts['base_model']}"


def check_card(text: str, *, needs_base: bool = True) -> ModelCard:
    """Parse a card with the Hub's own client.

    Raises:
        ConfigError: metadata that it does not read, or that says no licence or base.
    """
    try:
        card = ModelCard(text)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise ConfigError(f"A card's metadata must be valid, but it is not: {error}") from error
    for key in ("license", "base_model") if needs_base else ("license",):
        if not isinstance(card.data.get(key), str):
            raise ConfigError(f"A card must say `{key}`, but got {card.data.get(key)!r}.")
    return card


def schemes(facts: Mapping) -> list[str]:
    """Names of the schemes in use."""
    return list(dict.fromkeys(part["scheme"] for part in facts["components"].values()))


def table(rows: list[Mapping[str, str]]) -> str:
    """Markdown of rows, column → cell; the first column is text, the others are numbers."""
    header = list(rows[0])
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *(row.values() for row in rows)])


def component_rows(facts: Mapping) -> list[dict[str, str]]:
    """What is quantized, and how; parameters are those of the base, without adapters."""
    adapted = any(part.get("adapter_parameters") for part in facts["components"].values())
    return [
        {
            "component": f"`{name}`",
            "parameters": f"{part['parameters'] / 1e6:,.1f} M",
            "scheme": f"`{part['scheme']}`",
            "quantized layers": str(part["layers"]),
            "weights": _counts(part["weight_formats"]),
            "inputs": _counts(part["input_formats"]),
            "bits per weight": f"{part['bits_per_weight']:.2f}",
            **({"adapters": f"{part.get('adapter_parameters', 0) / 1e6:,.2f} M"} if adapted else {}),
            "file": f"{part['file_bytes'] / 1e6:,.1f} MB",
            "bits per parameter": f"{8 * part['file_bytes'] / part['parameters']:.2f}",
        }
        for name, part in facts["components"].items()
    ]


def _counts(counts: Mapping[str, int]) -> str:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    return ", ".join(f"{number} × {name if name == 'float' else f'`{name}`'}" for name, number in ordered)


def quality_rows(evaluation: Mapping) -> Iterator[dict[str, str]]:
    """Figures of `evaluate` with their intervals."""
    figures = evaluation.get("figures", {})
    for pair, label in PAIRS.items():
        for name, title in FIGURES.items():
            if estimate := figures.get(pair, {}).get(name):
                yield _estimate(f"{title}, {label}", estimate)
    for name, estimate in figures.get("classifier_score", {}).items():
        yield _estimate(f"classifier score, {SETS.get(name, name)}", estimate)
    for name, estimate in figures.get("class_agreement", {}).items():
        yield _estimate(f"class agreement, {SETS.get(name, name)}", estimate)


def _estimate(label: str, estimate: Mapping[str, float]) -> dict[str, str]:
    value, low, high = (_number(estimate[key]) for key in ("value", "low", "high"))
    return {"figure": label, "value": value, "95 % interval": f"{low} – {high}"}


def speed_rows(speed: Mapping) -> Iterator[dict[str, str]]:
    """Steps that `bench` timed."""
    for row in speed.get("rows", ()):
        yield {
            "run by": f"`{row['provider']}`",
            "batch": str(row["batch"]),
            "step": f"{1e3 * row['seconds']:.1f} ms",
            "quartiles": f"{1e3 * row['seconds_low']:.1f} – {1e3 * row['seconds_high']:.1f}",
            "× bfloat16, channels last": f"{row['speedup']:.2f}",
        }


def _number(value: float) -> str:
    """Four significant digits, never an exponent."""
    if not value or not math.isfinite(value):
        return f"{value:g}"
    return f"{value:.{max(0, 3 - math.floor(math.log10(abs(value))))}f}"

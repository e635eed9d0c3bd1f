"""One record per layer: what it is, how it was quantized, what that cost, what its input looks like."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from torch import Tensor, nn

from ..calibration import Observation, observe
from ..calibration.watch import watching_calls
from ..evaluation.layers import LAYERS, MAX_SNR_DB
from ..formats import FORMATS
from ..layers import QuantLayer
from ..layers.convert import quant_layers
from ..layers.split import whole_name
from ..methods.talora import RoutingTable
from ..schemes import matches

BINS = 56
QUANTILES = (0.0005, 0.9995)
"""A histogram shows what lies between, and the whole grid."""

EDGE_BLOCK = "input, output, time"
RESIDUAL_READERS = ("conv_shortcut", "samplers")
"""Patterns of layers that read sums of residuals which no norm has scaled."""

DESCRIBED = (
    "weight_format",
    "weight_rel_mse",
    "input_format",
    "input_signed",
    "input_rel_mse",
    "engine",
    "engine_refusals",
    "weight_bytes",
)


@contextmanager
def watching_inputs(model: nn.Module) -> Iterator[dict[str, Observation]]:
    """Sample what goes into every linear and convolution while the model runs: name → observation, as they run."""
    seen: dict[str, Observation] = {}

    def watch(name: str, args: tuple[Tensor, ...]) -> None:
        observe(seen.setdefault(name, Observation()), args[0], name)

    with watching_calls({name: each for name, each in model.named_modules() if isinstance(each, LAYERS)}, watch):
        yield seen


def layer_rows(
    model: nn.Module,
    errors: Mapping[str, Mapping],
    inputs: Mapping[str, Observation],
    described: Sequence[Mapping],
) -> list[dict]:
    """One `dict` for each layer, in the order in which they run where that was seen.

    Args:
        model (`nn.Module`): the candidate.
        errors (`Mapping[str, Mapping]`): see `layer_snr`; empty without a reference. Parts of a split layer share
            error and input.
        inputs (`Mapping[str, Observation]`): see `watching_inputs`.
        described (`Sequence[Mapping]`): see `describe_checkpoint`; empty for other packages' checkpoints.

    Returns:
        `list[dict]`: `name`, `block`, `snr_db`, `snr_db_by_timestep` (both None without a reference), `unchanged` (it
        computes what the reference's does), `input` (None, or `range`, `bins` (first and last edge), `counts`,
        `levels` (values of the grid, a list for each adapter)), `advice` (None, or `scheme_overrides` that spare it),
        and those of `DESCRIBED` that are known.
    """
    own = dict(quant_layers(model))
    known = {layer["name"]: layer for layer in described}
    wholes = {name: whole_name(name, layer) for name, layer in own.items()}
    parts = {whole: [name for name in wholes if wholes[name] == whole] for whole in wholes.values()}
    rows = []
    for name in dict.fromkeys(part for each in (*inputs, *errors, *known) for part in parts.get(each, [each])):
        whole = wholes.get(name, name)
        error, seen = errors.get(whole, {}), inputs.get(name, inputs.get(whole))
        row = {key: known[name][key] for key in DESCRIBED if name in known}
        row |= {
            "name": name,
            "block": block_of(name),
            "snr_db": error.get("snr_db"),
            "snr_db_by_timestep": error.get("by_timestep"),
            "unchanged": error.get("snr_db") == MAX_SNR_DB,
            "input": _histogram(seen, input_levels(own.get(name))) if seen is not None else None,
        }
        rows.append(row | {"advice": advice(row)})
    return rows


def block_of(name: str) -> str:
    """The part of a network that a layer is shown with."""
    first, *rest = name.split(".")
    if len(rest) < 2 or "embed" in first:
        return EDGE_BLOCK
    return f"{first}.{rest[0]}" if rest[0].isdigit() else first


def input_levels(layer: QuantLayer | None) -> list[list[float]]:
    """The values that a layer's input is rounded to, ascending; a list for each range of an adapter or timestep."""
    if layer is None or layer.input_format is None:
        return []
    grid = np.array(layer.input_format.grid)
    found = []
    routing = layer.routing
    for adapter in range(routing.num_adapters if isinstance(routing, RoutingTable) else max(1, layer.num_sets)):
        qparams = layer.input_qparams(adapter)
        levels = (grid * float(qparams.scale) + float(qparams.zero_point)).tolist()
        found += [levels] if levels not in found else []
    return found


def advice(layer: Mapping) -> dict[str, str] | None:
    """`scheme_overrides` for a layer whose narrow input is a sum of residuals; None where that is not the reason."""
    pattern = next((pattern for pattern in RESIDUAL_READERS if matches(pattern, layer["name"])), None)
    fmt = layer.get("input_format")
    if pattern is None or fmt is None or fmt not in FORMATS or FORMATS[fmt].bits >= 8:
        return None
    return {pattern: "w4a8" if FORMATS[layer["weight_format"]].bits == 4 else "w8a8"}


def _histogram(seen: Observation, levels: list[list[float]]) -> dict | None:
    values = seen.drawn().numpy()
    if not len(values):
        return None
    ends = [*np.quantile(values, QUANTILES).tolist(), *(level for own in levels for level in own)]
    counts, edges = np.histogram(values, bins=BINS, range=(min(ends), max(ends)))
    bins = [edges[0].item(), edges[-1].item()]
    return {"range": seen.range.tolist(), "bins": bins, "counts": counts.tolist(), "levels": levels}

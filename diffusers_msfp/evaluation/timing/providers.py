"""The models that a benchmark compares: one float original, made ready to run in different ways.

A provider's name is a kind, with options behind colons: `bf16:cl`, `w4a4`, `w4a4:low`, `w8a8:fp32`, `sdnq:int8`,
`openvino:int8`, `bf16:cl:compile`. Peers are taken if they are installed.
"""

import copy
from collections.abc import Callable, Collection
from typing import Any, cast

import torch
from torch import nn

from ...engines import ENGINES, MEMORY_MODES, openvino
from ...engines.choose import set_engine
from ...errors import ConfigError
from ...layers.convert import Conversion, convert, quant_layers
from ...sampling.observation import freeze, track
from ...schemes import SCHEMES
from .peers import graph_peer, require_packages

BASELINE = "bf16:cl"
PEERS = {
    "sdnq": "sdnq",
    "quanto": "optimum.quanto",
    "torchao": "torchao",
    "openvino": "openvino",
    "onnxruntime": "onnxruntime",
}
"""Kind of provider → module that it needs."""

SDNQ_DTYPES = ("int8", "uint4", "fp4")
GRAPH_DTYPES = {"openvino": ("bf16", "fp32", "int8"), "onnxruntime": ("int8", "fp32")}
"""Runtimes of whole graphs → what they can be asked for, the default first."""


def provide(name: str, model: nn.Module, call: Callable[[nn.Module], object]) -> nn.Module:
    """A copy of a float model, made ready.

    Args:
        name (`str`): see the module.
        model (`nn.Module`): float32 or quantized, not changed; the kind `msfp` takes a quantized one as it is.
        call (`Callable`): runs a model once, which freezes the ranges of inputs.

    Raises:
        ConfigError: an unknown kind or option.
        UnsupportedError: a peer that is not installed.
    """
    kind, *options = name.split(":")
    compiled = "compile" in options
    options = [option for option in options if option != "compile"]
    if kind == "msfp" or kind in SCHEMES:
        made = _msfp(kind, options, model, call)
    elif kind in ("fp32", "bf16"):
        _check(name, options, {"cl"})
        made = nn.Module.to(_float(model), torch.float32 if kind == "fp32" else torch.bfloat16)
        made = _channels_last(made) if options else made
    elif kind in PEERS:
        made = _peer(kind, options, model)
    else:
        known = ", ".join(("fp32", "bf16", "msfp", *SCHEMES, *PEERS))
        raise ConfigError(f"A provider must be one of {known}, with options behind colons, but got {name!r}.")
    return cast(nn.Module, torch.compile(made)) if compiled else made


def _check(name: str, options: list[str], known: Collection[str]) -> None:
    unknown = [option for option in options if option not in known]
    if unknown:
        raise ConfigError(f"Options of `{name}` may be {', '.join(sorted(known))}, but got {unknown[0]!r}.")


def _channels_last(model: nn.Module) -> nn.Module:
    return cast(Any, model).to(memory_format=torch.channels_last)  # which torch declares for tensors alone


def _float(model: nn.Module) -> nn.Module:
    """A copy with float weights; of a quantized model with random ones, since only their shapes matter here.

    It is cast by `nn.Module.to`: diffusers' own warns of parts that should stay float32 where there are none.
    """
    if not any(True for _ in quant_layers(model)):
        return copy.deepcopy(model)
    own: Any = model
    config = {key: value for key, value in own.config.items() if key != "quantization_config"}
    return type(own).from_config(config).eval()


def _msfp(kind: str, options: list[str], model: nn.Module, call: Callable[[nn.Module], object]) -> nn.Module:
    engines = {*ENGINES, "auto", openvino.NAME}
    _check(kind, options, {*MEMORY_MODES, "fp32", *engines})
    made = copy.deepcopy(model) if kind == "msfp" else _float(model)
    if any(True for _ in quant_layers(made)):
        if "fp32" in options:
            raise ConfigError(
                "`msfp:fp32` quantizes a float model, but this one is quantized already and is timed as it is. Leave "
                "`fp32` out, or name a scheme."
            )
    else:
        made = nn.Module.to(made, torch.float32 if "fp32" in options else torch.bfloat16)
        convert(made, Conversion.plan(made, "w4a8" if kind == "msfp" else kind))
        track(made)  # finds the layers that read residual sums, which have formats of their own
        call(made)
        freeze(made)
    engine = next((option for option in options if option in engines), "auto")
    set_engine(made, engine, memory=next((option for option in options if option in MEMORY_MODES), "fast"))
    return made


def _peer(kind: str, options: list[str], model: nn.Module) -> nn.Module:
    require_packages(kind, PEERS[kind])
    if kind in GRAPH_DTYPES:
        _check(kind, options, GRAPH_DTYPES[kind])
        return graph_peer(kind, (*options, *GRAPH_DTYPES[kind])[0], _float(model))
    made = _channels_last(nn.Module.to(_float(model), torch.bfloat16))
    if kind == "sdnq":
        import sdnq

        _check(kind, options, {*SDNQ_DTYPES, "matmul"})
        return sdnq.sdnq_post_load_quant(
            made,
            weights_dtype=next((dtype for dtype in SDNQ_DTYPES if dtype in options), "int8"),
            dtype=torch.bfloat16,
            quant_conv=True,
            use_quantized_matmul="matmul" in options,
            use_quantized_matmul_conv="matmul" in options,
        )
    if kind == "quanto":
        from optimum import quanto

        _check(kind, options, set())
        quanto.quantize(made, weights=quanto.qint8, activations=quanto.qint8)
        quanto.freeze(made)
        return made
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    _check(kind, options, set())
    quantize_(made, Int8DynamicActivationInt8WeightConfig())
    return made

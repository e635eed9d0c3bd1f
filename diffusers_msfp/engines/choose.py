"""Choose the engine that runs a model's quantized layers."""

import logging
import os
from collections import Counter
from typing import cast

from diffusers import DiffusionPipeline, ModelMixin
from torch import nn

from ..compat.wrappers import sees_through, unwrap
from ..errors import SEE_DOCTOR, ConfigError, StateError
from ..layers import QuantLayer
from ..layers.convert import quant_layers
from ..sampling.observation import quantized_models
from . import ENGINES, MEMORY_MODES, AutoEngine, openvino, tuning
from .fusion.fuse import fuse, undo
from .fusion.processors import use_engine_attention

logger = logging.getLogger(__name__)

ENGINE_VARIABLE = "MSFP_ENGINE"
DEFAULT_ENGINE = "auto"
_SET = "engine_set"


@sees_through
def set_engine(model: nn.Module | DiffusionPipeline, engine: str = "auto", *, memory: str = "fast") -> None:
    """Run quantized layers by another engine from now on; nothing of it is saved.

    All engines give the reference's result layer by layer. A 4-bit network is chaotic, so pictures may still differ in
    detail from the reference's; their quality does not. Where `auto` can compute a layer in several ways, it times them
    on the first inputs of each shape and keeps the fastest (`MSFP_AUTOTUNE=0`: the default, the same on all machines).

    Args:
        model (`nn.Module` or `DiffusionPipeline`): with quantized layers; float components are left alone.
        engine (`str`): `"auto"` takes for each layer the fastest that is exact, and whole graphs where `warmup` has
            measured them to be faster; `"openvino"` runs whole models as graphs, and as `"auto"` what no graph can
            hold; otherwise a name in `ENGINES`, and the reference for layers that it cannot run.
        memory (`str`): `"fast"` keeps weights as the engine wants them, `"low"` keeps them packed and expands each
            when it is needed.

    Raises:
        ConfigError: an unknown name, an engine that can run none of the layers here or is not installed, or a value of
            `MSFP_AUTOTUNE` other than 0 and 1.
        StateError: no layer is quantized.

    Example:
        ```py
        set_engine(pipe, "auto", memory="low")  # weights stay packed
        ```
    """
    _set_engine(model, engine, memory, required=True)


def set_engine_of_environment(model: nn.Module) -> None:
    """Run a quantized model's layers by the engine that `MSFP_ENGINE` names, which is for all models of a process.

    One that can run no layer of this model, or none until it is moved to another device, is named in a warning.

    Raises:
        ConfigError, StateError: see `set_engine`.
    """
    _set_engine(model, engine_from_environment(), "fast", required=False)


def _set_engine(model: nn.Module | DiffusionPipeline, engine: str, memory: str, *, required: bool) -> None:
    _check_name(engine)
    if memory not in MEMORY_MODES:
        raise ConfigError(f"`memory` must be one of {', '.join(MEMORY_MODES)}, but got {memory!r}.")
    models = list(quantized_models(model))
    layers = [layer for part in models for _, layer in quant_layers(part)]
    if not layers:
        raise StateError(
            f"An engine needs a quantized model, but {type(model).__name__} has no quantized layer. Quantize it, or "
            f"load a quantized checkpoint with `quantization_config=MSFPConfig()`."
        )
    in_graphs, asked = engine == openvino.NAME, (engine, memory)
    engine = AutoEngine.name if in_graphs else engine
    chosen = engine_named(engine, memory)
    useless = _why_useless(engine, chosen, layers)
    if useless and required:
        raise ConfigError(useless)
    if useless:
        logger.warning("%s: %s Until one can, layers run by `reference`.", ENGINE_VARIABLE, useless)
    if engine != "reference":
        tuning.from_environment()
    for part in models:
        _unprepare(part)
        vars(part)[_SET] = asked
    if engine == "reference":
        return
    by_measurement = engine == AutoEngine.name and memory == "fast" and not in_graphs
    measured = by_measurement and openvino.why_missing() is None and openvino.is_any()
    for layer in layers:
        layer.use_engine(chosen)
        if not in_graphs:  # else a call prepares them that no graph can run
            layer.prepare()
    for part in models:
        fuse(part)
        use_engine_attention(part, wanted=True)
        vars(part)["input_check"] = part.register_forward_hook(chosen.check_inputs)
        if in_graphs or measured:
            openvino.install(part, only_if_faster=not in_graphs)


def check_environment() -> None:
    """Refuse what the environment says of engines before a model is changed that will run by one.

    Raises:
        ConfigError: `MSFP_ENGINE` or `MSFP_AUTOTUNE` makes no sense.
    """
    engine_from_environment()
    tuning.from_environment()


def engine_set(model: nn.Module) -> tuple[str, str]:
    """Name and memory mode of the engine that was set last for a quantized model."""
    return vars(unwrap(model)).get(_SET) or (engine_from_environment(), "fast")


def engine_named(name: str, memory: str = "fast") -> AutoEngine:
    """The engines to try for each layer, in this order, under a name that `set_engine` takes."""
    names = list(ENGINES) if name == AutoEngine.name else [name, *(["reference"] if name != "reference" else [])]
    return AutoEngine([ENGINES[each](memory) for each in names])


def engines_of(model: nn.Module) -> dict[str, int]:
    """Engine → number of layers that it runs now; while a layer observes its input, that is the reference."""
    graphs = openvino.graph_forward_of(unwrap(model))
    if graphs is not None and graphs.why_in_torch() is None:
        return {openvino.NAME: sum(1 for _ in quant_layers(model))}
    return dict(Counter(_engine_of(layer) for _, layer in quant_layers(model)))


def _engine_of(layer: QuantLayer) -> str:
    engine = cast("AutoEngine | None", layer.engine)
    return "reference" if engine is None or layer.observing else engine.choose(layer)[0].name


def resident_bytes(model: nn.Module) -> int:
    """Memory of a model's tensors and of what its engines keep ready beside them, in bytes."""
    bare = cast(ModelMixin, unwrap(model))
    prepared = [layer.prepared for _, layer in quant_layers(bare) if layer.prepared is not None]
    return bare.get_memory_footprint() + sum(each.kept_bytes for each in prepared)


def engine_from_environment() -> str:
    """What `MSFP_ENGINE` says, or the default.

    Raises:
        ConfigError: it names no engine, or one that is not installed.
    """
    name = os.environ.get(ENGINE_VARIABLE, DEFAULT_ENGINE)
    _check_name(name)
    return name


def _check_name(name: str) -> None:
    """Refuse a name of no engine, and one that is not installed."""
    if name == openvino.NAME:
        openvino.require()
    elif name != AutoEngine.name:
        ENGINES[name]


def _why_useless(name: str, chosen: AutoEngine, layers: list[QuantLayer]) -> str | None:
    """Why an engine can run no layer, and which can; None where it can run some, or may once ranges are known."""
    if name in (AutoEngine.name, "reference") or any(layer.observing for layer in layers):
        return None
    reasons = Counter(chosen.engines[0].refusal(layer) for layer in layers)
    if None in reasons:
        return None
    able = [other for other, cls in ENGINES.items() if any(cls().refusal(layer) is None for layer in layers)]
    (usual, _), *_ = reasons.most_common(1)
    return (
        f"Engine {name!r} must be able to run a layer of this model here, but it can run none: of most, {usual}. "
        f"Engines that can: {', '.join(able)}; `auto` takes the fastest of them. {SEE_DOCTOR}"
    )


def _unprepare(model: nn.Module) -> None:
    openvino.remove(model)
    use_engine_attention(model, wanted=False)
    undo(model)
    if "input_check" in vars(model):
        vars(model).pop("input_check").remove()
    for module in model.modules():
        if isinstance(module, QuantLayer):
            module.use_engine(None)

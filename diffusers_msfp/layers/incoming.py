"""What quantized layers take: states of the same formats, whole, or nothing at all; inputs without tangents.

Codes and scales mean nothing without their formats, so every state of a quantized layer says them (`formats`). torch
copies tensor by tensor and complains at the end; a state that does not fit is refused here before the first is copied.
"""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.autograd.forward_ad import unpack_dual

from ..compat.torch import remove_load_hooks
from ..errors import CheckpointError, UnsupportedError
from .stored import FORMATS_TENSOR, OBSERVED, PACKED_WEIGHT, StoredTensors, same_formats, say_formats

_WAY_OUT = "Nothing was loaded. Load the checkpoint that this state is of with `from_pretrained`."
_CAST = ("bias",)
"""Follow the model's dtype, and may be loaded without the rest."""


def check_incoming(module: nn.Module, state: Mapping[str, Tensor], prefix: str, *_: object) -> None:
    """Refuse a state that the quantized layers of a module cannot take; a hook for `load_state_dict`.

    torch does not tell its hooks whether a load is strict, so a state holds all quantized layers or none (adapters
    alone, biases alone): a part of a model's state belongs into that part of the model.

    Args:
        module (`nn.Module`): has quantized layers, or is one.
        state (`Mapping[str, Tensor]`): whose names begin with `prefix` for this module.

    Raises:
        CheckpointError: other formats, shapes or numbers of banks and sets, observing instead of frozen, adapters or
            parts of split layers on one side alone, or no formats at all.
    """
    layers = {f"{prefix}{name}." if name else prefix: layer for name, layer in _quantized(module)}
    given: dict[str, dict[str, Tensor]] = {module_name: {} for module_name in layers}
    for key, value in state.items():
        if not key.startswith(prefix):
            continue
        module_name = next((module_name for module_name in _places(key) if module_name in given), None)
        if key.endswith(f".{FORMATS_TENSOR}") and module_name != key.removesuffix(FORMATS_TENSOR):
            raise CheckpointError(
                f"Each quantized layer of a state must be one of the model's, but {type(module).__name__} has none at "
                f"`{key.removeprefix(prefix).rpartition('.')[0]}`: not its state, or split differently. {_WAY_OUT}"
            )
        if module_name is not None:
            name = key.removeprefix(module_name)
            given[module_name][PACKED_WEIGHT if name == "weight" else name] = value  # files call it so
    expected = {module_name: dict(layer.state_dict()) for module_name, layer in layers.items()}
    if any((given[module_name].keys() & own.keys()) - set(_CAST) for module_name, own in expected.items()):
        for module_name, layer in layers.items():
            _check_layer(
                module_name.removeprefix(prefix).rstrip(".") or layer.module_name,
                layer,
                expected[module_name],
                given[module_name],
            )
        for key, value in module.state_dict(prefix=prefix).items():
            if key in state and key.rpartition(".")[2] != OBSERVED[0] and state[key].shape != value.shape:
                raise CheckpointError(
                    f"`{key}` must have shape {tuple(value.shape)}, but got {tuple(state[key].shape)}: another "
                    f"model's, or other sets of timesteps. {_WAY_OUT}"
                )


def _check_layer(name: str, layer: StoredTensors, expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> None:
    if not given.keys() & expected.keys():
        raise CheckpointError(
            f"A state of quantized layers must hold all of the module's, but `{name}` is missing: not this model's, or "
            f"a part of it, which belongs into that part. {_WAY_OUT}"
        )
    formats, own = given.get(FORMATS_TENSOR), layer.formats_tensor()
    if formats is None:
        raise CheckpointError(
            f"The state of a quantized layer must say its formats, but `{name}.{FORMATS_TENSOR}` is missing: of a "
            f"float model, of one that is split differently, or read from files of format version 1. {_WAY_OUT}"
        )
    if not same_formats(formats.cpu(), own):
        raise CheckpointError(
            f"The state of `{name}` must have this model's formats ({say_formats(own)}), but it has others "
            f"({say_formats(formats)}): quantized or calibrated otherwise. {_WAY_OUT}"
        )
    for key in sorted((expected.keys() | {FORMATS_TENSOR}) ^ given.keys()):
        has, lacks = ("model", "state") if key in expected else ("state", "model")
        raise CheckpointError(
            f"Model and state must hold the same tensors, but the {has} has `{name}.{key}` and the {lacks} has not: "
            f"adapters, parameter sets or features on one side alone. {_WAY_OUT}"
        )
    for key, value in expected.items():
        fits = key == OBSERVED[0] or given[key].shape == value.shape  # a sample is as long as it is full
        if not fits or (key not in _CAST and given[key].dtype != value.dtype):
            raise CheckpointError(
                f"`{name}.{key}` must be {value.dtype} of shape {tuple(value.shape)}, but got {given[key].dtype} of "
                f"shape {tuple(given[key].shape)}: other banks, sets or sizes. {_WAY_OUT}"
            )


def _quantized(module: nn.Module) -> Iterator[tuple[str, StoredTensors]]:
    for name, part in module.named_modules(remove_duplicate=False):
        if isinstance(part, StoredTensors):
            yield name, part


def _places(key: str) -> Iterator[str]:
    """Prefixes that modules could have of which this is a tensor, the innermost first."""
    while "." in key:
        key = key.rpartition(".")[0]
        yield f"{key}."
    yield ""


def watch_states(model: nn.Module) -> None:
    """Look at what is loaded into a model, or into a part of it, before anything is copied."""
    unwatch_states(model)
    for module in model.modules():
        if not isinstance(module, StoredTensors) and any(isinstance(part, StoredTensors) for part in module.modules()):
            module.register_load_state_dict_pre_hook(check_incoming)


def unwatch_states(model: nn.Module) -> None:
    """Let torch load as it does."""
    for module in model.modules():
        remove_load_hooks(module, check_incoming)


def refuse_tangents(x: Tensor, module_name: str) -> None:
    """Refuse forward-mode differentiation, in which rounding has no gradient.

    Raises:
        UnsupportedError: `x` has a tangent, which would be lost.
    """
    if not torch.compiler.is_compiling() and unpack_dual(x).tangent is not None:
        raise UnsupportedError(
            f"Rounding has a gradient for backward alone, but `{module_name}` was called in forward-mode "
            f"differentiation. Use `torch.autograd.grad`, or differentiate what `model.dequantize()` gives."
        )

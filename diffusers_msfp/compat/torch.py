"""Internals of torch 2.13."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch._library.opaque_object import register_opaque_type
from torch._opaque_base import OpaqueBase as Opaque  # what an operator takes that is neither a tensor nor a number
from torch.nn.modules.conv import _ConvNd as ConvNd  # what all convolutions are
from torch.utils._pytree import (  # the public `torch.utils.pytree` came with 2.10 only
    tree_flatten,
    tree_flatten_with_path,
    tree_leaves,
    tree_map,
    tree_unflatten,
)

__all__ = [
    "ConvNd",
    "StatefulModule",
    "assert_later",
    "backward_pass",
    "bias_of",
    "convolve",
    "device_of",
    "empty_shell",
    "has_bf16_instructions",
    "has_int8_operators",
    "int8_conv",
    "int8_linear",
    "int8_matmul",
    "is_hooked",
    "pack_int8_conv",
    "pack_int8_linear",
    "pre_hooks",
    "put_bias",
    "put_tensor",
    "remove_hooks",
    "remove_load_hooks",
    "replace_children",
    "tensors_of",
    "tree_flatten",
    "tree_flatten_with_path",
    "tree_leaves",
    "tree_map",
    "tree_unflatten",
    "weight_of",
    "without_functions",
    "written_arguments",
]


AnyOpaque = TypeVar("AnyOpaque", bound=Opaque)

# ── processors and operators ─────────────────────────────────────────────────────────────────────────────────────


def has_bf16_instructions() -> bool:
    """Whether the CPU multiplies bfloat16 (`torch.cpu` tells of AMX only)."""
    return torch.ops.mkldnn._is_mkldnn_bf16_supported()


def has_int8_operators() -> bool:
    """Whether this build of torch has oneDNN's 8-bit operators, which Inductor uses and nobody documents."""
    return torch.backends.mkldnn.is_available() and hasattr(torch.ops.onednn, "qconv_pointwise")


def pack_int8_linear(weight: Tensor) -> Tensor:
    """`(N, K)` int8 as `int8_linear` wants it."""
    return torch.ops.onednn.qlinear_prepack(weight, None)


def int8_linear(
    x: Tensor,
    unit: float,
    zero: int,
    packed: Tensor,
    units: Tensor,
    zeros: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`unit * units[n] * Σ_k (x[m, k] - zero) * weight[n, k] + bias[n]`.

    Args:
        x (`Tensor`, `(M, K)`, uint8), packed (`Tensor`): see `pack_int8_linear`.
        units, zeros (`Tensor`, `(N,)`, float32 and int64): of the weight; zeros are 0.
        bias (`Tensor`, `(N,)` float32, *optional*).
        dtype (`torch.dtype`): of the result.
    """
    multiply = torch.ops.onednn.qlinear_pointwise.default
    return multiply(x, unit, zero, packed, units, zeros, bias, 1.0, 0, dtype, "none", [], "")


def pack_int8_conv(
    weight: Tensor,
    units: Tensor,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    shape: Sequence[int],
) -> Tensor:
    """`(N, C / groups, H, W)` int8 as `int8_conv` wants it for inputs like one of this shape."""
    return torch.ops.onednn.qconv_prepack(weight, units, 1.0, 0, stride, padding, dilation, groups, list(shape))


def int8_conv(
    x: Tensor, unit: float, zero: int, packed: Tensor, units: Tensor, zeros: Tensor, bias: Tensor | None,
    stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int, dtype: torch.dtype,
) -> Tensor:  # fmt: skip
    """The convolution's counterpart of `int8_linear`; `x` `(B, C, H, W)` uint8, channels last."""
    given = x, unit, zero, packed, units, zeros, bias, stride, padding, dilation, groups
    return torch.ops.onednn.qconv_pointwise.default(*given, 1.0, 0, dtype, "none", [], "")


def int8_matmul(x: Tensor, weight: Tensor) -> Tensor:
    """`(M, K)` and `(K, N)` int8 → int32; more than 16 rows on a GPU."""
    return torch._int_mm(x, weight)


def assert_later(condition: Tensor, message: str) -> None:
    """An assertion that a compiled model can make without waiting for the device."""
    torch._assert_async(condition, message)


def convolve(layer: ConvNd, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A convolution layer's operation with another weight, in its padding mode."""
    return layer._conv_forward(x, weight, bias)


def without_functions() -> AbstractContextManager[None]:
    """A context in which subclasses of tensors are plain tensors to Python."""
    return torch._C.DisableTorchFunctionSubclass()


def register_opaque(cls: type[AnyOpaque], guarded: Callable[[AnyOpaque], list]) -> None:
    """Let operators take objects of a class, which compiled graphs have as inputs (torch 2.13; before it had no names).

    Args:
        guarded (`Callable[[Opaque], list]`): what of an object a graph depends on; other values compile another one.
    """
    register_opaque_type(cls, typ="reference", guard_fn=guarded)


def opaque_inside(argument: AnyOpaque) -> AnyOpaque:
    """The object itself, where an operator's fake gets the compiler's stand-in for it."""
    return getattr(argument, "real_obj", argument)


# ── modules ──────────────────────────────────────────────────────────────────────────────────────────────────────


def pre_hooks(module: nn.Module) -> Iterator:
    """The hooks that run before a module; torch has no list of them."""
    yield from module._forward_pre_hooks.values()


def remove_hooks(module: nn.Module, unwanted: Callable[[object], bool]) -> bool:
    """Take off the hooks around `forward` that are not wanted any more, and say whether there were some; a handle would
    not survive a copy."""
    found = False
    for before_or_after in ("forward_pre_hooks", "forward_hooks"):
        hooks = getattr(module, f"_{before_or_after}")
        for key in [key for key, hook in hooks.items() if unwanted(hook)]:
            del hooks[key]
            getattr(module, f"_{before_or_after}_with_kwargs").pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
            found = True
    return found


def is_hooked(module: nn.Module) -> bool:
    """Whether anybody looks at what a module reads or gives."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def replace_children(parent: nn.Module, instead: Mapping[int, nn.Module]) -> None:
    """Put other modules where children stand, by `id` of the child, under any name and in containers too."""
    for name, child in [*parent._modules.items()]:
        if id(child) in instead:  # others are another thread's, which may have exchanged them since
            parent._modules[name] = instead[id(child)]


def address_says_all(x: Tensor) -> bool:
    """Whether a tensor's values lie at its address, on the CPU: not so elsewhere, of other types, or negated."""
    plain = type(x) in (Tensor, nn.Parameter) and x.device.type == "cpu"
    return plain and not (x.is_neg() or torch._is_functional_tensor(x))


def weight_of(layer: nn.Module) -> Tensor:
    """The weight of a layer of any kind; torch declares it kind by kind."""
    return cast(Tensor, layer.weight)


def bias_of(layer: nn.Module) -> nn.Parameter | None:
    """The bias of a layer of any kind; None where it has none."""
    return cast("nn.Parameter | None", layer.bias)


def device_of(model: nn.Module) -> torch.device:
    """Where a model is that says so itself, as those of diffusers and transformers do."""
    return cast(torch.device, model.device)


def put_bias(layer: nn.Module, bias: Tensor | None) -> None:
    """Give a layer of any kind another bias, or none."""
    cast(Any, layer).bias = bias


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """A module's own parameters and buffers, by name."""
    own = (*module._parameters.items(), *module._buffers.items())
    return {name: tensor for name, tensor in own if tensor is not None}


class StatefulModule(nn.Module):
    """Abstract base of modules with a say in how they are cast, saved and loaded; torch has no public names for it."""

    def exact_tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Own parameters and buffers that move with the model, but are never cast; all of them unless overridden."""
        yield from tensors_of(self).items()

    def before_move(self, fn: Callable[[Tensor], Tensor]) -> None:
        """Called before `fn` is applied to each tensor of the module."""

    def more_state(self) -> dict[str, Tensor]:
        """Tensors that a state dict has beside parameters and buffers, by name."""
        return {}

    def take_state(self, state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:  # noqa: ARG002
        """What torch is to load of a state dict whose names for this module begin with `prefix`."""
        return state

    def after_state(self) -> None:
        """Called when a state has been loaded."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "StatefulModule":
        """What `to`, `half`, `cuda` and the like come down to."""
        self.before_move(fn)
        exact = {name: tensor.data for name, tensor in self.exact_tensors()}  # a parameter is cast in place
        # pairs of adapters have five axes, in which `to(memory_format=…)` would look for a layout of pictures
        super()._apply(lambda each: fn(each.flatten(1)).view(each.shape) if each.ndim == 5 else fn(each), recurse)
        for name, before in exact.items():
            is_buffer = name in self._buffers
            moved = tensors_of(self)[name]
            if moved.dtype != before.dtype:
                back = before.to(moved.device)
                setattr(self, name, back if is_buffer else nn.Parameter(back, requires_grad=moved.requires_grad))
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.update({prefix + name: tensor for name, tensor in self.more_state().items()})

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(self.take_state(state_dict, prefix), prefix, *arguments)
        self.after_state()


def remove_load_hooks(module: nn.Module, unwanted: Callable) -> None:
    """Take off a function that `register_load_state_dict_pre_hook` put on; a handle would not survive a copy."""
    hooks = module._load_state_dict_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, "hook", None) is unwanted]:
        del hooks[key]


def put_tensor(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a tensor in the place of a parameter, which then wants no gradient, or of a buffer; shapes may differ."""
    if name in module._parameters:
        module._parameters[name] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[name] = value


def empty_shell(
    cls: type[Tensor], shape: Sequence[int], dtype: torch.dtype, device: torch.device, strides: Sequence[int] | None
) -> Tensor:
    """A tensor of a subclass that has no memory, only a shape, for `__torch_dispatch__` to fill with meaning."""
    return Tensor._make_wrapper_subclass(cls, shape, strides, dtype=dtype, device=device, requires_grad=False)


def backward_pass() -> int:
    """Which of autograd's backward passes this thread is in; -1 outside of one."""
    return torch._C._current_graph_task_id()


def written_arguments(func: Any, args: tuple, kwargs: Mapping[str, Any]) -> Iterator:
    """What an operator writes into, of its arguments and of lists among them."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[index] if index < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else (value,)


def shares_memory(part: object, whole: Tensor) -> bool:
    """Whether something is a tensor in another's memory."""
    return isinstance(part, Tensor) and part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr() != 0

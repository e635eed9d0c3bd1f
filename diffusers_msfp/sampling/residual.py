"""Which layers read the residual stream itself: a sum that no norm has scaled, as shortcuts and resampling layers do.

Such a sum grows with depth and has outliers, so 4-bit codes are too coarse for it; schemes have candidates of their own
for these layers (`schemes.LayerScheme.residual`). They are found in any architecture by following one call of the
model: a sum of two tensors of one shape belongs to the stream, and so does whatever is made of it but for norms,
products with weights and attention, which end it. What a layer gives begins a stream anew where another reads it as it
is, only moved or joined with others: as a shortcut behind a downsampling convolution does.
"""

from collections.abc import Collection
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..calibration.watch import watching_calls
from ..compat.torch import tree_leaves
from ..layers.convert import layers_by_name

SUMS = frozenset({"add", "add_", "sub", "sub_", "__add__", "__radd__", "__iadd__", "__sub__", "__isub__"})
LAYERS = frozenset({"linear"} | {f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)})
ENDS = frozenset(
    {"bilinear", "embedding", "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "einsum", "softmax"}
    | {"scaled_dot_product_attention", "multi_head_attention_forward"}
    | {"group_norm", "layer_norm", "rms_norm", "batch_norm", "instance_norm", "local_response_norm", "normalize"}
)
MOVES = frozenset(
    {"reshape", "view", "permute", "transpose", "movedim", "contiguous", "flatten", "unflatten", "squeeze", "unsqueeze"}
    | {"cat", "concat", "chunk", "split", "tensor_split", "unbind", "stack", "__getitem__", "expand", "repeat", "clone"}
    | {"to", "type", "float", "half", "bfloat16", "dropout", "dropout2d", "pad", "interpolate", "avg_pool2d"}
)
MIN_AXES = 3
"""Of a residual stream: batch, and positions and channels in any order. Sums of embeddings, `(B, C)`, are none."""


class _Following(TorchFunctionMode):
    """Remembers which tensors belong to a residual stream: sums, and what layers give as long as it is only moved."""

    def __init__(self) -> None:
        super().__init__()
        self.kinds: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor → "sum" or "layer"

    def in_stream(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim >= MIN_AXES and value in self.kinds

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ARG002
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        largest = max((leaf.numel() for leaf in read), default=0)  # a modulation's shift is added to all positions
        kinds = {self.kinds[leaf] for leaf in read if leaf in self.kinds and (name in MOVES or leaf.numel() == largest)}
        if name in LAYERS:
            kind = "layer"
        elif name in ENDS:
            kind = None
        elif "sum" in kinds or name in SUMS and len(read) == 2 and read[0].shape == read[1].shape:
            kind = "sum"
        else:
            kind = "layer" if kinds and name in MOVES else None
        for leaf in tree_leaves(result):
            self._note(leaf, kind)
        return result

    def _note(self, leaf: object, kind: str | None) -> None:
        if isinstance(leaf, Tensor) and kind:
            self.kinds[leaf] = kind
        elif isinstance(leaf, Tensor):  # of an operation in place
            self.kinds.pop(leaf, None)

    def end(self, _module: nn.Module, _args: tuple, output: object) -> None:
        """A forward hook: what this module gives is no residual sum."""
        for leaf in tree_leaves(output):
            self._note(leaf, None)


class ResidualTrace:
    """Finds the layers of a model that read a residual sum, in its next call: `before` and `after` are its hooks.

    Args:
        found (`tuple[str, ...]`, *optional*): their names, where a call has been followed already; else None.
    """

    def __init__(self, found: tuple[str, ...] | None = None) -> None:
        self.found = found
        self._seen: dict[str, None] = {}
        self._running: ExitStack | None = None

    def __deepcopy__(self, memo: dict) -> "ResidualTrace":
        return type(self)(self.found)

    def before(self, model: nn.Module, _args: tuple) -> None:
        """Begin to follow; a compiled model cannot be followed."""
        if self.found is not None or self._running is not None or torch.compiler.is_compiling():
            return
        self._seen, self._running = {}, ExitStack()
        following = self._running.enter_context(_Following())

        def look(name: str, args: tuple) -> None:
            if args and following.in_stream(args[0]):
                self._seen[name] = None

        self._running.enter_context(watching_calls(layers_by_name(model), look))
        for module in model.modules():
            if "norm" in type(module).__name__.lower():  # also those that are written out in single operations
                self._running.callback(module.register_forward_hook(following.end).remove)

    def after(self, model: nn.Module, _args: tuple, output: object) -> None:
        """The call is over; where it has failed `output` is None, and the next one is followed."""
        if self._running is None:
            return
        self._running.close()
        self._running = None
        if output is not None:
            self.found = tuple(self._seen)
            apply_residual(model, self.found)


def apply_residual(model: nn.Module, names: Collection[str]) -> None:
    """Let the layers of these names try the formats that their scheme has for residual sums."""
    for name, layer in layers_by_name(model).items():
        layer.expect_sum(name in names)

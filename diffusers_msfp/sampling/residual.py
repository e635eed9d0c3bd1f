"""Which layers read the residual stream itself: a sum that no norm has scaled, as shortcuts and resampling layers do.

Such a sum grows with depth and has outliers, so 4-bit codes are too coarse for it; schemes have candidates of their own
for these layers (`schemes.LayerScheme.residual`). They are found in any architecture by following one call of the
model: a sum of two tensors of one shape belongs to the stream, and so does whatever is made of it but for norms,
products with weights and attention, which end it. What a layer gives begins a stream anew where another reads it as it
is, only moved or joined with others: as a shortcut behind a downsampling convolution does.
"""

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..calibration.watch import watching_calls
from ..compat.torch import remove_hooks, tree_leaves
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
    """Tells a model's layers whether they read residual sums, in its next call; `before` and `after` are its hooks.

    Layers keep what they are told (`QuantLayer.input_is_sum`), so nothing is left to do after one call.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._running: ExitStack | None = None

    def __deepcopy__(self, memo: dict) -> "ResidualTrace":
        return type(self)()

    def before(self, model: nn.Module, _args: tuple) -> None:
        """Begin to follow; a compiled model cannot be followed."""
        if self._running is not None or torch.compiler.is_compiling():
            return
        self._seen, self._running = set(), ExitStack()
        following = self._running.enter_context(_Following())

        def look(name: str, args: tuple) -> None:
            if args and following.in_stream(args[0]):
                self._seen.add(name)

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
            for name, layer in layers_by_name(model).items():
                layer.expect_sum(name in self._seen)
            stop_following(model)


def follow_next_call(model: nn.Module) -> None:
    """Find out in the model's next call which layers read residual sums, where they have to know and do not."""
    if any(layer.sum_unknown for layer in layers_by_name(model).values()):
        trace = ResidualTrace()
        model.register_forward_pre_hook(trace.before)
        model.register_forward_hook(trace.after, always_call=True)


def stop_following(model: nn.Module) -> None:
    """Follow no call any more."""
    remove_hooks(model, lambda hook: isinstance(getattr(hook, "__self__", None), ResidualTrace))

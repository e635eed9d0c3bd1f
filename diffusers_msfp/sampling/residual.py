"""Which layers read the residual stream itself: a sum that no norm has scaled, as shortcuts and resampling layers do.

Such a sum grows with depth and has outliers, so 4-bit codes are too coarse for it; schemes have candidates of their own
for these layers (`schemes.LayerScheme.residual`). They are found in any architecture by following one call of the
model: a sum of two tensors of one shape belongs to the stream, and so does whatever is made of it but for norms,
products with weights and attention, which end it. What a layer gives begins a stream anew where another reads it as it
is, only moved or joined with others: as a shortcut behind a downsampling convolution does. A norm's output that is
scaled and shifted is none, though its shift may have as many positions as it has itself.
"""

import threading
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from ..calibration.watch import watching_calls
from ..compat.modules import leave_function_mode
from ..compat.torch import remove_hooks, tree_leaves
from ..layers import QuantLayer
from ..layers.convert import layers_by_name

SUMS = frozenset({"add", "add_", "sub", "sub_", "__add__", "__radd__", "__iadd__", "__sub__", "__isub__"})
LAYERS = frozenset({"linear"} | {f"conv{transposed}{n}d" for transposed in ("", "_transpose") for n in (1, 2, 3)})
PRODUCTS = frozenset({"mul", "mul_", "__mul__", "__rmul__", "__imul__"})
NORMS = frozenset({f"{kind}_norm" for kind in ("group", "layer", "rms", "batch", "instance")})
ENDS = frozenset(
    {"bilinear", "embedding", "matmul", "__matmul__", "bmm", "baddbmm", "addmm", "einsum", "softmax"}
    | {"scaled_dot_product_attention", "multi_head_attention_forward"}
    | {"local_response_norm", "normalize"}
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
        self.kinds: WeakIdKeyDictionary = WeakIdKeyDictionary()  # tensor → "sum", "layer", "normed", then "scaled"

    def in_stream(self, value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim >= MIN_AXES and self.kinds.get(value) in ("sum", "layer")

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:  # noqa: ARG002
        result = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", "")
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        largest = max((leaf.numel() for leaf in read), default=0)  # a modulation's shift is added to all positions
        kinds = {self.kinds[leaf] for leaf in read if leaf in self.kinds and (name in MOVES or leaf.numel() == largest)}
        kind = None
        if name in LAYERS:
            kind = "layer"
        elif name in NORMS:
            kind = "normed"
        elif name in ENDS:
            pass
        elif "sum" in kinds:
            kind = "sum"
        elif name in SUMS and len(read) == 2 and read[0].shape == read[1].shape:
            kind = None if "scaled" in kinds else "sum"
        elif name in PRODUCTS and not kinds.isdisjoint(("normed", "scaled")):
            kind = "scaled"
        elif name in MOVES:
            kind = next((each for each in ("layer", "normed", "scaled") if each in kinds), None)
        for leaf in tree_leaves(result):
            self._note(leaf, kind)
        return result

    def _note(self, leaf: object, kind: str | None) -> None:
        if isinstance(leaf, Tensor) and kind:
            self.kinds[leaf] = kind
        elif isinstance(leaf, Tensor):  # of an operation in place
            self.kinds.pop(leaf, None)

    def end(self, _module: nn.Module, _args: tuple, output: object) -> None:
        """A forward hook: what this module, a norm, gives is no residual sum."""
        for leaf in tree_leaves(output):
            self._note(leaf, "normed")


class ResidualTrace:
    """Tells a model's layers whether they read residual sums, in its next call; `before` and `after` are its hooks.

    Layers keep what they are told (`QuantLayer.input_is_sum`), so nothing is left to do after one call. It follows one
    call at a time: what other threads do meanwhile is no part of it.
    """

    def __init__(self) -> None:
        self._seen: set[str] = set()
        self._running: ExitStack | None = None
        self._thread: int | None = None

    def __getstate__(self) -> dict:
        return vars(type(self)())  # copies follow a call of their own

    def before(self, model: nn.Module, _args: tuple) -> None:
        """Begin to follow; a compiled model cannot be followed."""
        if torch.compiler.is_compiling() or self.is_elsewhere:
            return
        self.close()  # of a call that was interrupted, after which torch runs no hook
        self._seen, self._running, self._thread = set(), ExitStack(), threading.get_ident()
        following = _Following()
        self._running.callback(leave_function_mode, following)
        following.__enter__()

        def look(name: str, args: tuple) -> None:
            if args and following.in_stream(args[0]):
                self._seen.add(name)

        self._running.enter_context(watching_calls(layers_by_name(model), look))
        for module in model.modules():
            if "norm" in type(module).__name__.lower():  # also those that are written out in single operations
                self._running.callback(module.register_forward_hook(following.end).remove)

    def after(self, model: nn.Module, _args: tuple, output: object) -> None:
        """The call is over; where it has failed `output` is None, and the next one is followed."""
        if self._running is None or self.is_elsewhere:
            return
        self.close()
        if output is not None:
            for name, layer in layers_by_name(model).items():
                layer.expect_sum(name in self._seen)
            stop_following(model)

    @property
    def is_elsewhere(self) -> bool:
        """Whether it follows a call of another thread, whose mode that thread alone can leave."""
        others = (thread.ident for thread in threading.enumerate() if thread is not threading.current_thread())
        return self._running is not None and self._thread in others

    def close(self) -> None:
        """Follow no longer."""
        running, self._running = self._running, None
        if running is not None:
            running.close()


def follow_next_call(model: nn.Module) -> None:
    """Find out in the model's next call which layers read residual sums, where they have to know and do not."""
    for part in _called(model):
        if part is not model and isinstance(part, QuantLayer):
            part.expect_sum(True)  # between an autoencoder's parts: it reads what other layers give
        elif any(layer.sum_unknown for layer in layers_by_name(part).values()):
            trace = ResidualTrace()
            part.register_forward_pre_hook(trace.before)
            part.register_forward_hook(trace.after, always_call=True)


def _called(model: nn.Module) -> list[nn.Module]:
    """What pipelines call of a model: itself; of an autoencoder its methods, which call its parts."""
    return [model, *model.children()] if hasattr(model, "decode") else [model]


def stop_following(model: nn.Module) -> None:
    """Follow no call any more; one that another thread makes is followed to its end."""

    def is_done(hook: object) -> bool:
        trace = getattr(hook, "__self__", None)
        if not isinstance(trace, ResidualTrace) or trace.is_elsewhere:
            return False
        trace.close()
        return True

    for part in _called(model):
        remove_hooks(part, is_done)

"""What every engine is: a name, the layers it refuses and why, and a way to make the others ready."""

import itertools
import weakref
from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from torch import Tensor

from ..errors import NonFiniteError
from ..numerics import QParams
from ..numerics.rounding import check_finite
from ..numerics.route import Route
from .grid import InputGrid

MEMORY_MODES = ("fast", "low")


class Engine(ABC):
    """Abstract base of the engines.

    Args:
        memory (`str`): `"fast"` keeps what a layer needs ready; `"low"` keeps weights packed and expands them per call.
    """

    name: ClassVar[str]

    def __init__(self, memory: str = "fast") -> None:
        self.memory = memory

    @abstractmethod
    def refusal(self, layer) -> str | None:
        """Why this engine cannot run a layer exactly, on this machine; None if it can."""

    @abstractmethod
    def prepare(self, layer) -> "PreparedLayer | None":
        """The layer made ready, or None to leave it to the reference."""

    def settle(self, *_call) -> None:  # noqa: B027 – most leave nothing to be found out
        """Raise what layers found but did not wait for; a forward hook of the whole model."""


_PREPARED: "weakref.WeakValueDictionary[int, PreparedLayer]" = weakref.WeakValueDictionary()
_handles = itertools.count()


class PreparedLayer(ABC):
    """Abstract base of layers made ready: knows the layer and its input's grid for each adapter.

    A compiled model calls it as one operator, `diffusers_msfp::run_layer`, that the compiler does not look into.

    Args:
        layer: a `nn.QuantLayer`.
        keep (`bool`): keep expanded weights instead of making them anew in each call.
    """

    reads_codes = False  # whether it takes codes that another module made with its grid, in `from_codes`

    def __init__(self, layer, keep: bool) -> None:
        self.layer, self._keep = layer, keep
        self._handle = next(_handles)
        _PREPARED[self._handle] = self
        self._grids: dict[tuple[int, bool], InputGrid] = {}
        self._weights: dict[tuple, Tensor] = {}

    def __call__(self, x: Tensor, bank: int | Tensor = 0, adapter: int | Tensor = 0) -> Tensor:
        """The layer's output for a float input, in its dtype, with one bank and the input's grid of one adapter."""
        if torch.compiler.is_compiling():
            index = next((each for each in (bank, adapter) if isinstance(each, Tensor)), None)
            numbers = [each if isinstance(each, int) else -1 for each in (bank, adapter)]
            return torch.ops.diffusers_msfp.run_layer(x, self._handle, *numbers, index)
        return self.run(x, bank, adapter)

    @abstractmethod
    def run(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
        """What `__call__` does when nothing is being compiled."""

    def nothing(self, x: Tensor) -> Tensor:
        """An output of the right shape and dtype without worth, for inputs without elements or values."""
        return self.layer.compute(x, x.new_empty(self.layer.logical_shape), None)

    def grid(self, adapter: int | Tensor = 0) -> InputGrid:
        """The input's quantizer under an adapter."""
        routing = self.layer.routing
        key = (int(adapter), routing is not None and bool(routing.strength))
        if key not in self._grids:
            self._grids[key] = self.make_grid(self.layer.input_qparams(key[0]))
        return self._grids[key]

    def make_grid(self, qparams: QParams) -> InputGrid:
        """The quantizer as kernels read it."""
        return InputGrid.of(qparams)

    def weight(self, bank: int | Tensor, *how) -> Tensor:
        """A bank's weight as a kernel wants it."""
        key = (int(bank), *how)
        if key in self._weights:
            return self._weights[key]
        weight = self.expand(*key)
        if self._keep:
            self._weights[key] = weight
        return weight

    @property
    def kept_bytes(self) -> int:
        """Memory of the expanded weights that it keeps, in bytes."""
        return sum(weight.numel() * weight.element_size() for weight in self._weights.values())

    @abstractmethod
    def expand(self, bank: int, *how) -> Tensor:
        """Make a bank's weight from its packed codes."""

    def refuse_infinite(self, x: Tensor) -> None:
        """Say what is wrong with an input that a kernel found not to be finite."""
        where = f"The input of layer `{self.layer.module_name}`"
        check_finite(x, where)
        raise NonFiniteError(f"{where} must be finite.")


def weight_unit(layer) -> Tensor:
    """Real size of a lattice step of each output channel, `(C,)` float32."""
    return QParams.unchecked(layer.weight_format, layer.weight_scale, torch.zeros_like(layer.weight_scale)).unit


@torch.library.custom_op("diffusers_msfp::run_layer", mutates_args=())
def run_layer(x: Tensor, handle: int, bank: int, adapter: int, index: Tensor | None) -> Tensor:
    """A prepared layer as an operator; where `bank` or `adapter` is -1, `index` says it; `(B,)` for rows."""
    prepared = _PREPARED[handle]

    def run(rows: Tensor, index: Tensor | int | None) -> Tensor:
        return prepared.run(rows, *(index if each < 0 else each for each in (bank, adapter)))

    y = Route(index).apply(run, x, 0) if index is not None and index.ndim else run(x, index)
    return y.contiguous(memory_format=_memory_format(x))


@run_layer.register_fake
def _(x: Tensor, handle: int, bank: int, adapter: int, index: Tensor | None) -> Tensor:  # noqa: ARG001
    return torch.empty_like(_PREPARED[handle].nothing(x), memory_format=_memory_format(x))


def _memory_format(x: Tensor) -> torch.memory_format:
    return torch.channels_last if x.ndim == 4 else torch.contiguous_format

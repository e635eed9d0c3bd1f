"""What every engine is: a name, the layers it refuses and why, and a way to make the others ready."""

import threading
from abc import ABC, abstractmethod
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..compat.modules import tensors_state
from ..compat.torch import tree_leaves
from ..errors import NonFiniteError, UnsupportedError
from ..layers import QuantLayer
from ..numerics import Codes, QParams
from ..numerics.groups import multiply_groups_
from ..numerics.rounding import check_finite
from . import kernels
from .compiled import LayerReference, call_layer
from .grid import InputGrid
from .kernels import torch_kernels

MEMORY_MODES = ("fast", "low")

_MAKING = threading.Lock()


class Engine(ABC):
    """Abstract base of the engines.

    Args:
        memory (`str`): `"fast"` keeps what a layer needs ready; `"low"` keeps weights packed and expands them per call.
    """

    name: ClassVar[str]
    measured_on: ClassVar[frozenset[str]] = frozenset()
    """Kinds of devices on which it was timed, see `kind_of`; of others only correctness is known."""

    def __init__(self, memory: str = "fast") -> None:
        self.memory = memory

    @abstractmethod
    def refusal(self, layer: QuantLayer) -> str | None:
        """Why this engine cannot run a layer exactly, on this machine; None if it can."""

    @abstractmethod
    def prepare(self, layer: QuantLayer) -> "PreparedLayer | None":
        """The layer made ready, or None to leave it to the reference."""

    def check_inputs(self, *_call: object) -> None:  # noqa: B027 – most leave nothing to be found out
        """Raise what layers found but did not wait for; a forward hook of the whole model."""


def kind_of(device: torch.device) -> str:
    """A device's kind: like `cuda`, of a CPU with the architecture."""
    return f"cpu {torch.cpu.get_capabilities().get('architecture')}" if device.type == "cpu" else device.type


class PreparedLayer(ABC):
    """Abstract base of layers made ready: knows the layer and its input's grid for each adapter.

    A compiled model calls it as one operator that the compiler does not look into, see `compiled`. `from_codes`,
    `quantize` and `hand_over` are asked of layers that `reads_codes` alone; the others have none, and raise.

    Args:
        layer: a `nn.QuantLayer`.
        keep (`bool`): keep expanded weights instead of making them anew in each call.
    """

    def __init__(self, layer: QuantLayer, keep: bool) -> None:
        self.layer, self._keep, self.made_of = layer, keep, tensors_state(layer)
        self._reference = LayerReference(self)
        self._grids: dict[tuple[int, bool], Any] = {}
        self._weights: dict[tuple, Any] = {}
        self._adapters: Any = layer.adapters if layer.adapters is not None and layer.adapters.reads_codes else None
        self._made_from: tuple | None = None

    def __call__(self, x: Tensor, bank: int | Tensor = 0, adapter: int | Tensor = 0) -> Tensor:
        """The layer's output for a float input, in its dtype, with one bank and the input's grid of one adapter."""
        if torch.compiler.is_compiling():
            return call_layer(x, self._reference, bank, adapter)
        return self.run_without_autocast(x, bank, adapter)

    def run_without_autocast(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
        """As `run`, also under autocast, which would cast whole numbers."""
        device = x.device.type
        if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                return self.run(x, bank, adapter)
        return self.run(x, bank, adapter)

    def __getstate__(self) -> dict:
        """For copies and pickles: without expanded weights, and without the reference to this one."""
        return {**vars(self), "_weights": {}, "_reference": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        self._reference = LayerReference(self)

    def current(self) -> "PreparedLayer":
        """This, or what the engine makes now of a layer whose tensors were written to or exchanged since.

        Layers look for that in each call, compiled graphs of them do not.
        """
        if self.made_of == tensors_state(self.layer):
            return self
        with _MAKING:  # a graph may have been called in several threads
            made = self.layer.prepared
            if made is None or made is self:
                self.layer.prepare()
                made = self.layer.prepared
        if made is None:
            raise UnsupportedError(
                f"A compiled graph must be given layers that an engine can run, but no engine can run what "
                f"`{self.layer.module_name}` has become since. Compile the model again."
            )
        anew = cast(PreparedLayer, made)
        self._reference.refer(anew)  # a graph may have more calls of the layer, and reads its references once
        anew._reference = self._reference
        return anew

    @property
    def reads_codes(self) -> bool:
        """Whether another module may quantize its input, with its grid."""
        return False

    @abstractmethod
    def run(self, x: Tensor, bank: int | Tensor, adapter: int | Tensor) -> Tensor:
        """What `__call__` does when nothing is being compiled."""

    def takes(self, codes: Codes) -> bool:  # noqa: ARG002
        """Whether `from_codes` would be right for these: they are on the grid that the layer has now."""
        return False

    def from_codes(self, codes: Codes) -> Tensor:
        """As the layer, for an input that another module has quantized for it and that it `takes`."""
        raise NotImplementedError

    def quantize(self, x: Tensor, adapter: int) -> Tensor:
        """Bytes of a dense float input on `grid(adapter)`, for `hand_over`, of a layer that `reads_codes`."""
        raise NotImplementedError

    def hand_over(self, values: Tensor, adapter: int, dtype: torch.dtype) -> Codes:
        """Bytes that another module made with `grid(adapter)` from floats of this dtype, for `from_codes`."""
        raise NotImplementedError

    def nothing(self, x: Tensor) -> Tensor:
        """An output of the right shape and dtype without worth, for inputs without elements or values."""
        return self.layer.compute(x, x.new_empty(self.layer.logical_shape), None)

    def grid(self, adapter: int | Tensor = 0) -> Any:
        """The input's quantizer under an adapter."""
        routing = self.layer.routing
        key = (int(adapter), routing is not None and bool(routing.strength))
        if key not in self._grids:
            self._grids[key] = self.make_grid(self.layer.input_qparams(key[0]))
        return self._grids[key]

    def make_grid(self, qparams: QParams) -> Any:
        """The quantizer as kernels read it: an `InputGrid`, or what an engine has of its own."""
        return InputGrid.of(qparams)

    def weight(self, bank: int | Tensor, *how: Any) -> Any:
        """A bank's weight as a kernel wants it, or the sum with an adapter that reads codes."""
        key = (int(bank), *how)
        if self._adapters is not None:
            made_from = self._adapters.made_from(self.layer, self._made_from)
            if made_from != self._made_from:
                self._weights, self._made_from = {}, made_from
        if key in self._weights:
            return self._weights[key]
        weight = self.expand(*key)
        if self._keep:
            self._weights[key] = weight
        return weight

    @property
    def kept_bytes(self) -> int:
        """Memory of the expanded weights that it keeps, in bytes."""
        return sum(part.numel() * part.element_size() for part in tree_leaves(list(self._weights.values())))

    @abstractmethod
    def expand(self, *bank_and_how: Any, **_: Any) -> Any:
        """Make a bank's weight from its packed codes: a tensor, or several."""

    def refuse_infinite(self, x: Tensor) -> None:
        """Say what is wrong with an input that a kernel found not to be finite."""
        where = f"The input of layer `{self.layer.module_name}`"
        check_finite(x, where)
        raise NonFiniteError(f"{where} must be finite.")


def used_integers(layer: QuantLayer, bank: int, table: Tensor) -> tuple[Tensor, Tensor]:
    """Integers of the weight that a call uses, see `QuantLayer.used_weight`, and their unit.

    Args:
        table (`Tensor`, `(2**bits,)`): see `weight_integers`.

    Returns:
        `tuple[Tensor, Tensor]`: `logical_shape`, dtype of the table; `(C,)` float32.
    """
    if layer.has_sums:
        integers, unit = cast(Any, layer.adapters).integers(layer, bank)
        return integers.to(table.dtype), unit
    return weight_integers(layer, bank, table), weight_unit(layer)


def weight_integers(layer: QuantLayer, bank: int, table: Tensor) -> Tensor:
    """A bank's lattice integers, times the multipliers of their groups where there are some.

    Args:
        table (`Tensor`, `(2**bits,)`): lattice integer of each code; its dtype is the result's.

    Returns:
        `Tensor`, `logical_shape`.
    """
    packed = layer.packed_bank(bank)
    expand = kernels.expand if packed.device.type == "cpu" else torch_kernels.expand
    matrix = expand(packed, layer.weight_format.bits, layer.matrix_shape[1], table.to(packed.device))
    if layer.group_size is not None:
        multiply_groups_(matrix, layer.multipliers(), layer.group_size)
    return matrix.view(layer.logical_shape)


def weight_unit(layer: QuantLayer) -> Tensor:
    """Real size of a lattice step of each output channel, `(C,)` float32."""
    return layer.integer_unit()[0]

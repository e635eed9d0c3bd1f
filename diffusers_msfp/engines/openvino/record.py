"""Record a model's call as a graph of OpenVINO."""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...compat.modules import run_without_values, shadow_copy
from ...errors import UnsupportedError, first_line
from ...layers import QuantLayer
from ..fusion.fuse import undo
from ..fusion.processors import use_engine_attention
from .call import GraphCall, OutputForm
from .choices import Choice
from .layers import Inputs, graph_layer
from .soundness import install_checks

logger = logging.getLogger(__name__)

_RANDOM = ("aten::rand", "aten::bernoulli", "aten::multinomial", "aten::normal")


UNSOUND = "NaN, infinity, or a row that a table does not have came up"
LayerInGraph = Callable[[QuantLayer, Inputs], nn.Module]
"""Makes of a quantized layer what stands in a graph for it."""


class UnsoundError(UnsupportedError):
    """A call that no graph can be made from; others of the same shapes may be sound."""


class Recorder(nn.Module):
    """A model for recording: takes and returns tensors alone.

    Args:
        model (`nn.Module`): not changed.
        call (`GraphCall`): whose arguments the tensors are.
        choice (`Choice`): of that call.
        layer_in_graph (`LayerInGraph`, *optional*): of each quantized layer; `graph_layer`, OpenVINO's, by default.
        hooks (`Sequence[Callable]`): forward hooks on the whole model that belong to the graph; others stay outside.
    """

    def __init__(
        self,
        model: nn.Module,
        call: GraphCall,
        choice: Choice,
        layer_in_graph: LayerInGraph | None = None,
        hooks: Sequence[Callable] = (),
    ) -> None:
        super().__init__()
        self._inputs, self._call, self._choice = Inputs(), call, choice
        self._is_watched = layer_in_graph is None
        self.form: OutputForm | None = None

        def instead(module: nn.Module) -> nn.Module | None:
            if not isinstance(module, QuantLayer):
                return None
            return layer_in_graph(module, self._inputs) if layer_in_graph else graph_layer(module, choice, self._inputs)

        self.model = shadow_copy(model, instead, own_float32, left_out=("forward", "prepared"))
        undo(self.model)
        use_engine_attention(self.model, wanted=False)
        for hook in hooks:
            self.model.register_forward_hook(hook, with_kwargs=True)
        if self._is_watched:
            install_checks(self.model, lambda: self._inputs.soundness)
        self.eval()

    def tensors(self) -> list[Tensor]:
        """The inputs of the recorded call; what the timestep chooses is the last."""
        chosen = [] if self._choice.chosen is None else [self._choice.chosen]
        given = [as_float32(each.detach()).contiguous() for each in self._call.tensors]
        return [*(each.clone() if each.is_inference() else each for each in given), *chosen]

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The tensors of the model's output, float32; in the engine's own graphs their soundness behind them."""
        number = len(self._call.tensors)
        self._inputs.begin(tensors[number] if len(tensors) > number else None)
        output = self.model(**self._call.arguments(tensors[:number]))
        sound = [self._inputs.soundness.total()] if self._is_watched else []
        self._inputs.begin(None)
        self.form = OutputForm.of(output)
        return *self.form.tensors(output), *sound


def as_float32(tensor: Tensor) -> Tensor:
    """Floats as float32, anything else as it is."""
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


class Recording(NamedTuple):
    """A recorded call.

    Args:
        graph (`openvino.Model`): shares its weights with `traced`, which must live as long.
        recorder (`Recorder`), tensors (`list[Tensor]`): what was recorded.
        traced (`torch.jit.ScriptModule`).
    """

    graph: Any
    recorder: Recorder
    tensors: list[Tensor]
    traced: Any

    @property
    def form(self) -> OutputForm:
        """Of the output."""
        return cast(OutputForm, self.recorder.form)

    @torch.no_grad()
    def in_torch(self) -> list[Tensor]:
        """The output as torch computes it, float32."""
        return list(self.recorder(*self.tensors))[: self.form.number]


def own_float32(tensor: Tensor) -> Tensor:
    """A copy in float32: compiled graphs go on reading the memory of some constants, which must not be the model's."""
    return tensor.to(torch.float32, copy=True) if tensor.is_floating_point() else tensor.clone()


@torch.no_grad()
def record(recorder: Recorder) -> Recording:
    """A model's call as a graph of static shapes.

    Args:
        recorder (`Recorder`): of a model that has no `obstacles`.

    Raises:
        UnsupportedError: the model branches by the values of tensors, draws random numbers, or has operations that
            OpenVINO does not know.
        UnsoundError: the call asks for a row that a table does not have.
    """
    from ...compat.openvino import graph_of

    tensors = recorder.tensors()
    try:
        refuse_branches(recorder, tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of shapes that become constants, which they are meant to
            traced = torch.jit.trace(recorder, tuple(tensors), check_trace=False)
            _refuse_random(traced)
            graph = graph_of(traced, tensors)
    except UnsupportedError:
        raise
    except IndexError as error:
        raise UnsoundError(UNSOUND) from error
    except Exception as error:  # torch's tracer and OpenVINO's converter raise what they like
        raise UnsupportedError(f"it could not be recorded ({first_line(error)})") from error
    return Recording(graph, recorder, tensors, traced)


def refuse_branches(recorder: Recorder, tensors: list[Tensor]) -> None:
    """A recording has one branch of each; which one may depend on shapes, but not on values.

    Raises:
        UnsupportedError: it does.
    """
    try:
        run_without_values(recorder, tensors)
    except UnsupportedError:
        raise
    except Exception as error:
        found = f"{type(error).__name__}: {first_line(error)}"
        raise UnsupportedError(f"it looks into tensors while it runs, or lacks inputs ({found})") from error


def _refuse_random(traced: Any) -> None:
    for node in traced.inlined_graph.nodes():
        if node.kind().startswith(_RANDOM):
            raise UnsupportedError(f"it draws random numbers ({node.kind()})")

"""A model whose calls run as graphs: what stands in the place of its forward, and how it is put there."""

import logging
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from ...compat.accelerate import SET_BY_HOOKS, only_moves
from ...compat.digest import digest_of
from ...compat.modules import Snapshot
from ...compat.wrappers import forget_compiled
from ...errors import UnsupportedError
from ...layers import QuantLayer
from ...layers.convert import quant_layers
from ...sampling.timestep import timestep_argument
from .. import tuning
from . import installed, obstacles, runtime
from .call import GraphCall
from .choices import Choice, choose, following
from .measured import GRAPH, LAYERS, is_faster, question_of, structure_of
from .record import UNSOUND, Recorder, Recording, UnsoundError, as_float32, record

logger = logging.getLogger(__name__)

UNMEASURED = "it was not measured to be faster as a graph"
MAX_GRAPHS = 8
"""Kept in memory at once, of all models; each has the weights as bytes. Others are read from disk again."""

_TRANSIENT = ("prepared", "_running", "_latest")
_OWN = ("input_check", *SET_BY_HOOKS)
_HELPERS = ("processor",)
_BESIDE = ("engine", "engine_set", "routing", "quantization_config", "hf_quantizer", "observation", "feeds")
"""What a model has that its result does not depend on, or that its layers' own attributes and tensors say."""
_GRAPHS: "OrderedDict[str, runtime.CompiledGraph]" = OrderedDict()
_LOCK = threading.RLock()
_LATEST: "weakref.WeakKeyDictionary[nn.Module, weakref.ref[GraphForward]]" = weakref.WeakKeyDictionary()


class Seen(NamedTuple):
    """A model as it was looked at.

    Args:
        snapshot (`Snapshot`): taken before all else was found out.
        following (`list[QuantLayer]`): layers that follow the timestep.
        obstacle (`str`, *optional*): why the model cannot be a graph.
        digest (`str`): of all that it computes with; empty where there is an obstacle.
    """

    snapshot: Snapshot
    following: list[QuantLayer]
    obstacle: str | None
    digest: str

    @classmethod
    def of(cls, model: nn.Module) -> "Seen":
        """Of a model as it is now."""
        snapshot = Snapshot(model, _TRANSIENT, _OWN, _HELPERS)
        obstacle = obstacles.of_model(model, cast(torch.dtype, model.dtype))
        digest = ""
        if obstacle is None:
            try:
                digest = digest_of(model, obstacles.KNOWN, (*_TRANSIENT, *_OWN, *_BESIDE), _HELPERS)
            except UnsupportedError as error:
                obstacle = str(error)
        return cls(snapshot, following([layer for _, layer in quant_layers(model)]), obstacle, digest)


class GraphForward:
    """Runs a model's calls as graphs, and in torch what no graph can hold.

    Graphs belong to what a model computes with, not to the model object: copies and models that are loaded twice share
    them. What could change a model's result without anybody saying so is looked at before every call.

    Args:
        model (`nn.Module`): whose forward this is.
        before (`Callable`, *optional*): a forward of its own that it had, such as accelerate's.
        only_if_faster (`bool`): calls run as graphs, without a word, only where `compare` has found that to be faster.

    Attributes:
        latest (`str`, *optional*): why the latest call ran in torch; None if it ran as a graph.
        is_retired (`bool`): another engine was chosen, but somebody's forward still calls this one.
    """

    def __init__(self, model: nn.Module, before: Callable | None = None, only_if_faster: bool = False) -> None:
        self.model, self._before, self.only_if_faster = model, before, only_if_faster
        self._structure = ""
        self._seen: Seen | None = None
        self._looking = threading.Lock()
        self.latest: str | None = UNMEASURED if only_if_faster else None
        self.is_retired = False
        self._failed: dict[str, str] = {}

    def __deepcopy__(self, memo: dict) -> "GraphForward":
        import copy

        return GraphForward(copy.deepcopy(self.model, memo), copy.deepcopy(self._before, memo), self.only_if_faster)

    def __reduce__(self) -> tuple:
        return GraphForward, (self.model, self._before, self.only_if_faster)

    @property
    def __wrapped__(self) -> Callable:
        """For those who look at the signature of a model's forward."""
        return self._before or type(self.model).forward.__get__(self.model)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the model's forward."""
        traced = torch.compiler.is_compiling() or torch.compiler.is_exporting() or torch.jit.is_tracing()
        if traced or self.is_retired:
            return self.__wrapped__(*args, **kwargs)
        call: Any = GraphCall.of(self.model, args, kwargs, float_times=True) if self.only_if_faster else None
        if call is not None and not is_faster(self.question(call)):
            self.latest = UNMEASURED
            return self.__wrapped__(*args, **kwargs)
        seen, obstacle = self._look()
        if seen is not None and obstacle is None:
            call = call or GraphCall.of(self.model, args, kwargs, float_times=True)
            dtype = cast(torch.dtype, self.model.dtype)
            obstacle = obstacles.of_call(self.model, call, dtype)
        if seen is not None and obstacle is None:
            choice = choose(seen.following)
            if choice is None:
                obstacle = "its samples are at timesteps for which different weights or parameters are chosen"
            else:
                graph, obstacle = self._graph(seen, call, choice, dtype)
        output = None
        if obstacle is None:
            output = run(cast(runtime.CompiledGraph, graph), call, cast(Choice, choice), dtype)
            obstacle = UNSOUND if output is None else None
        self._say(obstacle)
        return output if obstacle is None else self.__wrapped__(*args, **kwargs)

    def why_in_torch(self) -> str | None:
        """Why calls run in torch now, whatever their arguments; None if they run as graphs."""
        if (reason := installed.why_missing()) is not None:
            return reason
        return self.latest if self.only_if_faster else self._look()[1]

    def question(self, call: GraphCall) -> str:
        """What a machine is asked about a call."""
        if not self._structure:
            self._structure = structure_of(self.model, [layer for _, layer in quant_layers(self.model)])
        return question_of(self.model, self._structure, call.tensors)

    def _look(self) -> tuple[Seen | None, str | None]:
        """The model as it is now, looked at anew only where it has changed, and why it cannot be a graph."""
        with self._looking:
            if self._seen is None or not self._seen.snapshot.holds():
                if (reason := installed.why_missing()) is not None:
                    return None, reason
                self._seen = Seen.of(self.model)
            if self._before is not None and not only_moves(self._before, self.model):
                return None, "somebody has put another forward on it"
            return self._seen, self._seen.obstacle

    def _graph(
        self, seen: Seen, call: GraphCall, choice: Choice, dtype: torch.dtype
    ) -> tuple[runtime.CompiledGraph | None, str | None]:
        """The graph of a call, or why there is none."""
        short = f"{seen.digest} {call.key} {choice.key} {dtype} {torch.get_num_threads()}"
        with _LOCK:
            if short in _GRAPHS:
                _GRAPHS.move_to_end(short)
                return _GRAPHS[short], None
            if short in self._failed:
                return None, self._failed[short]
            try:
                graph = self._make(seen, call, choice, dtype)
            except UnsupportedError as error:
                if not isinstance(error, UnsoundError):
                    self._failed[short] = str(error)
                return None, str(error)
            _GRAPHS[short] = graph
            while len(_GRAPHS) > MAX_GRAPHS:
                _GRAPHS.popitem(last=False)
            return graph, None

    def _make(self, seen: Seen, call: GraphCall, choice: Choice, dtype: torch.dtype) -> runtime.CompiledGraph:
        precision = installed.precision_of(dtype)
        key = runtime.key_of(seen.digest, call.key, choice.key, str(dtype), precision=precision)
        shape = "×".join(map(str, call.tensors[0].shape))
        describe = f"{type(self.model).__name__}, input {shape}"
        make = lambda: self._record(seen, call, choice)  # noqa: E731
        return runtime.obtain(key, precision, describe, make, runtime.check, only_stored=self.only_if_faster)

    def _record(self, seen: Seen, call: GraphCall, choice: Choice) -> Recording:
        with torch.inference_mode(False):  # whose tensors do not say what was written to them
            recording = record(Recorder(self.model, call, choice))
        if not seen.snapshot.holds():
            raise UnsupportedError("it was changed while it was recorded")
        return recording

    def _say(self, obstacle: str | None) -> None:
        """One line where calls leave the graph, and one where they come back."""
        if obstacle == self.latest or self.only_if_faster:
            self.latest = obstacle
            return
        name = type(self.model).__name__
        if obstacle is not None:
            logger.warning("%s runs in torch, not as OpenVINO's graph: %s.", name, obstacle)
        else:
            logger.warning("%s runs as OpenVINO's graph again.", name)
        self.latest = obstacle


def run(graph: runtime.CompiledGraph, call: GraphCall, choice: Choice, dtype: torch.dtype) -> Any:
    """A call by its graph; the output as the model's own, or None where the graph has none."""
    chosen = [] if choice.chosen is None else [choice.chosen]
    outputs = graph([*map(as_float32, call.tensors), *chosen])
    if outputs is None:
        return None
    tensors = [each.to(dtype) if each.is_floating_point() else each for each in outputs]
    return tuple(tensors) if call.as_tuple else graph.form.filled(tensors)


def install(model: nn.Module, only_if_faster: bool = False) -> None:
    """Let a denoiser's calls run as graphs; nothing happens to models that take no timestep, such as text encoders."""
    remove(model)
    if timestep_argument(model).name is None:
        return
    vars(model)["forward"] = forward = GraphForward(model, vars(model).get("forward"), only_if_faster)
    _LATEST[model] = weakref.ref(forward)
    forget_compiled()


def compare(model: nn.Module, inputs: dict[str, Tensor], timesteps: Sequence[float] = ()) -> dict[str, float]:
    """Time a call as a graph and layer by layer, and keep what came out for `auto`.

    Args:
        model (`nn.Module`): a quantized denoiser, by whatever engine it runs.
        inputs (`dict[str, Tensor]`): keyword arguments of a call.
        timesteps (`Sequence[float]`): others for which there may be graphs of their own, which are compiled, too.

    Returns:
        `dict[str, float]`: seconds of each way.

    Raises:
        ConfigError: OpenVINO is not installed.
        UnsupportedError: no graph can hold the model or the call, or the times spread so much that none is kept.
    """
    installed.require()
    graphs, when = graph_forward_of(model), cast(str, timestep_argument(model).name)
    before = vars(model).get("forward") if graphs is None else graphs._before
    forward = GraphForward(model, before)
    with torch.no_grad():
        for timestep in timesteps:
            forward(**inputs | {when: torch.full_like(inputs[when], timestep)})
        forward(**inputs)
        if forward.latest is not None:
            raise UnsupportedError(f"{type(model).__name__} cannot run as a graph here: {forward.latest}.")
        if not tuning.allowed():
            raise UnsupportedError(f"nothing is measured here ({tuning.VARIABLE}=0)")
        question = forward.question(GraphCall.of(model, (), inputs, float_times=True))
        tuning.fastest(question, {LAYERS: partial(forward.__wrapped__, **inputs), GRAPH: partial(forward, **inputs)})
    tuning.store()
    if not tuning.is_steady(question):
        raise UnsupportedError("the times of its steps spread too much to be kept: repeat it when nothing else runs")
    return tuning.measured(question).get(question, {})


def remove(model: nn.Module) -> None:
    """Let a model's calls run in torch."""
    if (name := _place(model)) is None:
        if (forward := graph_forward_of(model)) is not None:
            forward.is_retired = True
            forget_compiled()
        return
    forward = vars(model).pop(name)
    _LATEST.pop(model, None)
    if forward._before is not None or name != "forward":  # below a hook there must be one
        vars(model)[name] = forward.__wrapped__
    forget_compiled()


def graph_forward_of(model: nn.Module) -> GraphForward | None:
    """What runs a model's calls as graphs, also below somebody's own forward; None where nothing does."""
    if (name := _place(model)) is not None:
        return vars(model)[name]
    latest = _LATEST[model]() if model in _LATEST and "forward" in vars(model) else None
    return None if latest is None or latest.is_retired else latest


def _place(model: nn.Module) -> str | None:
    """Under which name a model has what runs its calls as graphs: accelerate's hooks move it."""
    return next((name for name in SET_BY_HOOKS if isinstance(vars(model).get(name), GraphForward)), None)

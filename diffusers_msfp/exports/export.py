"""`export`: a quantized denoiser as a file that other programs run."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from ..compat.hooks import hooks_around
from ..compat.wrappers import unwrap
from ..engines.openvino import obstacles
from ..engines.openvino.call import GraphCall
from ..engines.openvino.choices import Choice, following
from ..engines.openvino.forward import GraphForward
from ..engines.openvino.record import Recorder, refuse_branches
from ..errors import ConfigError, StateError, UnsupportedError, first_line
from ..evaluation.timing.speed import example_inputs
from ..layers import QuantLayer
from ..layers.convert import quant_layers
from ..methods.correction.table import CorrectionHook
from ..outputs import require_writable_file, writing
from ..registry import Registry
from ..results import Result
from ..sampling.calls import require_positive
from ..sampling.denoisers import denoisers_of, is_quantized
from ..sampling.timestep import timestep_argument
from .onnx_model import Onnx
from .openvino_model import OpenVINO
from .target import Ports, Target
from .torch_program import TorchExport

TARGETS: Registry[Target] = Registry("export target")
"""Kinds of files by name."""
for _target in (TorchExport(), Onnx(), OpenVINO()):
    TARGETS.add(_target.name, _target)


@dataclass(frozen=True, kw_only=True)
class ExportedGraph(Result):
    """What `export` wrote.

    Args:
        to (`str`): kind of file.
        model (`str`): class of the denoiser.
        inputs (`Mapping[str, str]`): of the graph, in order → dtype and shape, which are fixed.
        outputs (`Sequence[str]`): of the graph, in order.
        layers, layers_in_integers (`int`): quantized ones; those whose products are made of integers. All others
            multiply whole numbers as float32, with the same result.
        bytes_packed, bytes_weights (`int`): weights of quantized layers as packed codes, and in the file.
        unpacked (`str`): why the latter are more; empty where they are not.
        files (`Mapping[str, int]`): names → bytes.
        bytes_file (`int`): of all files.
        seconds (`float`): it took.
        out (`str`): the file to open.
    """

    to: str
    model: str
    inputs: Mapping[str, str]
    outputs: Sequence[str]
    layers: int
    layers_in_integers: int
    bytes_packed: int
    bytes_weights: int
    unpacked: str
    files: Mapping[str, int]
    bytes_file: int
    seconds: float
    out: str


def export(
    pipe: DiffusionPipeline | nn.Module,
    path: str | Path,
    to: str,
    *,
    inputs: Mapping[str, Any] | None = None,
    batch: int = 1,
    size: int | None = None,
    overwrite: bool = False,
) -> ExportedGraph:
    """Write the quantized denoiser as a graph that runs without this package.

    The graph computes in float32 around exact integers: layer by layer what the reference gives. Timestep, text, class
    labels and whatever else is a tensor in the call are its inputs, by their names; all shapes are fixed. An output
    correction is part of it. Nothing of the model is changed.

    Args:
        pipe (`DiffusionPipeline` or `nn.Module`): whose quantized denoiser, the first of them, is written; or the
            denoiser. It must be on the CPU and calibrated.
        path (`str` or `Path`): file to write, `.pt2`, `.onnx` or `.xml`; there only when it is complete. OpenVINO puts
            weights into a `.bin` beside it, and so does ONNX (`.onnx.data`) with more than 2 GiB.
        to (`str`): `"torch-export"`, `"onnx"` or `"openvino"`.
        inputs (`Mapping[str, Any]`, *optional*): keyword arguments of a call of the denoiser; the graph has their
            shapes. By default those of a `UNet2DModel`, a `UNet2DConditionModel` without added conditions, or a
            `DiTTransformer2DModel`, with a timestep of shape `(1,)` for all samples.
        batch (`int`): samples of such a call; guidance makes two of each picture.
        size (`int`, *optional*): height and width of the sample of such a call; the model's own by default.
        overwrite (`bool`): replace files that exist.

    Returns:
        `ExportedGraph`: what was written, its inputs, and what the weights take.

    Raises:
        ConfigError: an unknown target, a suffix that is not the target's, a file that exists, cannot be written, or
            needs a package that is not installed.
        StateError: the denoiser is not quantized, or still being calibrated.
        UnsupportedError: something that no graph can hold: adapters beside the weights, layers that follow the
            timestep, hooks, modules of one's own, a model that is not on the CPU.

    Example:
        ```py
        export(pipe, "denoiser.onnx", to="onnx", batch=2)
        ```
    """
    started = time.perf_counter()
    path = Path(path)
    require_positive(batch=batch, **({} if size is None else {"size": size}))
    target = check_export(to, path, overwrite)
    model = _quantized_denoiser(pipe)
    given = dict(inputs) if inputs is not None else _default_inputs(model, batch, size)
    layers = [layer for _, layer in quant_layers(model)]
    hooks = _hooks_in_graph(model)
    _refuse_obstacles(model, layers)
    call = GraphCall.of(model, (), given)
    if call.obstacle is not None:
        raise UnsupportedError(f"A graph's inputs are tensors on the CPU, but {call.obstacle}. Pass other `inputs`.")
    recorder = Recorder(model, call, Choice(), target.layer_in_graph, hooks)
    try:
        ports = _ports(recorder, call)
        files = _write(target, recorder, ports, path)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"{type(model).__name__} must be something that a graph can hold, but {str(error).rstrip('.')}."
        ) from error
    weights = sum(map(target.weight_bytes, layers))
    packed = sum(layer.packed_weight.numel() for layer in layers)
    return ExportedGraph(
        to=to,
        model=type(model).__name__,
        inputs={name: _described(tensor) for name, tensor in ports.inputs.items()},
        outputs=ports.outputs,
        layers=len(layers),
        layers_in_integers=sum(map(target.in_integers, layers)),
        bytes_packed=packed,
        bytes_weights=weights,
        unpacked=target.unpacked if weights > packed else "",
        files=files,
        bytes_file=sum(files.values()),
        seconds=time.perf_counter() - started,
        out=str(path),
    )


def check_export(to: str, path: str | Path, overwrite: bool = False) -> Target:
    """Refuse what can be known to fail before a model is loaded.

    Raises:
        ConfigError: see `export`.
    """
    target, path = TARGETS[to], Path(path)
    if path.suffix.lower() != target.suffix:
        raise ConfigError(f"A file of {target.name} must end in {target.suffix}, but got {path}.")
    for each in (path, *_beside(path)):
        if each.exists() and not each.is_dir() and not overwrite:
            raise ConfigError(f"{each} must not exist yet, but it does. Choose another file, or pass `--overwrite`.")
        require_writable_file(each)
    target.require()
    return target


def _beside(path: Path) -> list[Path]:
    """Files that may belong to one."""
    others = {".xml": [path.with_suffix(".bin")], ".onnx": [path.with_name(f"{path.name}.data")]}
    return others.get(path.suffix.lower(), [])


def _quantized_denoiser(pipe: DiffusionPipeline | nn.Module) -> nn.Module:
    models = [unwrap(pipe)] if isinstance(pipe, nn.Module) else list(denoisers_of(pipe).values())
    for model in models:
        if is_quantized(model):
            return model
    raise StateError(
        f"An export needs a quantized denoiser, but {type(models[0]).__name__} has no quantized layer: run "
        f"`diffusers-msfp quantize`, or `quantize_pipeline(pipe)`, first."
    )


def _default_inputs(model: Any, batch: int, size: int | None) -> dict[str, Tensor]:
    try:
        made = example_inputs(model, batch, size)
    except UnsupportedError as error:
        raise UnsupportedError(
            f"The inputs of {type(model).__name__} are not known here, so no graph can be made of its own accord. Pass "
            f"the keyword arguments of a call: `export(pipe, path, to, inputs=…)`."
        ) from error
    return made | {"timestep": made["timestep"][:1]}


def _hooks_in_graph(model: nn.Module) -> list[Callable]:
    """The hooks on the whole model that are part of its result; the engine's own are not needed.

    Raises:
        UnsupportedError: others, or another forward.
    """
    forward = vars(model).get("forward")
    for hook in hooks_around(model):
        owner = type(getattr(hook, "__self__", hook))
        if not owner.__module__.startswith(__name__.partition(".")[0]):
            raise UnsupportedError(
                f"An export writes what the model itself computes, but somebody has put a hook on it "
                f"({getattr(hook, '__qualname__', type(hook).__name__)}). Remove it first."
            )
    if forward is not None and not isinstance(forward, GraphForward):
        raise UnsupportedError(
            f"An export writes what the model itself computes, but somebody has put another forward on "
            f"{type(model).__name__}, as offloading does. Load it anew, without."
        )
    return [hook for hook in hooks_around(model) if isinstance(hook, CorrectionHook)]


def _refuse_obstacles(model: nn.Module, layers: Sequence[QuantLayer]) -> None:
    name = type(model).__name__
    if any(layer.observing for layer in layers):
        raise StateError(f"{name} must be calibrated, but it is still observing: call `calibrate(pipe)` first.")
    if timestep_argument(model).name is None:
        raise UnsupportedError(f"An export writes a denoiser, but {name} takes no timestep.")
    if (obstacle := obstacles.of_model(model, torch.float32)) is not None:
        raise UnsupportedError(f"{name} must be something that a graph can hold, but {obstacle}.")
    if found := following(layers):
        raise UnsupportedError(
            f"A graph has one weight and one range for each layer, but {len(found)} layers of {name} choose by the "
            f"timestep (first `{found[0].module_name}`): adapters for parts of the trajectory, or parameters by "
            f"timestep. Export a checkpoint without them, such as one of the recipe `msfp`."
        )


@torch.no_grad()
def _ports(recorder: Recorder, call: GraphCall) -> Ports:
    tensors = recorder.tensors()
    refuse_branches(recorder, tensors)
    fields = recorder.form.fields if recorder.form is not None else []
    return Ports(dict(zip(call.names, tensors, strict=True)), [f"out_{name}" for name in fields] or ["out"])


def _write(target: Target, recorder: Recorder, ports: Ports, path: Path) -> dict[str, int]:
    """Write beside the place, then move there: the file to open comes last."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}-", suffix=".part") as scratch:
            made = Path(scratch) / path.name
            try:
                with torch.no_grad():
                    target.write(recorder, ports, made)
            except (UnsupportedError, OSError):
                raise
            except Exception as error:  # torch's exporters raise what they like
                raise UnsupportedError(f"it could not be recorded ({first_line(_cause(error))})") from error
            for old in _beside(path):
                old.unlink(missing_ok=True)
            names = sorted((each.name for each in made.parent.iterdir()), key=lambda name: name == path.name)
            for name in names:
                (made.parent / name).replace(path.parent / name)
    return {name: (path.parent / name).stat().st_size for name in reversed(names)}


def _cause(error: BaseException) -> BaseException:
    return error if error.__cause__ is None else _cause(error.__cause__)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"

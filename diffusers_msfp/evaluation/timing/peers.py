"""Other packages' runtimes, as benchmarks compare with them: the whole denoiser as a graph for the shapes that come.

They are static in their shapes, use as many threads as torch, and are told that one call at a time counts. In 8 bits
everything that they can quantize is, with ranges from the first call alone, which is enough to be timed and not for
pictures.
"""

import importlib.util
import logging
import tempfile
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from ...errors import SEE_DOCTOR, UnsupportedError

_HINTS = {"fp32": "f32", "bf16": "bf16", "int8": "bf16"}


def require_packages(provider: str, *names: str) -> None:
    """Refuse a provider that needs packages which are not here.

    Raises:
        UnsupportedError: one is not installed.
    """
    for name in names:
        if importlib.util.find_spec(name.partition(".")[0]) is None:
            raise UnsupportedError(
                f"Provider {provider!r} needs `{name}`, which is not installed: leave it out. {SEE_DOCTOR}"
            )


@contextmanager
def _without_notes() -> Iterator[None]:
    """Tracing and quantization warn by the dozen of what does not concern a timing."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


class _Positional(nn.Module):
    """A model that is called with tensors and gives one: what graphs are made from."""

    def __init__(self, model: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.names = model, names

    def forward(self, *values: Tensor) -> Tensor:
        return self.model(**dict(zip(self.names, values, strict=True)), return_dict=False)[0]


class GraphPeer(nn.Module, ABC):
    """Abstract base: a float32 model that another runtime has compiled for the inputs of the first call.

    Args:
        model (`nn.Module`): a denoiser; given up once it is compiled.
        dtype (`str`): `"fp32"`, `"bf16"` or `"int8"`.
    """

    def __init__(self, model: nn.Module, dtype: str) -> None:
        super().__init__()
        self.dtype_name = dtype
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)  # says that inputs are float32
        self._model: list[nn.Module] = [model.to(torch.float32).eval()]
        self._run: Any = None

    def forward(self, **inputs: Tensor) -> Any:
        """The output for inputs by name."""
        values = {name: value.contiguous() for name, value in inputs.items()}
        if self._run is None:
            with torch.no_grad(), _without_notes():
                self._run = self.compiled(_Positional(self._model.pop(), tuple(values)).eval(), values)
        return self._run(values)

    @abstractmethod
    def compiled(self, model: _Positional, inputs: Mapping[str, Tensor]) -> Any:
        """What runs the graph: tensors by name → output."""


class OpenVINO(GraphPeer):
    """Intel's runtime; 8 bits by NNCF."""

    def compiled(self, model: _Positional, inputs: Mapping[str, Tensor]) -> Any:
        """See `GraphPeer.compiled`."""
        import openvino

        values = tuple(inputs.values())
        graph = openvino.convert_model(model, example_input=values, input=[tuple(x.shape) for x in values])
        if self.dtype_name == "int8":
            import nncf

            data = nncf.Dataset([tuple(x.numpy() for x in values)], lambda sample: sample)
            graph = nncf.quantize(graph, data, subset_size=1)
        settings = {
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "INFERENCE_PRECISION_HINT": _HINTS[self.dtype_name],
        }
        run = openvino.compile_model(graph, "CPU", settings)
        return lambda given: run([x.numpy() for x in given.values()])[0]


class OnnxRuntime(GraphPeer):
    """Microsoft's runtime, with its static quantization of everything."""

    def compiled(self, model: _Positional, inputs: Mapping[str, Tensor]) -> Any:
        """See `GraphPeer.compiled`."""
        import onnxruntime
        from onnxruntime import quantization

        class Reader(quantization.CalibrationDataReader):
            def __init__(self) -> None:
                self._left: Iterator = iter([{name: x.numpy() for name, x in inputs.items()}])

            def get_next(self) -> Any:
                return next(self._left, None)

        with tempfile.TemporaryDirectory() as folder:
            plain, made = (str(Path(folder) / name) for name in ("float.onnx", "made.onnx"))
            values, names = tuple(inputs.values()), list(inputs)
            torch.onnx.export(model, values, plain, input_names=names, output_names=["output"], dynamo=False)
            if self.dtype_name == "int8":
                quantization.quantize_static(plain, made, Reader(), per_channel=True)
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = torch.get_num_threads()
            options.add_session_config_entry("session.force_spinning_stop", "1")  # after a call: others take turns
            file = made if self.dtype_name == "int8" else plain
            session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda given: session.run(None, {name: x.numpy() for name, x in given.items()})[0]


def graph_peer(kind: str, dtype: str, model: nn.Module) -> nn.Module:
    """A model as `openvino` or `onnxruntime` runs it; compiled in its first call.

    Raises:
        UnsupportedError: a package is missing.
    """
    needed = {"openvino": {"int8": ("openvino", "nncf")}, "onnxruntime": {"int8": ("onnxruntime", "onnx")}}
    require_packages(f"{kind}:{dtype}", *needed[kind].get(dtype, (kind,)))
    return cast(nn.Module, {"openvino": OpenVINO, "onnxruntime": OnnxRuntime}[kind](model, dtype))

"""Graphs compiled for this processor, and their store on disk."""

import hashlib
import importlib.metadata
import json
import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...compat.processor import instruction_limit, instruction_sets, processor
from ...errors import UnsupportedError, first_line
from ...outputs import write_whole
from ..kernels.user_cache import folder
from .call import OutputForm
from .installed import settings
from .record import UNSOUND, Recording, UnsoundError

logger = logging.getLogger(__name__)

AGREES = 0.9
"""Largest relative difference between a new graph and torch's float32. Rounding makes a 4-bit network chaotic, one with
random weights differs by 0.6; what this is to find is a graph that computes something else: zeros differ by 1."""
MAX_STORED_BYTES = 16 * 2**30
_VERSION = 5  # of what is recorded; another one finds nothing of this one's on disk
_PACKAGES = ("openvino", "torch", "diffusers")


class CompiledGraph:
    """A graph, ready to run; several threads may use it at once.

    Args:
        compiled (`openvino.CompiledModel`).
        form (`OutputForm`): of its output, behind which `Soundness.total` stands.
    """

    def __init__(self, compiled: Any, form: OutputForm) -> None:
        self.form, self._compiled = form, compiled
        self._idle: list[Any] = []
        self._lock = threading.Lock()

    def __call__(self, tensors: Sequence[Tensor]) -> list[Tensor] | None:
        """Outputs for inputs of the shapes and dtypes that were recorded, all as tensors of their own.

        None where NaN, infinity, or a row that a table does not have came up within.
        """
        import openvino

        with self._lock:
            request = self._idle.pop() if self._idle else None
        request = request or self._compiled.create_infer_request()
        held = [tensor.detach().contiguous() for tensor in tensors]  # whose memory the request reads until it is done
        for index, tensor in enumerate(held):
            request.set_input_tensor(index, openvino.Tensor(tensor.numpy(), True))
        request.infer()
        read = [torch.from_numpy(port.data.copy()) for port in request.output_tensors[: self.form.number + 1]]
        with self._lock:
            self._idle.append(request)
        *outputs, sound = read
        return outputs if bool(torch.isfinite(sound)) else None


def key_of(*parts: str, precision: str) -> str:
    """A name for what is compiled from these parts, by this version of everything, for this processor."""
    import openvino

    versions = [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    device = openvino.Core().get_property("CPU", "FULL_DEVICE_NAME")
    abilities = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    machine = [str(device), str(abilities), processor(), *instruction_sets(), instruction_limit()]
    all_parts = [str(_VERSION), *versions, *machine, str(settings(precision)), *parts]
    return hashlib.sha256("\n".join(all_parts).encode()).hexdigest()


def obtain(
    key: str,
    precision: str,
    describe: str,
    make: Callable[[], Recording],
    check: Callable[[CompiledGraph, Recording], None],
    only_stored: bool = False,
) -> CompiledGraph:
    """A graph from the disk, or compiled anew and stored there.

    Args:
        key (`str`): see `key_of`.
        precision (`str`): see `installed.precision_of`.
        describe (`str`): what is compiled, for the line that says so.
        make (`Callable`): records the graph.
        check (`Callable`): refuses a graph that was compiled just now, which is not stored then.
        only_stored (`bool`): do not compile.

    Raises:
        UnsupportedError: it cannot be recorded or compiled, `check` refuses it, or it would have to be compiled.
    """
    import openvino

    from ...compat.openvino import keep_waves_exact

    start = time.perf_counter()
    place = folder("openvino") / key
    if (found := _read(place, precision)) is not None:
        logger.info("%s: graph read from %s in %.1f s.", describe, place, time.perf_counter() - start)
        return found
    if only_stored:
        raise UnsupportedError("`warmup` has compiled no graph for this call of this model")
    logger.warning("%s: OpenVINO compiles a graph, once; later processes find it in %s.", describe, place.parent)
    recording = make()
    keep_waves_exact(recording.graph)
    recorded = time.perf_counter()
    try:
        compiled = openvino.Core().compile_model(recording.graph, "CPU", settings(precision))
    except RuntimeError as error:
        raise UnsupportedError(f"OpenVINO cannot compile it ({first_line(error)})") from error
    took = time.perf_counter() - start
    logger.info("%s: recorded in %.1f s, compiled in %.1f s.", describe, recorded - start, took - (recorded - start))
    graph = CompiledGraph(compiled, recording.form)
    check(graph, recording)
    _write(place, compiled, recording.form)
    return graph


def check(graph: CompiledGraph, recording: Recording) -> None:
    """Refuse a graph that computes something else than what was recorded."""
    outputs = graph(recording.tensors)
    if outputs is None:
        raise UnsoundError(UNSOUND)
    for given, expected in zip(outputs, recording.in_torch(), strict=True):
        difference = (given - expected).norm() / expected.norm().clamp_min(1e-30)
        if not difference <= AGREES:
            raise UnsupportedError(f"its graph gives another result than torch (relative difference {difference:.2g})")


def _read(place: Path, precision: str) -> CompiledGraph | None:
    import openvino

    blob, form = place / "graph.blob", place / "output.json"
    if not (blob.is_file() and form.is_file()):
        return None
    try:
        with suppress(OSError):  # of a cache that can only be read
            os.utime(place)
        stored, data = json.loads(form.read_text(encoding="utf-8")), blob.read_bytes()
        if stored.pop("sha256") != hashlib.sha256(data).hexdigest():
            raise ValueError("its checksum is another: damaged bytes")
        return CompiledGraph(openvino.Core().import_model(data, "CPU", settings(precision)), OutputForm(**stored))
    except Exception as error:  # noqa: BLE001 – a damaged file, or one of another version, may fail in any way
        logger.warning("%s could not be read, and is of no use (%s).", blob, first_line(error))
        return None


def _write(place: Path, compiled: Any, form: OutputForm) -> None:
    """Store a graph; a full or read-only disk only costs the next process its time."""
    try:
        place.mkdir(parents=True, exist_ok=True)
        data = compiled.export_model().getvalue()
        write_whole(place / "graph.blob", data)
        write_whole(place / "output.json", json.dumps(asdict(form) | {"sha256": hashlib.sha256(data).hexdigest()}))
        _make_room(place)
    except OSError as error:
        logger.warning("The graph could not be kept in %s (%s).", place, error)


def _make_room(newest: Path) -> None:
    """Delete the graphs that were not used for longest, until all fit `MAX_STORED_BYTES`."""
    places = sorted((each for each in newest.parent.iterdir() if each.is_dir()), key=lambda each: each.stat().st_mtime)
    sizes = {place: sum(file.stat().st_size for file in place.iterdir()) for place in places}
    for place in places:
        if place == newest or sum(sizes.values()) <= MAX_STORED_BYTES:
            continue
        for file in place.iterdir():
            file.unlink(missing_ok=True)
        place.rmdir()
        sizes[place] = 0

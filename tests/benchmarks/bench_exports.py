"""Exported denoisers: bytes of their files, and a step in their runtimes beside our engines and bfloat16.

    python tests/benchmarks/bench_exports.py [--only NAME] [--no-timed]

Needs the extras `onnx` and `openvino`. The variants of a model take turns in one process, under default OpenMP settings
and with as many threads as torch has. Writes `model_cards/results/exports.json`; a model that is measured anew replaces
its old rows.
"""

import copy
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
import typer
from harness import keep_rows
from steps import float_model, timed_on, times_of

from diffusers_msfp import export, set_engine
from diffusers_msfp.engines.openvino import installed
from diffusers_msfp.evaluation.timing.providers import provide
from diffusers_msfp.evaluation.timing.speed import example_inputs, step_of, take_turns
from diffusers_msfp.exports import TARGETS

COMMAND = "python tests/benchmarks/bench_exports.py"
CASES = {"embedded": ("w4a8", 8, 15), "ddpm-cifar10": ("w4a8", 8, 9)}
"""Model → scheme, batch, timed rounds."""


def runner(to: str, file: Path, inputs: dict[str, torch.Tensor]) -> Callable[[], object]:
    """A call of a written graph by its runtime."""
    if to == "torch-export":
        program = torch.export.load(file).module()

        def call() -> object:
            with torch.no_grad():
                return program(**inputs)

        return call
    arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
    if to == "onnx":
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, arrays)
    import openvino

    request = openvino.Core().compile_model(file, "CPU", installed.settings("f32")).create_infer_request()
    return lambda: request.infer(arrays)


def measure(name: str, timed: bool) -> list[dict]:
    """Rows of one model."""
    scheme, batch, repeats = CASES[name]
    net = float_model(name)
    inputs, small = example_inputs(net, batch), example_inputs(net, 1)
    ours = provide(scheme, net, lambda each: step_of(each, small)())
    given = inputs | {"timestep": inputs["timestep"][:1]}
    rows, calls = [], {}
    with tempfile.TemporaryDirectory() as folder:
        for to, target in TARGETS.items():
            result = export(ours, Path(folder) / f"{name}{target.suffix}", to, batch=batch)
            kept = ("bytes_file", "bytes_weights", "bytes_packed", "layers", "layers_in_integers", "seconds")
            written = result.to_dict()
            row = {key: written[key] for key in kept} | {"files": written["files"]}
            row["export_seconds"] = row.pop("seconds")
            rows.append({"provider": to, **row})
            if timed:
                calls[to] = runner(to, Path(result.out), given)
        if timed:
            calls["int8"] = step_of(ours, inputs)
            reference = copy.deepcopy(ours)
            set_engine(reference, "reference")
            calls["reference"] = step_of(reference, inputs)
            calls["fp32"] = step_of(copy.deepcopy(net), inputs)
            calls["bf16:cl"] = step_of(net.to(torch.bfloat16).to(memory_format=torch.channels_last), inputs)
            known = {row["provider"]: row for row in rows}
            times = times_of(take_turns(calls, repeats))
            rows = [known.get(provider, {"provider": provider}) | own for provider, own in times.items()]
    shared = {"case": name, "scheme": scheme, "batch": batch}
    return [shared | row | timed_on() for row in rows]


def main(only: str = "", timed: bool = True) -> None:
    """Measure all models, or one."""
    for name in CASES:
        if only and only != name:
            continue
        keep_rows("exports", COMMAND, measure(name, timed), by=("case",))


if __name__ == "__main__":
    typer.run(main)

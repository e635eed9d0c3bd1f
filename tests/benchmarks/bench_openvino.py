"""The OpenVINO engine beside ours and its rivals: a step's time, start-up and memory, and pictures.

    python tests/benchmarks/bench_openvino.py [--only NAME]

Needs `openvino`, and `nncf` for the rival that quantizes everything to 8 bits. Variants of a step take turns in one
process, under default OpenMP settings. Writes `model_cards/results/openvino.json`; a row that is measured anew replaces
the old one.
"""

import copy
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import openvino
import torch
import typer
from diffusers import DiffusionPipeline
from harness import keep_rows
from steps import PlainModel, float_model, timed_on, times_of
from torch import nn

from diffusers_msfp import set_engine
from diffusers_msfp.assets import EMBEDDED_MODEL, TUNED_MODELS
from diffusers_msfp.compat.openvino import graph_of
from diffusers_msfp.engines.openvino import forward, installed
from diffusers_msfp.evaluation.compare import psnr_db
from diffusers_msfp.evaluation.images.samples import draw_pictures
from diffusers_msfp.evaluation.timing.providers import provide
from diffusers_msfp.evaluation.timing.speed import example_inputs, step_of, take_turns
from diffusers_msfp.sampling.solvers import with_ddim

COMMAND = "python tests/benchmarks/bench_openvino.py"
STEPS = {"ddpm-cifar10": (8, 9), "embedded": (8, 15), "sd15": (2, 3)}
"""Model → batch and timed rounds of its step."""
OURS = ("w4a8", "w4a4", "int-w4a8")
"""The last has uniform formats alone, which cost a graph one rounding instead of several."""
LARGE = ("sd15",)
"""Of which 24 GB do not hold all variants: the first of ours beside bfloat16 alone."""
QUALITY = {"images": 256, "num_inference_steps": 20}


def rival(model: nn.Module, inputs: dict, eight_bits: bool) -> Callable[[], object]:
    """OpenVINO in bfloat16 with a float model, as it is or with all products in 8 bits (NNCF)."""
    tensors = tuple(inputs.values())
    with torch.no_grad():
        traced = torch.jit.trace(PlainModel(model), tensors, check_trace=False)
    graph = graph_of(traced, tensors)
    feeds = [tensor.numpy() for tensor in tensors]
    if eight_bits:
        import nncf

        graph = nncf.quantize(graph, nncf.Dataset([feeds] * 2), subset_size=2)
    compiled = openvino.Core().compile_model(graph, "CPU", installed.settings("bf16"))
    request = compiled.create_infer_request()
    return lambda: request.infer(feeds)


def time_steps(name: str) -> list[dict]:
    """Rows of one model's step."""
    batch, repeats = STEPS[name]
    net = float_model(name)
    inputs, small = example_inputs(net, batch), example_inputs(net, 1)
    calls = {}
    large = name in LARGE
    for rival_name, eight_bits in (("openvino:bf16", False), ("openvino:int8", True)):
        if not large and (not eight_bits or find_spec("nncf")):
            calls[rival_name] = rival(net, inputs, eight_bits)
    for scheme in OURS[:1] if large else OURS:
        ours = provide(scheme, net, lambda each: step_of(each, small)())
        graph = copy.deepcopy(ours)
        set_engine(graph, "openvino")
        calls |= {scheme: step_of(ours, inputs), f"{scheme}:openvino": step_of(graph, inputs)}
        calls[f"{scheme}:openvino"]()
        if (reason := forward.graph_forward_of(graph).latest) is not None:
            raise RuntimeError(f"{name} runs in torch: {reason}")
    net = net.to(torch.bfloat16).to(memory_format=torch.channels_last)
    calls["bf16:cl"] = step_of(net, inputs)
    shared = {"case": f"step {name}", "batch": batch}
    times = times_of(take_turns(calls, repeats))
    return [shared | {"provider": provider} | own for provider, own in times.items()]


def pictures(engine: str) -> torch.Tensor:
    """`(N, 1, 32, 32)` in 0 … 1, of the fine-tuned checkpoint, from noise that it was not trained on."""
    pipe = with_ddim(DiffusionPipeline.from_pretrained(EMBEDDED_MODEL if engine == "float" else TUNED_MODELS["w4a8"]))
    pipe.set_progress_bar_config(disable=True)
    if engine != "float":
        set_engine(pipe, engine)
    draw = {"num_samples": QUALITY["images"], "num_inference_steps": QUALITY["num_inference_steps"], "sampler": "own"}
    return draw_pictures(pipe, **draw).float()


def quality(_: str) -> list[dict]:
    """PSNR of the fine-tuned checkpoint's pictures against full precision, by engine."""
    exact = pictures("float")
    rows = []
    for engine in ("int8", "openvino"):
        each = psnr_db(exact, pictures(engine))
        mean, deviation = each.mean().item(), each.std().item()
        half = 1.96 * deviation / len(each) ** 0.5
        rows.append({"case": "quality", "provider": engine, "psnr": mean, "psnr_half_width": half, **QUALITY})
    return rows


def start(name: str) -> list[dict]:
    """Seconds until a first step, and memory, with no graph on disk and with one; each in a process of its own."""
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for provider in ("int8", "openvino, first process", "openvino, later process"):
            environment = os.environ | {"XDG_CACHE_HOME": folder} if provider != "int8" else os.environ
            command = [sys.executable, __file__, "--first-step", provider.partition(",")[0]]
            done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True, text=True)
            rows.append({"case": name, "provider": provider, **json.loads(done.stdout.splitlines()[-1])})
        stored = sum(file.stat().st_size for file in Path(folder).rglob("graph.blob"))
    return [row | {"stored_bytes": stored} for row in rows]


def first_step(engine: str) -> None:
    """Print what a first step of the fine-tuned checkpoint takes in this process."""
    pipe = DiffusionPipeline.from_pretrained(TUNED_MODELS["w4a8"], dtype=torch.bfloat16)
    begun = time.perf_counter()
    set_engine(pipe, engine)
    step_of(pipe.unet, example_inputs(pipe.unet, 8))()
    seconds = time.perf_counter() - begun
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    typer.echo(json.dumps({"seconds": seconds, "peak_bytes": peak}))


CASES = {**{f"step {name}": time_steps for name in STEPS}, "quality": quality, "start embedded": start}


def main(only: str = "", first: str = typer.Option("", "--first-step", hidden=True)) -> None:
    """Measure all cases, or one."""
    if first:
        first_step(first)
        return
    for name, measure in CASES.items():
        if only and only != name:
            continue
        rows = [row | timed_on() for row in measure(name.removeprefix("step "))]
        keep_rows("openvino", COMMAND, rows, by=("case",))


if __name__ == "__main__":
    typer.run(main)

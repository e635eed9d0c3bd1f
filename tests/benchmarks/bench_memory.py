"""Memory and loading: packed checkpoints in both memory modes against the bfloat16 model.

    python tests/benchmarks/bench_memory.py

For each shape, a bfloat16 and a packed `w4a4` checkpoint with random weights are written; then processes of their own
load one, run two steps, and report the peak of their resident memory, less what it was before loading, and two times:
of loading, which maps files into memory and reads little, and until the model is ready, which is all up to the end of
the first step, less the time of a step. Files are in the system's cache for all alike, and for `cold_seconds` (until
ready) for none. Writes `model_cards/results/memory.json`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch
import typer
from diffusers import AutoModel
from harness import write_results

from diffusers_msfp import MSFPConfig, freeze, set_engine
from diffusers_msfp.evaluation.timing.shapes import SHAPES
from diffusers_msfp.evaluation.timing.speed import example_inputs, step_of
from diffusers_msfp.plugin.quantize import quantize_model

BATCHES = {"ddpm-cifar10": 8, "sd15": 2}
WAYS = ("bf16", "fast", "low")
LOADS = 2


def memory(field: str) -> int:
    """A figure of this process from the system, bytes."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure(folder: str, way: str, batch: int) -> dict:
    """Load and run once."""
    from diffusers_msfp.engines import kernels  # noqa: F401 – imported before the count begins

    before = memory("VmRSS")
    start = time.perf_counter()
    model = AutoModel.from_pretrained(folder, dtype=torch.bfloat16).eval()
    seconds = time.perf_counter() - start
    loaded = memory("VmRSS") - before
    if way == "bf16":
        model = model.to(memory_format=torch.channels_last)
    else:
        set_engine(model, "auto", memory=way)
    step = step_of(model, example_inputs(model, batch))
    step()
    ready = time.perf_counter() - start
    start = time.perf_counter()
    step()
    return {
        "load_seconds": seconds,
        "ready_seconds": ready - (time.perf_counter() - start),
        "loaded_bytes": loaded,
        "peak_bytes": memory("VmHWM") - before,
    }


def forget(folder: Path) -> None:
    """Drop a folder's files from the system's cache."""
    for path in folder.rglob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def write_checkpoints(shape: str, batch: int, folder: Path) -> dict[str, Path]:
    """A bfloat16 and a packed checkpoint."""
    torch.manual_seed(0)
    model = SHAPES[shape]().eval().to(torch.bfloat16)
    model.save_pretrained(folder / "bf16")
    quantize_model(model, MSFPConfig(scheme="w4a4"))
    step_of(model, example_inputs(model, batch))()
    freeze(model)
    model.save_pretrained(folder / "packed")
    return {"bf16": folder / "bf16", "fast": folder / "packed", "low": folder / "packed"}


def main(only: str = "", child: str = "", way: str = "", batch: int = 1) -> None:
    """Write checkpoints, measure, write rows."""
    if child:
        typer.echo(json.dumps(measure(child, way, batch)))
        return
    rows = []
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_"))}
    for shape in [only] if only else SHAPES:
        with tempfile.TemporaryDirectory() as scratch:
            folders = write_checkpoints(shape, BATCHES[shape], Path(scratch))
            for each in WAYS:
                command = [sys.executable, __file__, "--child", str(folders[each]), "--way", each]
                command += ["--batch", str(BATCHES[shape])]
                warm, cold = [], []
                for _ in range(LOADS):
                    for runs in (warm, cold):
                        if runs is cold:
                            forget(folders[each])
                        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
                        runs.append(json.loads(done.stdout))
                row = {"shape": shape, "batch": BATCHES[shape], "way": each}
                row |= {key: median(run[key] for run in warm) for key in warm[0]}
                row["cold_seconds"] = median(run["ready_seconds"] for run in cold)
                rows.append({key: float(f"{v:.4g}") if isinstance(v, float) else v for key, v in row.items()})
                typer.echo(json.dumps(rows[-1]), err=True)
    if not only:
        write_results("memory", "python tests/benchmarks/bench_memory.py", rows)


if __name__ == "__main__":
    typer.run(main)

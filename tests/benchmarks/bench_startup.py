"""From `from_pretrained` to the first picture, in a process of its own: with kernels to compile, and with none.

    python tests/benchmarks/bench_startup.py

The embedded model in `w4a4` draws one picture in one step. `cold`: Numba's cache and that of the measured choice are
empty, as on a machine's first run; `warmed up`: after `diffusers-msfp warmup`; `warm`: after a first picture. Importing
the libraries is reported beside. Writes `model_cards/results/startup.json`.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import typer
from harness import write_results

COMMAND = "python tests/benchmarks/bench_startup.py"
REPEATS = 3


def first_picture(folder: str) -> None:
    """Seconds of each stage of this process, as JSON."""
    start = time.perf_counter()
    from diffusers import DiffusionPipeline

    import diffusers_msfp  # noqa: F401 – which diffusers needs to know the format

    imported = time.perf_counter()
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    loaded = time.perf_counter()
    pipe(num_inference_steps=1)
    drawn = time.perf_counter()
    pipe(num_inference_steps=1)
    stages = {"import": imported - start, "load": loaded - imported, "first": drawn - loaded}
    typer.echo(json.dumps(stages | {"second": time.perf_counter() - drawn}))


def child(*words: str, caches: Path) -> str:
    """What this script prints in a process of its own, with its own caches."""
    environment = os.environ | {"XDG_CACHE_HOME": str(caches), "NUMBA_CACHE_DIR": str(caches / "numba")}
    done = subprocess.run([sys.executable, *words], env=environment, stdout=subprocess.PIPE, check=True, text=True)
    return done.stdout


def row(name: str, folder: Path, caches: list[Path]) -> dict:
    """Medians over processes, one for each folder of caches."""
    runs = [json.loads(child(__file__, "--draw", str(folder), caches=each).splitlines()[-1]) for each in caches]
    stages = {stage: round(median(run[stage] for run in runs), 3) for stage in runs[0]}
    return {"start": name, **{f"seconds_{stage}": each for stage, each in stages.items()}, "runs": len(runs)}


def main(draw: str = "") -> None:
    """Measure and write."""
    if draw:
        return first_picture(draw)
    from diffusers import DiffusionPipeline
    from steps import timed_on

    from diffusers_msfp import quantize_pipeline
    from diffusers_msfp.assets import EMBEDDED_MODEL

    with tempfile.TemporaryDirectory() as scratch:
        folder, colds = Path(scratch) / "model", [Path(scratch) / f"cold-{i}" for i in range(REPEATS)]
        pipe = quantize_pipeline(DiffusionPipeline.from_pretrained(EMBEDDED_MODEL), "w4a4", num_samples=1)
        pipe.save_pretrained(folder)
        rows = [row("cold", folder, colds), row("warm", folder, colds)]
        warmed = Path(scratch) / "warmed"
        start = time.perf_counter()
        child("-m", "diffusers_msfp", "warmup", caches=warmed)
        seconds = round(time.perf_counter() - start, 3)
        rows.insert(1, row("warmed up", folder, [warmed]) | {"seconds_warmup": seconds})
    write_results("startup", COMMAND, [each | timed_on() for each in rows])
    return None


if __name__ == "__main__":
    typer.run(main)

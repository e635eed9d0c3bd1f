"""A step of this version beside one of another commit, in turns: what a change of the engines has brought.

    python tests/benchmarks/bench_before.py COMMIT [--only CASE,…]

Both read the same packed checkpoint, made once in the folder `--work`, and each waits in a process of its own until it
is asked for a step, so that they take turns on the same machine. Where more than a few hundredths of the processors'
time went to other programs the rounds are worth little; `foreign` says how much did. Writes
`model_cards/results/engines_before.json`.
"""

import io
import os
import subprocess
import sys
import tarfile
import tempfile
import time
from pathlib import Path
from statistics import median, quantiles

import typer
from harness import ROOT, keep_rows

CASES = {
    "ddpm": ("ddpm-cifar10", 8, 15),
    "ddpm-batch1": ("ddpm-cifar10", 1, 25),
    "embedded": ("embedded", 8, 25),
    "sd15": ("sd15", 2, 5),
}
"""Name → shape, batch, rounds."""
COMMAND = "python tests/benchmarks/bench_before.py COMMIT"


def make(shape: str, folder: Path) -> None:
    """The shape in bfloat16 with random weights, or the embedded model, in `w4a4`."""
    import torch
    from diffusers import DiffusionPipeline

    from diffusers_msfp import MSFPConfig, freeze
    from diffusers_msfp.assets import EMBEDDED_MODEL
    from diffusers_msfp.evaluation.timing.shapes import SHAPES
    from diffusers_msfp.evaluation.timing.speed import example_inputs, step_of
    from diffusers_msfp.plugin.quantize import quantize_model

    torch.manual_seed(0)
    model = DiffusionPipeline.from_pretrained(EMBEDDED_MODEL).unet if shape == "embedded" else SHAPES[shape]()
    model = model.eval().to(torch.bfloat16)
    quantize_model(model, MSFPConfig("w4a4"))
    step_of(model, example_inputs(model, 1))()
    freeze(model)
    model.save_pretrained(folder)


def serve(folder: Path, batch: int) -> None:
    """Make a step for each line that comes, and answer with its seconds; the first lines with the package's place."""
    import torch
    from diffusers import UNet2DConditionModel, UNet2DModel

    import diffusers_msfp
    from diffusers_msfp.evaluation.timing.speed import example_inputs, step_of

    kind = UNet2DConditionModel if "UNet2DConditionModel" in (folder / "config.json").read_text() else UNet2DModel
    model = kind.from_pretrained(folder, torch_dtype=torch.bfloat16).eval()
    step = step_of(model, example_inputs(model, batch))
    for _ in range(3):
        step()
    print(diffusers_msfp.__file__, flush=True)  # noqa: T201
    for _ in sys.stdin:
        start = time.perf_counter()
        step()
        print(time.perf_counter() - start, flush=True)  # noqa: T201


def processors_busy() -> float:
    """Seconds that all processors together have worked since the start."""
    times = [int(each) for each in Path("/proc/stat").read_text(encoding="utf-8").split("\n")[0].split()[1:]]
    return (sum(times[:3]) + sum(times[5:7])) / os.sysconf("SC_CLK_TCK")


def used_by(process: subprocess.Popen) -> float:
    """Seconds that a process has worked."""
    after_name = Path(f"/proc/{process.pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    return (int(after_name[11]) + int(after_name[12])) / os.sysconf("SC_CLK_TCK")


def take_turns(case: str, folder: Path, trees: dict[str, Path]) -> dict:
    """One row: both versions' steps, and the ratio of each round."""
    shape, batch, rounds = CASES[case]
    command = [sys.executable, __file__, "", "--serve", str(folder), "--batch", str(batch)]
    both = {}
    for name, tree in trees.items():  # one after the other: what is measured at the start is measured alone
        environment = os.environ | {"PYTHONPATH": str(tree)}
        process = subprocess.Popen(command, env=environment, stdin=-1, stdout=-1, text=True, bufsize=1)
        both[name], place = process, process.stdout.readline()
        if not place.startswith(str(tree)):
            raise RuntimeError(f"{name} must come from {tree}, but came from {place}")
    seconds, begin = (
        {name: [] for name in both},
        (time.perf_counter(), processors_busy(), sum(map(used_by, both.values()))),
    )
    for _ in range(rounds):
        for name, process in both.items():
            process.stdin.write("step\n")
            seconds[name].append(float(process.stdout.readline()))
    wall, busy = time.perf_counter() - begin[0], processors_busy() - begin[1]
    own = sum(map(used_by, both.values())) - begin[2]
    for process in both.values():
        process.stdin.close()
        process.wait()
    ratios = [before / now for before, now in zip(seconds["before"], seconds["now"], strict=True)]
    row = {"case": case, "shape": shape, "batch": batch, "rounds": rounds, "ratio": round(median(ratios), 3)}
    row["ratio_quartiles"] = [round(each, 3) for each in quantiles(ratios, n=4)[::2]]
    row |= {f"seconds_{name}": float(f"{median(times):.4g}") for name, times in seconds.items()}
    return row | {"foreign": round(max(0.0, busy - own) / (wall * os.cpu_count()), 3)}


def keep(row: dict) -> None:
    """Put a row in the place of the old one."""
    keep_rows("engines_before", COMMAND, [row], by=("case",), order=lambda each: list(CASES).index(each["case"]))
    typer.echo(row, err=True)


def main(
    commit: str,
    only: str = "",
    work: Path = Path("before"),
    serve_from: str = typer.Option("", "--serve"),
    batch: int = 1,
) -> None:
    """Measure cases, by default all."""
    if serve_from:
        return serve(Path(serve_from), batch)
    from steps import timed_on

    before = subprocess.run(
        ["git", "rev-parse", "--short", commit], cwd=ROOT, capture_output=True, text=True, check=True
    )
    with tempfile.TemporaryDirectory() as tree:
        packed = subprocess.run(["git", "archive", commit], cwd=ROOT, capture_output=True, check=True).stdout
        with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
            archive.extractall(tree, filter="data")
        for case in only.split(",") if only else CASES:
            folder = work / CASES[case][0]
            if not folder.is_dir():
                make(CASES[case][0], folder)
            row = take_turns(case, folder.absolute(), {"before": Path(tree), "now": ROOT})
            keep(row | {"before": before.stdout.strip()} | timed_on())
    return None


if __name__ == "__main__":
    typer.run(main)

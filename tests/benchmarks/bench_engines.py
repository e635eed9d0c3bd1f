"""A denoising step by every engine, against bfloat16 channels last and the peers that are installed.

    python tests/benchmarks/bench_engines.py [--only NAME]

Each case runs in a process of its own, where all its variants take turns; see `CASES`. Cases with another instruction
set limit oneDNN, as on a processor without the newer instructions, and oneDNN alone: torch's own kernels and Numba's
still use them. Writes `model_cards/results/engines.json` and the
plot `engines.png`; a row that is measured anew replaces the old one of its kind of processor, with AMX or without.
"""

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field

import matplotlib.pyplot as plt
import torch
import typer
from harness import RESULTS, has_amx, read_results, write_results

from diffusers_msfp import cli
from diffusers_msfp.assets import EMBEDDED_MODEL

OURS = ("w4a4", "w4a4:low", "w4a4:fp32", "w4a8", "w8a8")
GRAPHS = ("w4a4:openvino", "w4a8:openvino")
PEERS = ("sdnq:int8", "sdnq:int8:matmul", "sdnq:uint4", "quanto", "torchao")
RUNTIMES = ("openvino:bf16", "openvino:int8", "onnxruntime:int8")
COMMAND = "python tests/benchmarks/bench_engines.py"


@dataclass(frozen=True)
class Case:
    """One process.

    Args:
        model (`str`): a shape or folder.
        batch, size, num_inference_steps, repeats: of the benchmark.
        providers (`tuple[str, ...]`): besides the baseline.
        isa (`str`): limit of oneDNN's instruction set; empty for none.
    """

    model: str
    batch: int
    providers: tuple[str, ...]
    size: int | None = None
    num_inference_steps: int = 1
    repeats: int = 9
    isa: str = field(default="")

    def environment(self) -> dict[str, str]:
        """Of the process: OpenMP's default settings, which are a user's, and the limit."""
        own = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "GOMP_", "MSFP_"))}
        return own | ({"ONEDNN_MAX_CPU_ISA": self.isa} if self.isa else {})


SHORT = ("fp32", "bf16", "w4a4", "w4a8", *GRAPHS)
FLOATS = ("fp32", "fp32:cl", "bf16")
CASES = {
    "ddpm": Case("ddpm-cifar10", 8, (*FLOATS, *OURS, *GRAPHS, "w4a4:reference")),
    "ddpm-peers": Case("ddpm-cifar10", 8, ("w4a4", *PEERS), repeats=5),
    "ddpm-runtimes": Case("ddpm-cifar10", 8, ("w4a4", *RUNTIMES), repeats=9),
    "ddpm-compiled": Case(
        "ddpm-cifar10", 8, ("bf16:cl:compile", "w4a4", "w4a4:compile", "sdnq:int8:compile"), repeats=5
    ),
    "ddpm-vnni": Case("ddpm-cifar10", 8, ("fp32", "fp32:cl", "w4a4", "w4a8"), isa="AVX512_CORE_VNNI", repeats=5),
    "ddpm-avx2": Case("ddpm-cifar10", 8, ("fp32", "fp32:cl", "w4a4", "w4a8", "w8a8"), isa="AVX2", repeats=5),
    "ddpm-avx2-runtimes": Case("ddpm-cifar10", 8, ("w4a4", "openvino:int8"), isa="AVX2", repeats=5),
    **{f"ddpm-avx2-batch{n}": Case("ddpm-cifar10", n, ("fp32", "w4a4", "w4a8"), isa="AVX2") for n in (1, 16)},
    "embedded-avx2": Case(str(EMBEDDED_MODEL), 8, ("fp32", "fp32:cl", "w4a4", "w4a8"), isa="AVX2"),
    "embedded": Case(str(EMBEDDED_MODEL), 8, (*FLOATS, *OURS, *GRAPHS)),
    "sd15": Case("sd15", 2, ("fp32", "bf16", "w4a4", "w4a8"), repeats=3),
    **{f"sd15-{name}": Case("sd15", 2, (f"openvino:{name}",), repeats=3) for name in ("bf16", "int8")},
    "sd15-vnni": Case("sd15", 2, ("fp32", "w4a4", "w4a8"), isa="AVX512_CORE_VNNI", repeats=2),
    "sd15-graph": Case("sd15", 2, ("w4a8:openvino",), repeats=3),
    **{f"ddpm-batch{n}": Case("ddpm-cifar10", n, SHORT, repeats=7) for n in (1, 2, 4, 16)},
    **{f"ddpm-steps{n}": Case("ddpm-cifar10", 1, ("fp32", "w4a4"), num_inference_steps=n, repeats=5) for n in (10, 50)},
    **{f"ddpm-size{n}": Case("ddpm-cifar10", 1, SHORT, size=n, repeats=5) for n in (64, 128)},
}


def run_case(name: str) -> list[dict]:
    """Rows of one case, from a process of its own."""
    command = [sys.executable, __file__, "--child", name]
    done = subprocess.run(command, env=CASES[name].environment(), stdout=subprocess.PIPE, check=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(name: str) -> None:
    """Measure one case in this process and print its rows."""
    case = CASES[name]
    result = cli.bench(
        case.model,
        list(case.providers),
        batch=case.batch,
        size=case.size,
        num_inference_steps=case.num_inference_steps,
        repeats=case.repeats,
        skip_missing=True,
    )
    model = "embedded" if case.model == str(EMBEDDED_MODEL) else case.model
    shared = {"case": name, "model": model, "isa": case.isa, "capability": torch.backends.cpu.get_cpu_capability()}
    rows = [shared | {k: _short(v) for k, v in row.items()} for row in result.to_dict()["rows"]]
    typer.echo(json.dumps(rows))


def _short(value):
    if isinstance(value, dict):
        return {key: _short(each) for key, each in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


PANELS = {
    "ddpm": ("ddpm", "ddpm-peers", "ddpm-runtimes", "ddpm-compiled"),
    "sd15": ("sd15", "sd15-graph", "sd15-bf16", "sd15-int8"),
    "embedded": ("embedded",),
}


def plot(rows: list[dict]) -> None:
    """Speed against bf16 channels last, for the cases that people run, by kind of processor."""
    kinds = sorted({has_amx(row) for row in rows})
    figure, axes = plt.subplots(
        len(kinds), len(PANELS), figsize=(13, 4.4 * len(kinds)), layout="constrained", squeeze=False
    )
    for kind, line in zip(kinds, axes, strict=True):
        for axis, cases in zip(line, PANELS.values(), strict=True):
            _panel(
                axis, {name: [row for row in rows if row["case"] == name and has_amx(row) == kind] for name in cases}
            )
    figure.savefig(RESULTS / "engines.png", dpi=130)


def _panel(axis: plt.Axes, cases: dict[str, list[dict]]) -> None:
    by_provider = {row["provider"]: row for case in reversed(cases) for row in cases[case]}
    mine = sorted(by_provider.values(), key=lambda row: row["speedup"])
    if not mine:
        return axis.set_axis_off()
    bars = axis.barh(
        [row["provider"] for row in mine],
        [row["speedup"] for row in mine],
        color=["#2a6f97" if row["provider"][0] == "w" else "#b8b8b8" for row in mine],
    )
    axis.bar_label(bars, fmt=" %.2f", fontsize=8)
    axis.axvline(1, color="black", linewidth=0.8)
    axis.margins(x=0.15)
    kind = "with AMX" if has_amx(mine[0]) else "without AMX"
    axis.set_title(f"{mine[0]['model']}, batch {mine[0]['batch']}, {kind}", fontsize=10)
    axis.set_xlabel("speed, bf16 channels last = 1")
    axis.spines[["top", "right"]].set_visible(False)
    return None


def main(only: str = "", child: str = "") -> None:
    """Run cases (names separated by commas), write rows and the plot."""
    if child:
        return measure(child)
    rows, failed = read_results("engines")["rows"] if (RESULTS / "engines.json").is_file() else [], []
    for name in only.split(",") if only else CASES:
        try:
            new = run_case(name)
        except subprocess.CalledProcessError as error:  # SD's rivals may need more memory than there is
            failed.append(f"{name}: {error}")
            continue
        rows = [row for row in rows if (row["case"], has_amx(row)) != (name, has_amx(new[0]))] + new
        order = list(CASES)
        rows.sort(key=lambda row: (has_amx(row), order.index(row["case"])))
        write_results("engines", COMMAND, rows)
        typer.echo(f"{name}: " + ", ".join(f"{row['provider']} {row['speedup']}" for row in new), err=True)
    plot(rows)
    if failed:
        raise SystemExit("\n".join(failed))
    return None


if __name__ == "__main__":
    typer.run(main)

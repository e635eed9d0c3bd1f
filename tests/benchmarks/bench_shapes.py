"""Size, time and memory of quantizing the architectures people use, built from code with random weights.

    python tests/benchmarks/bench_shapes.py

Each model is saved in float32 and quantized by the command line in a process of its own, so that the peak memory is
that of a user's run. Writes `model_cards/results/shapes.json`.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import typer
from harness import write_results

from diffusers_msfp.evaluation.timing.shapes import SHAPES

SCHEMES = ("w4a4",)


def main(only: str = "", schemes: str = ",".join(SCHEMES)) -> None:
    """Build, save, quantize, write rows."""
    rows = []
    for shape, build in SHAPES.items():
        if only and shape != only:
            continue
        with tempfile.TemporaryDirectory() as scratch:
            source = Path(scratch) / "float"
            torch.manual_seed(0)
            model = build()
            parameters = model.num_parameters()
            model.save_pretrained(source, max_shard_size="100GB")
            del model
            for scheme in schemes.split(","):
                command = [sys.executable, "-m", "diffusers_msfp", "quantize", str(source), "--scheme", scheme]
                out = Path(scratch) / scheme
                made = subprocess.run([*command, "--out", str(out), "--json"], stdout=subprocess.PIPE, check=True)
                result = json.loads(made.stdout)
                keys = (
                    "layers",
                    "weight_bits_per_param",
                    "bytes_reference",
                    "bytes_quantized",
                    "seconds",
                    "seconds_search",
                )
                row = {"shape": shape, "parameters": parameters, "scheme": scheme}
                row |= {key: result[key] for key in (*keys, "peak_rss_bytes")}
                row["bytes_bf16"] = 2 * parameters
                rows.append({k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in row.items()})
                typer.echo(json.dumps(rows[-1]), err=True)
    if not only:
        write_results("shapes", "python tests/benchmarks/bench_shapes.py", rows)


if __name__ == "__main__":
    typer.run(main)

"""Tables of what a step takes, by engine, runtime and processor."""

from collections.abc import Iterator

from harness import grouped, has_amx

CASES = {
    "ddpm": "DDPM-CIFAR-10 shape, batch 8",
    "ddpm-batch1": "the same, batch 1",
    "ddpm-batch2": "batch 2",
    "ddpm-batch4": "batch 4",
    "ddpm-batch16": "batch 16",
    "ddpm-size128": "128×128, batch 1",
    "sd15": "SD-1.5 shape, 64×64, batch 2",
    "embedded": "embedded model, batch 8",
    "ddpm-vnni": "DDPM-CIFAR-10 shape, without bfloat16 instructions",
    "ddpm-avx2": "DDPM-CIFAR-10 shape, AVX2 only",
}


RIVAL = "openvino:int8"


def steps(amx: bool) -> Iterator[tuple[str, dict[str, dict], list[dict]]]:
    """Of one kind of processor: what a case is called, its rows by provider, and those of other runtimes."""
    groups = {case: [row for row in rows if has_amx(row) == amx] for case, rows in grouped("engines", "case").items()}
    for case, label in CASES.items():
        if groups[case]:
            more = [row for name in ("graph", "runtimes", "int8", "bf16") for row in groups.get(f"{case}-{name}", ())]
            yield label, {row["provider"]: row for row in groups[case]}, more


def engines() -> Iterator[dict[str, str]]:
    """A step in `w4a4`, against floats; a float32 model's where that is faster."""
    for label, rows, rivals in steps(amx=False):
        ours = min((rows[name] for name in ("w4a4", "w4a4:fp32") if name in rows), key=lambda row: row["seconds"])
        yield {
            "model": label,
            "bf16 channels last": f"{1e3 * rows['bf16:cl']['seconds']:.0f} ms",
            "`w4a4`": f"{1e3 * ours['seconds']:.0f} ms",
            "quartiles": f"{1e3 * ours['seconds_low']:.0f} – {1e3 * ours['seconds_high']:.0f}",
            "× bf16 channels last": f"{ours['speedup']:.2f}",
            "`w4a8`, ×": f"{rows['w4a8']['speedup']:.2f}" if "w4a8" in rows else "–",
            "OpenVINO int8, ×": next((f"{row['speedup']:.2f}" for row in rivals if row["provider"] == RIVAL), "–"),
            "× fp32": f"{rows['fp32']['seconds'] / ours['seconds']:.2f}",
            "step / floor": f"{ours['seconds'] / ours['floor_seconds']:.2f}",
        }


def engines_amx() -> Iterator[dict[str, str]]:
    """A step on a processor with AMX: layer by layer, as a graph, and in other runtimes."""
    for label, rows, others in steps(amx=True):
        every = {row["provider"]: row for row in others} | rows
        times = {
            "`w4a4`, layers": "w4a4",
            "`w4a8`, layers": "w4a8",
            "`w4a4`, graph": "w4a4:openvino",
            "`w4a8`, graph": "w4a8:openvino",
            "OpenVINO bf16": "openvino:bf16",
            "NNCF int8": RIVAL,
        }
        yield {
            "model": label,
            "bf16 channels last": f"{1e3 * rows['bf16:cl']['seconds']:.0f} ms",
            **{f"{t}, ×": f"{every[name]['speedup']:.2f}" if name in every else "–" for t, name in times.items()},
            "layers / floor": f"{rows['w4a4']['seconds'] / rows['w4a4']['floor_seconds']:.2f}",
        }


RUNS = {"ddpm": "ddpm-cifar10", "sd15": "sd15", "embedded": "embedded"}
"""Case of `engines` → what it is called in `openvino`."""
RUNTIMES = {
    "w4a8": "`w4a8`, `auto`",
    "w4a8:openvino": "`openvino`",
    "w4a4": "`w4a4`, `auto`",
    "w4a4:openvino": "`w4a4`, `openvino`",
    "int-w4a8:openvino": "`int-w4a8`, `openvino`",
    "openvino:bf16": "OpenVINO bf16",
    RIVAL: "NNCF int8",
}


def openvino() -> Iterator[dict[str, str]]:
    """A step in OpenVINO beside our engines and its own 8 bits."""
    groups = grouped("openvino", "case")
    for case, name in RUNS.items():
        rows = {row["provider"]: row for row in groups[f"step {name}"]}
        base = {"model": CASES[case], "bf16 channels last": f"{1e3 * rows['bf16:cl']['seconds']:.0f} ms"}
        yield base | {
            f"{title}, ×": f"{rows[provider]['speedup']:.2f}" if provider in rows else "–"
            for provider, title in RUNTIMES.items()
        }


def openvino_start() -> Iterator[dict[str, str]]:
    """Until the first step, and memory."""
    for row in grouped("openvino", "case")["start embedded"]:
        yield {
            "engine": row["provider"],
            "until the first step": f"{row['seconds']:.1f} s",
            "peak memory": f"{row['peak_bytes'] / 1e6:.0f} MB",
            "graph on disk": f"{row['stored_bytes'] / 1e6:.1f} MB" if "openvino" in row["provider"] else "–",
        }


def openvino_quality() -> Iterator[dict[str, str]]:
    """The fine-tuned checkpoint's pictures, by engine."""
    for row in grouped("openvino", "case")["quality"]:
        yield {
            "engine": row["provider"],
            "PSNR (dB)": f"{row['psnr']:.2f} ± {row['psnr_half_width']:.2f}",
            "pictures": str(row["images"]),
        }


SHORT = ("ddpm", "ddpm-batch1", "ddpm-batch16", "ddpm-size128", "sd15", "embedded")


def speed() -> Iterator[dict[str, str]]:
    """The short form of `engines`, `openvino` and `engines_amx`."""
    graphs = {row["model"]: row["`openvino`, ×"] for row in openvino()}
    with_amx = {row["model"]: row for row in engines_amx()}
    short = [CASES[name] for name in SHORT]
    for row in engines():
        if (model := row["model"]) in short:
            yield {
                "model": model,
                "bf16": row["bf16 channels last"],
                "`w4a4`, ×": row["× bf16 channels last"],
                "`w4a8`, ×": row["`w4a8`, ×"],
                "graph, ×": graphs.get(model, "–"),
                "NNCF, ×": row["OpenVINO int8, ×"],
                "AMX: bf16": with_amx[model]["bf16 channels last"],
                "`w4a8`, × ": with_amx[model]["`w4a8`, layers, ×"],
                "graph, × ": with_amx[model]["`w4a8`, graph, ×"],
                "NNCF, × ": with_amx[model]["NNCF int8, ×"],
            }

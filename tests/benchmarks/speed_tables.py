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
TIMES = {
    "`w4a4`": "w4a4",
    "`w4a8`": "w4a8",
    "`w4a4`, graph": "w4a4:openvino",
    "`w4a8`, graph": "w4a8:openvino",
    "OpenVINO bf16": "openvino:bf16",
    "NNCF int8": RIVAL,
}


def steps(amx: bool) -> Iterator[tuple[str, dict[str, dict], dict[str, str]]]:
    """Of one kind of processor: what a case is called, its rows by provider, and how many times as fast as bfloat16.

    That is in the faster of its two memory layouts. Other runtimes, and a graph of a large model, have a process of
    their own, with bfloat16 in it.
    """
    groups = {case: [row for row in rows if has_amx(row) == amx] for case, rows in grouped("engines", "case").items()}
    for case, label in CASES.items():
        if groups[case]:
            rows = {row["provider"]: row for row in groups[case]}
            more = [row for name in ("graph", "runtimes", "int8", "bf16") for row in groups.get(f"{case}-{name}", ())]
            every, best = {row["provider"]: row for row in more} | rows, _best(rows)["speedup"]
            times = {name: f"{every[name]['speedup'] / best:.2f}" if name in every else "–" for name in TIMES.values()}
            yield label, rows, times


def _best(rows: dict[str, dict]) -> dict:
    """Bfloat16 in the faster of its layouts."""
    return max((rows[name] for name in ("bf16:cl", "bf16") if name in rows), key=lambda row: row["speedup"])


def _engines(amx: bool) -> Iterator[dict[str, str]]:
    for label, rows, times in steps(amx):
        ours = rows["w4a4"]
        yield {
            "model": label,
            "bf16": f"{1e3 * _best(rows)['seconds']:.0f} ms",
            "`w4a4`": f"{1e3 * ours['seconds']:.0f} ms",
            "quartiles": f"{1e3 * ours['seconds_low']:.0f} – {1e3 * ours['seconds_high']:.0f}",
            **{f"{title}, ×": times[name] for title, name in TIMES.items()},
            "`w4a4`, × fp32": f"{rows['fp32']['seconds'] / ours['seconds']:.2f}",
            "`w4a4` / floor": f"{ours['seconds'] / ours['floor_seconds']:.2f}",
        }


def engines() -> Iterator[dict[str, str]]:
    """A step on a processor without AMX: layer by layer, as a graph, and in other runtimes."""
    yield from _engines(amx=False)


def engines_amx() -> Iterator[dict[str, str]]:
    """The same with AMX."""
    yield from _engines(amx=True)


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


SHORT_TIMES = {"`w4a8`, ×": "`w4a8`, ×", "graph, ×": "`w4a8`, graph, ×", "NNCF, ×": "NNCF int8, ×"}
SHORT = ("ddpm", "ddpm-batch1", "ddpm-batch16", "ddpm-size128", "sd15", "embedded")


def speed() -> Iterator[dict[str, str]]:
    """The short form of `engines` and `engines_amx`."""
    with_amx, short = {row["model"]: row for row in engines_amx()}, [CASES[name] for name in SHORT]
    for row in engines():
        if row["model"] in short:
            amx = with_amx[row["model"]]
            yield {
                "model": row["model"],
                "bf16": row["bf16"],
                "`w4a4`, ×": row["`w4a4`, ×"],
                **{title: row[name] for title, name in SHORT_TIMES.items()},
                "AMX: bf16": amx["bf16"],
                **{f"{title} ": amx[name] for title, name in SHORT_TIMES.items()},
            }

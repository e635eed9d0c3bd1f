"""Write the tables of all pages and model cards from the registry, the results files, and what tests show to work.

    python tests/benchmarks/tables.py

Each table stands between `<!-- name -->` and `<!-- /name -->`; a test compares them with what is generated here.
"""

import re
import sys
from collections.abc import Iterator, Mapping
from statistics import mean
from types import MappingProxyType

import torch
from budget_tables import budget, budget_psnr, budget_steps, budget_sums
from claims import claims, claims_shares, over_seeds
from harness import ROOT, grouped, read_results
from safetensors.torch import load_file
from speed_tables import engines, engines_amx, openvino, openvino_quality, openvino_start, speed

from diffusers_msfp import FORMATS
from diffusers_msfp.assets import EMBEDDED_MODEL
from diffusers_msfp.exports import TARGETS
from diffusers_msfp.recipes import RECIPES

sys.path.insert(0, str(ROOT / "tests"))

from marks import marked  # noqa: E402
from matrix import PIPELINES, SCHEDULERS  # noqa: E402

PAGES = tuple(
    page for page in sorted([ROOT / "README.md", *ROOT.glob("diffusers_msfp/**/*.md"), *ROOT.glob("model_cards/*.md")])
)


def markdown(rows: Iterator[dict[str, str]]) -> str:
    """A table of rows, column → cell; the first column is text, the others are numbers."""
    rows = list(rows)
    header = list(rows[0])
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, rule, *(row.values() for row in rows)])


def average(rows: list[dict], key: str) -> float:
    """Mean over rows."""
    return mean(row[key] for row in rows)


def spread(rows: list[dict], key: str) -> str:
    """Smallest and largest of the rows."""
    values = [row[key] for row in rows]
    return f"{min(values):.4f} – {max(values):.4f}"


BEFORE_RENAMING = frozenset({"889ce57", "2e8c6d6", "b8f5920", "b9c8ec2"})
"""Commits of results from before plain names got 8-bit inputs of residual sums and formats that fit one byte."""
NAMED_NOW = {"w4a4": "w4a4-pure", "w4a8": "w4a8-wide"}


def scheme_now(name: str, results: str, row: Mapping = MappingProxyType({})) -> str:
    """What a scheme of a results file, or of a row of it, is called now."""
    made_at = row.get("git") or read_results(results)["origin"]["git"]
    return NAMED_NOW.get(name, name) if made_at in BEFORE_RENAMING else name


def formats() -> Iterator[dict[str, str]]:
    """All formats, from the registry."""
    for fmt in FORMATS.values():
        yield {
            "format": f"`{fmt.name}`",
            "sign": "signed" if fmt.signed else "unsigned",
            "bits": str(fmt.bits),
            "exponent": str(fmt.exponent_bits),
            "mantissa": str(fmt.mantissa_bits),
            "values": str(len(fmt.grid)),
            "max": f"{fmt.max:g}",
            "largest integer": str(fmt.lattice_max),
            "fits 8-bit integers": "yes" if fmt.fits_byte else "no",
        }


def psnr_of(rows: list[dict], suffix: str = "") -> tuple[float, float, float]:
    """Mean over seeds and its 95 % interval, see `over_seeds`; rows have figures of all their pictures."""
    if len(rows) == 1:
        value, low, high = (rows[0][f"image_psnr_db{end}{suffix}"] for end in ("", "_low", "_high"))
        return value, low, high
    return over_seeds(torch.tensor([row[f"image_psnr_db{suffix}"] for row in rows])[:, None])


def schemes() -> Iterator[dict[str, str]]:
    """Every scheme on the embedded model, mean over seeds."""
    for name, rows in grouped("ddpm-fashion-mnist-32", "scheme").items():
        yield {
            "scheme": f"`{name}`",
            "PSNR (dB)": "{:.1f} ({:.1f} – {:.1f})".format(*psnr_of(rows, "_20")),
            "seeds × pictures": f"{len(rows)} × {rows[0]['num_samples']}",
            "`traj_rel_l2`": f"{average(rows, 'traj_rel_l2_20'):.4f}",
            "`eps_rel_l2`": f"{average(rows, 'eps_rel_l2_20'):.4f}",
            "50 steps (dB)": f"{average(rows, 'image_psnr_db_50'):.1f}",
            "DPM-Solver++, 20 (dB)": f"{average(rows, 'image_psnr_db_dpm'):.1f}",
        }


SEARCHED = {"ddpm-fashion-mnist-32": "embedded", "cifar10-pixel": "8 M, RGB"}


def search() -> Iterator[dict[str, str]]:
    """The search beside what it was and what was left out, mean over seeds."""
    for model, label in SEARCHED.items():
        for name, rows in grouped(f"{model}-search", "variant").items():
            yield {
                "search": name,
                "model": label,
                "PSNR (dB)": "{:.1f} ({:.1f} – {:.1f})".format(*psnr_of(rows)),
                "`traj_rel_l2`": f"{average(rows, 'traj_rel_l2'):.4f}",
                "`eps_rel_l2`": f"{average(rows, 'eps_rel_l2'):.4f}",
                "pictures": str(sum(row["num_samples"] for row in rows)),
            }


def shapes() -> Iterator[dict[str, str]]:
    """Size, time and memory on the architectures people use."""
    for row in read_results("shapes")["rows"]:
        yield {
            "architecture": f"{row['shape']}, {row['parameters'] / 1e6:.1f} M, `{row['scheme']}`",
            "bf16": f"{row['bytes_bf16'] / 1e6:.1f} MB",
            "packed": f"{row['bytes_quantized'] / 1e6:.1f} MB",
            "bits per quantized weight": f"{row['weight_bits_per_param']:.2f}",
            "search and packing": f"{row['seconds_search']:.1f} s",
            "peak memory": f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
        }


CELLS = {
    "ptq-signed": "PTQ, signed formats only",
    "ptq": "PTQ, mixed sign",
    "one-lora": "+ one LoRA, rank 16",
    "talora": "+ TALoRA, 2 × rank 8",
    "talora-dfa": "+ DFA",
    "talora-dfa-squared": "DFA with γ²",
    "talora-4": "TALoRA, 4 × rank 4",
    "one-lora-32": "one LoRA, rank 32",
    "talora-32": "TALoRA, 2 × rank 32",
    "side": "TALoRA beside the weights, reading floats, 2 × rank 7",
    "long-dfa": "TALoRA + DFA beside the weights, reading floats, 2 × rank 7, longer",
    "minutes-5": "`finetune --minutes 5 --reads float`, two cores",
}


def talora() -> Iterator[dict[str, str]]:
    """What each part of the fine-tuning brings, mean over seeds."""
    groups = grouped("talora", "cell")
    ptq = average(groups["ptq"], "eps_mse_20")
    for rows, label in ((groups[cell], label) for cell, label in CELLS.items() if cell in groups):
        trained = "updates" in rows[0]
        row = {
            "": label,
            "updates": str(rows[0]["updates"]) if trained else "–",
            "`eps_rel_l2` (over seeds)": f"{average(rows, 'eps_rel_l2_20'):.4f} ({spread(rows, 'eps_rel_l2_20')})",
            "`eps_mse`, share of PTQ's": f"{average(rows, 'eps_mse_20') / ptq:.2f}",
            "PSNR (dB)": f"{average(rows, 'image_psnr_db_20'):.1f}",
            "Fréchet to full precision": f"{average(rows, 'frechet_reference'):.2f}",
            "to real images": f"{average(rows, 'frechet_real'):.2f}",
            "tensors": f"{average(rows, 'bytes') / 1e6:.2f} MB",
            "peak memory": f"{max(one['peak_rss_bytes'] for one in rows) / 1e9:.2f} GB" if trained else "–",
            "seeds": str(len(rows)),
        }
        yield row
    full = groups["full precision"]
    real = f"{average(full, 'frechet_real'):.2f}"
    yield dict(zip(row, ["full precision", "–", "0", "0", "–", "0", real, "–", "–", str(len(full))], strict=True))


def reads() -> Iterator[dict[str, str]]:
    """What adapters beside the weights read, at few updates."""
    for row in read_results("talora-reads")["rows"]:
        if row["cell"] != "full precision":
            yield {
                f"`{row['scheme']}`, adapters read": {"float": "floats", "none": "– (PTQ)"}.get(
                    row["cell"], row["cell"]
                ),
                "updates": str(row.get("updates", "–")),
                "`eps_rel_l2`": f"{row['eps_rel_l2_20']:.4f}",
                "PSNR (dB)": f"{row['image_psnr_db_20']:.1f}",
                "50 steps (dB)": f"{row['image_psnr_db_50']:.1f}",
            }


ALIKE = ("weights", "updates", "num_samples")
"""What rows of `recipe` must have in common."""


def recipe_rows() -> dict[str, list[dict]]:
    """Rows of `recipe` by cell.

    Raises:
        ValueError: they are of several lengths, numbers of pictures or weights.
    """
    groups = grouped("recipe", "cell")
    kinds = {tuple(row[key] for key in ALIKE) for rows in groups.values() for row in rows}
    if len(kinds) > 1:
        raise ValueError(
            f"Rows of `recipe` must have equal {', '.join(ALIKE)}, but got {sorted(kinds)}: keep one kind."
        )
    return groups


def gains_of(rows: list[dict], base: list[dict]) -> torch.Tensor:
    """Differences of PSNR `(seeds, pictures)`, paired, on the seeds of `rows`."""
    by_seed = {row["seed"]: torch.tensor(row["psnr_db_by_picture"]) for row in base}
    return torch.stack([torch.tensor(row["psnr_db_by_picture"]) - by_seed[row["seed"]] for row in rows])


def recipe() -> Iterator[dict[str, str]]:
    """The recipe `msfp` with one part changed at a time; differences are paired over pictures, see `over_seeds`."""
    groups = recipe_rows()
    for name, rows in groups.items():
        each = torch.stack([torch.tensor(row["psnr_db_by_picture"]) for row in rows])
        gain = over_seeds(gains_of(rows, groups["as it is"]))
        yield {
            "recipe": name.replace("banks", "adapters"),
            "PSNR (dB)": "{:.1f} ({:.1f} – {:.1f})".format(*over_seeds(each)),
            "difference (dB)": "–" if name == "as it is" else "{:+.2f} ({:+.2f} – {:+.2f})".format(*gain),
            "`traj_rel_l2`": f"{average(rows, 'traj_rel_l2'):.4f}",
            "`eps_rel_l2`": f"{average(rows, 'eps_rel_l2'):.4f}",
            "seconds": f"{average(rows, 'seconds'):.0f}",
            "tensors": f"{rows[0]['bytes'] / 1e6:.2f} MB",
            "seeds × pictures": f"{len(rows)} × {rows[0]['num_samples']}",
        }


SIGNED, MIXED, TWO, BOTH = (
    "paper: signed formats",
    "paper: + mixed sign",
    "paper: + TALoRA, two banks",
    "paper: + DFA",
)
PARTS = {
    "mixed signs": (MIXED, SIGNED),
    "two adapters (TALoRA)": (TWO, MIXED),
    "DFA on top of them": (BOTH, TWO),
    "DFA with one adapter, the recipe as it is": ("as it is", MIXED),
    "two adapters and DFA": (BOTH, MIXED),
}
"""Part of the paper → cells of `recipe` with it and without."""


def paper() -> Iterator[dict[str, str]]:
    """What each of the paper's parts brings, paired by seed."""
    groups = recipe_rows()
    for label, (cell, without) in PARTS.items():
        gain = gains_of(groups[cell], groups[without])
        yield {
            "part": label,
            "on top of": without.removeprefix("paper: ").removeprefix("+ ").replace("banks", "adapters"),
            "gain (dB)": "{:+.2f} ({:+.2f} – {:+.2f})".format(*over_seeds(gain)),
            "by seed": ", ".join(f"{seed:+.2f}" for seed in gain.mean(1).tolist()),
        }


def banks() -> Iterator[dict[str, str]]:
    """Which adapter serves which timesteps, by how routers begin."""
    for row in (row for rows in recipe_rows().values() for row in rows):
        if "banks" in row["cell"]:
            (group,) = row["intervals"]
            runs = reversed(group)  # as the sampler goes
            yield {
                "recipe": row["cell"].replace("banks", "adapters"),
                "seed": str(row["seed"]),
                "timesteps of each adapter": ", ".join(f"{last} – {first}: {a + 1}" for first, last, a in runs),
                "PSNR (dB)": "{:.1f} ({:.1f} – {:.1f})".format(*row["psnr_db"]),
            }


def routing() -> Iterator[dict[str, str]]:
    """What adapters cost a step."""
    for row in read_results("routing")["rows"]:
        yield {
            "model, adapters": f"{row['shape']}, batch {row['batch']}, {row['adapters']}",
            "step": f"{1e3 * row['seconds']:.0f} ms",
            "ratio (quartiles)": "{:.3f} ({:.3f} – {:.3f})".format(row["ratio"], *row["ratio_quartiles"])
            + (f" to {row['against']}" if row.get("against", "without") != "without" else ""),
            "switching": f"{row['switch_microseconds']:.0f} µs",
            "tensors": f"{row['bytes'] / 1e6:.2f} MB",
        }


def startup() -> Iterator[dict[str, str]]:
    """From `from_pretrained` to the first picture."""
    for row in read_results("startup")["rows"]:
        yield {"": row["start"]} | {
            title: f"{row[f'seconds_{stage}']:.2f} s"
            for stage, title in (
                ("import", "importing"),
                ("load", "loading"),
                ("first", "first picture, one step"),
                ("second", "second"),
            )
        }


def exports() -> Iterator[dict[str, str]]:
    """Exported denoisers: bytes of files, and a step in their runtimes."""
    for case, rows in grouped("exports", "case").items():
        for row in rows:
            if row["provider"] in TARGETS or row["provider"] == "int8":
                written = "bytes_file" in row
                yield {
                    "": f"{case}, batch {row['batch']}, `{row['scheme']}`: `{row['provider']}`",
                    "file": f"{row['bytes_file'] / 1e6:.2f} MB" if written else "–",
                    "weights in it, of packed": f"{row['bytes_weights'] / row['bytes_packed']:.2f}" if written else "–",
                    "layers in integers": f"{row['layers_in_integers']} of {row['layers']}" if written else "–",
                    "step": f"{1e3 * row['seconds']:.0f} ms",
                    "× bf16 channels last": f"{row['speedup']:.2f}",
                }


def temporal() -> Iterator[dict[str, str]]:
    """Temporal feature maintenance by stage."""
    for row in read_results("temporal")["rows"]:
        done = "seconds" in row
        yield {
            "": f"`{scheme_now(row['scheme'], 'temporal', row)}`, {row['stage']}",
            "features, largest": f"{100 * row['features_max_20']:.2f} %",
            "mean": f"{100 * row['features_mean_20']:.2f} %",
            "mean, 50 steps": f"{100 * row['features_mean_50']:.2f} %",
            "`eps_rel_l2`": f"{row['eps_rel_l2']:.4f}",
            "PSNR (dB)": f"{row['image_psnr_db']:.1f}",
            "stored": f"{(row['sets_bytes'] + row['cache_bytes']) / 1e3:.1f} kB" if done else "–",
            "seconds": f"{row['seconds']:.0f}" if done else "–",
        }


def memory() -> Iterator[dict[str, str]]:
    """Loading and peak memory of packed checkpoints."""
    scheme = scheme_now("w4a4", "memory")
    ways = {"bf16": "bfloat16", "fast": f"`{scheme}`, `fast`", "low": f"`{scheme}`, `low`"}
    for shape, rows in grouped("memory", "shape").items():
        base = rows[0]
        for row in rows:
            yield {
                "model": f"{shape}, batch {row['batch']}, {ways[row['way']]}",
                "loading": f"{1e3 * row['load_seconds']:.0f} ms",
                "until ready": f"{row['ready_seconds']:.2f} s",
                "from disk": f"{row['cold_seconds']:.2f} s",
                "peak of a step": f"{row['peak_bytes'] / 1e6:.0f} MB",
                "of bfloat16's": f"{row['peak_bytes'] / base['peak_bytes']:.2f}",
            }


QUANTIZERS = {
    "numba": ("Numba, shipped (extra `cpu`)", "a wheel, no compiler"),
    "c": ("C, GCC -O3", "a compiler, or wheels for every system"),
    "inductor": ("`torch.compile` (Inductor)", "a C++ compiler where it runs"),
    "torch": ("torch operators, fallback", "nothing"),
    "uniform": ("uniform `torch.quantize_per_tensor`, for comparison", "cannot do lattices"),
    "copy": ("`Tensor.clone`, for comparison", "–"),
}
"""Provider of `quantizer` → its name, and what it needs."""


def quantizer() -> Iterator[dict[str, str]]:
    """Input quantizers on the first shape."""
    rows = read_results("quantizer")["rows"]
    measured = {(row["provider"], row["dtype"]): row for row in rows if row["shape"] == rows[0]["shape"]}
    for provider, (label, needs) in QUANTIZERS.items():
        single, half = (measured[provider, dtype] for dtype in ("float32", "bfloat16"))
        yield {
            "": label,
            "float32 (ms)": f"{single['ms']:.2f}",
            "bfloat16 (ms)": f"{half['ms']:.2f}",
            "first call (s)": f"{single['first_call_s']:.2f}",
            "needs": needs,
        }


def groups() -> Iterator[dict[str, str]]:
    """Weight error with group scales, and with what was weighed against them."""
    for row in read_results("groups")["rows"]:
        if "weight_rel_mse" in row:
            yield {
                "scales of 4-bit weights": row["variant"],
                "squared error / energy": f"{row['weight_rel_mse']:.5f}",
                "bits per weight": f"{row['bits_per_weight']:.2f}",
            }


def rounding() -> Iterator[dict[str, str]]:
    """Learned rounding beside nearest rounding."""
    for row in read_results("rounding")["rows"]:
        learned = "minutes" in row
        yield {
            "scheme, rounding": f"`{scheme_now(row['scheme'], 'rounding', row)}`, {row['rounding']}",
            "`eps_rel_l2`": f"{row['eps_rel_l2']:.4f}",
            "PSNR (dB)": f"{row['image_psnr_db']:.1f}",
            "weights changed": f"{row['changed']:.1%}" if learned else "–",
            "exact zeros": f"{row['sparsity']:.1%} (before {row['sparsity_before']:.1%})" if learned else "–",
            "minutes": f"{row['minutes']:.1f}" if learned else "–",
        }


def pipelines() -> Iterator[dict[str, str]]:
    """What is quantized, saved, reloaded and sampled in `test_matrix.py`."""
    for name, case in PIPELINES.items():
        yield {"pipeline": name, "quantized": ", ".join(f"`{part}`" for part in case.components)}
    yield {"pipeline": f"samplers: {', '.join(SCHEDULERS)}", "quantized": "`unet`"}


def features() -> Iterator[dict[str, str]]:
    """What `test_pipeline_features.py` does with a quantized Stable Diffusion."""
    for name, *outcome in marked(ROOT / "tests" / "plugin" / "test_pipeline_features.py", "feature"):
        yield {"feature": name, "with a quantized pipeline": "".join(outcome) or "works"}


def interval(row: dict, key: str, digits: int) -> str:
    """A figure with its 95 % interval."""
    value, low, high = (f"{each:.{digits}f}" for each in row[key])
    return f"{value} ({low} – {high})"


SHOWN = {
    "w4a4 + correction": "`w4a4`, output corrected (default)",
    "w4a4 msfp + correction": "`w4a4`, recipe `msfp`, 10 000 updates",
    "w4a8 + correction": "`w4a8`, `--correction`",
    "w4a8 msfp": "`w4a8`, recipe `msfp`, 1 100 updates",
    "w4g32a16 msfp": "`w4g32a16`, recipe `msfp`, 1 100 updates, float inputs",
    "w8a8-wide ptq": "`w8a8-wide`, slower products",
    "INT4 + correction": "`int-w4a4-pure`: uniform 4-bit grids throughout",
    "EfficientDM style + correction": "the same after EfficientDM, as reconstructed, 1 100 updates, some layers float",
    "SDNQ uint4 weights": "SDNQ `uint4`, float inputs",
}
"""Cells of `baselines` in the short table."""


def quality() -> Iterator[dict[str, str]]:
    """The short form of `baselines`."""
    rows = {row["cell"]: row for row in grouped("baselines", "model")[EMBEDDED_MODEL.name]}
    for cell, label in SHOWN.items():
        yield {
            "": label,
            "PSNR (dB)": interval(rows[cell], "candidate_to_reference.psnr_db", 1),
            "Fréchet distance": interval(rows[cell], "candidate_to_reference.frechet_distance", 2),
            "tensors": megabytes(rows[cell]["bytes_float16"]),
        }
    full = megabytes(full_precision_size())
    yield {"": "full precision, float16", "PSNR (dB)": "–", "Fréchet distance": "0", "tensors": full}


def full_precision_size() -> int:
    """Bytes of the embedded model's tensors."""
    tensors = load_file(EMBEDDED_MODEL / "unet" / "diffusion_pytorch_model.safetensors")
    return sum(tensor.nbytes for tensor in tensors.values())


def megabytes(size: int) -> str:
    """With two digits."""
    return f"{size / 1e6:.2f} MB"


def sizes() -> Iterator[dict[str, str]]:
    """The short form of `shapes`."""
    names = {"ddpm-cifar10": "DDPM-CIFAR-10 shape", "sd15": "SD-1.5 shape"}
    for row, short in zip(shapes(), read_results("shapes")["rows"], strict=True):
        label = f"{names[short['shape']]}, {short['parameters'] / 1e6:.0f} M parameters, `{short['scheme']}`"
        yield {"": label} | {key: row[key] for key in ("bf16", "packed", "search and packing", "peak memory")}


def baselines() -> Iterator[dict[str, str]]:
    """Every method, against full precision and real pictures."""
    return cells(grouped("baselines", "model")[EMBEDDED_MODEL.name])


def baselines_models() -> Iterator[dict[str, str]]:
    """The same of the other trained models."""
    for model, rows in grouped("baselines", "model").items():
        if model != EMBEDDED_MODEL.name:
            link = f"[`{model}`](../../model_cards/{model}/README.md)"
            yield from ({"model": link} | row for row in cells(rows))


def cells(rows: list[dict]) -> Iterator[dict[str, str]]:
    """Rows of one model, and its full precision."""
    for row in rows:
        stages = [stage.name for stage in RECIPES[row["recipe"]]] if row["recipe"] else []
        stages += ["correction"] if row["cell"].endswith(" + correction") else []
        if row["recipe"] and list(row["stages"]) != stages:
            raise ValueError(f"`{row['cell']}` was measured with other stages than its recipe has: measure it again.")
        table_row = {
            "method": row["cell"],
            "scheme": f"`{row['scheme']}`",
            "recipe": f"`{row['recipe']}`" if row["recipe"] else "–",
            "float": ", ".join(f"`{name}`" for name in row.get("float", ())) or "–",
            "`eps_rel_l2`": f"{row['eps_rel_l2']:.4f}",
            "PSNR (dB)": interval(row, "candidate_to_reference.psnr_db", 1),
            "Fréchet to full precision": interval(row, "candidate_to_reference.frechet_distance", 2),
            "to real pictures": interval(row, "candidate_to_real.frechet_distance", 2),
            "tensors": megabytes(row["bytes_float16"]),
            "minutes": "–" if row["minutes"] is None else f"{row['minutes']:.1f}",
        }
        yield table_row
    real = interval(rows[0], "reference_to_real.frechet_distance", 2)
    empty = dict.fromkeys(table_row, "–")
    yield empty | {"method": "full precision", "`eps_rel_l2`": "0", "to real pictures": real}


MAKERS = (
    quality,
    sizes,
    speed,
    baselines,
    baselines_models,
    engines,
    engines_amx,
    openvino,
    openvino_start,
    openvino_quality,
    exports,
    startup,
    memory,
    formats,
    groups,
    quantizer,
    rounding,
    schemes,
    search,
    shapes,
    talora,
    reads,
    recipe,
    paper,
    banks,
    routing,
    temporal,
    pipelines,
    features,
    budget,
    budget_steps,
    budget_psnr,
    budget_sums,
    claims,
    claims_shares,
)
TABLES = {make.__name__: make for make in MAKERS}


def filled(page: str) -> str:
    """A page's text with its tables made anew."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if block.search(page):
            table = markdown(make())
            page = block.sub(lambda found, table=table: found[1] + table + "\n" + found[2], page)
    return page


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")

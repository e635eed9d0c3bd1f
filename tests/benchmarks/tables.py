"""Write the tables of README and model cards from the registry and the results files.

    python tests/benchmarks/tables.py

Each table stands between `<!-- name -->` and `<!-- /name -->`; a test compares them with what is generated here.
"""

import re
from statistics import mean

from harness import ROOT, read_results

from diffusers_msfp import FORMATS

PAGES = (ROOT / "README.md", ROOT / "model_cards" / "ddpm-fashion-mnist-32.md")


def markdown(header: list[str], rows: list[list[str]]) -> str:
    """A table; the first column is text, the others are numbers."""
    rule = ["---"] + ["---:"] * (len(header) - 1)
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, rule, *rows])


def formats() -> str:
    """All formats, from the registry."""
    rows = []
    for fmt in FORMATS.values():
        sign = "signed" if fmt.signed else "unsigned"
        fits = "yes" if fmt.lattice_max <= (127 if fmt.signed else 255) else "no"
        numbers = [fmt.bits, fmt.exponent_bits, fmt.mantissa_bits, len(fmt.grid), f"{fmt.max:g}", fmt.lattice_max]
        rows.append([f"`{fmt.name}`", sign, *map(str, numbers), fits])
    header = [
        "format",
        "sign",
        "bits",
        "exponent",
        "mantissa",
        "values",
        "max",
        "largest integer",
        "fits 8-bit integers",
    ]
    return markdown(header, rows)


def schemes() -> str:
    """Every scheme on the embedded model, mean over seeds."""
    rows = read_results("ddpm-fashion-mnist-32")["rows"]
    lines = []
    for name in dict.fromkeys(row["scheme"] for row in rows):
        cells = [row for row in rows if row["scheme"] == name]
        errors = [row["eps_rel_l2_20"] for row in cells]
        lines.append(
            [
                f"`{name}`",
                f"{mean(errors):.4f}",
                f"{min(errors):.4f} – {max(errors):.4f}",
                f"{mean(row['image_psnr_db_20'] for row in cells):.1f}",
                f"{mean(row['image_psnr_db_50'] for row in cells):.1f}",
            ]
        )
    header = ["scheme", "`eps_rel_l2`", "over seeds", "image PSNR, 20 steps (dB)", "50 steps (dB)"]
    return markdown(header, lines)


def shapes() -> str:
    """Size, time and memory on the architectures people use."""
    lines = []
    for row in read_results("shapes")["rows"]:
        lines.append(
            [
                f"{row['shape']}, {row['parameters'] / 1e6:.1f} M, `{row['scheme']}`",
                f"{row['bytes_bf16'] / 1e6:.1f} MB",
                f"{row['bytes_after'] / 1e6:.1f} MB",
                f"{row['weight_bits_per_param']:.2f}",
                f"{row['seconds_search']:.1f} s",
                f"{row['peak_rss_bytes'] / 1e9:.2f} GB",
            ]
        )
    header = ["architecture", "bf16", "packed", "bits per quantized weight", "search and packing", "peak memory"]
    return markdown(header, lines)


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
    "side": "TALoRA beside the weights, 2 × rank 7",
    "long-dfa": "TALoRA + DFA beside the weights, 2 × rank 7, longer",
    "minutes-5": "`finetune --minutes 5`, defaults, two cores",
}


def talora() -> str:
    """What each part of the fine-tuning brings, mean over seeds."""
    rows = read_results("talora")["rows"]

    def average(cell: str, key: str) -> float:
        return mean(row[key] for row in rows if row["cell"] == cell)

    lines = []
    for cell, label in CELLS.items():
        own = [row for row in rows if row["cell"] == cell]
        if not own:
            continue
        errors = [row["eps_rel_l2_20"] for row in own]
        lines.append(
            [
                label,
                str(own[0].get("updates", "–")),
                f"{mean(errors):.4f} ({min(errors):.4f} – {max(errors):.4f})",
                f"{average(cell, 'eps_mse_20') / average('ptq', 'eps_mse_20'):.2f}",
                f"{average(cell, 'image_psnr_db_20'):.1f}",
                f"{average(cell, 'frechet_reference'):.2f}",
                f"{average(cell, 'frechet_real'):.2f}",
                f"{average(cell, 'bytes') / 1e6:.2f} MB",
                f"{max(row['peak_rss_bytes'] for row in own) / 1e9:.2f} GB" if "updates" in own[0] else "–",
                str(len(own)),
            ]
        )
    full = average("full precision", "frechet_real")
    lines.append(["full precision", "–", "0", "0", "–", "0", f"{full:.2f}", "–", "–", "3"])
    header = ["", "updates", "`eps_rel_l2` (over seeds)", "`eps_mse`, share of PTQ's", "PSNR (dB)"]
    header += ["Fréchet to full precision", "to real images", "tensors", "peak memory", "seeds"]
    return markdown(header, lines)


def routing() -> str:
    """What adapters cost a step."""
    lines = []
    for row in read_results("routing")["rows"]:
        low, high = row["ratio_quartiles"]
        lines.append(
            [
                f"{row['shape']}, batch {row['batch']}, {row['adapters']}",
                f"{1e3 * row['seconds']:.0f} ms",
                f"{row['ratio']:.3f} ({low:.3f} – {high:.3f})",
                f"{row['switch_microseconds']:.0f} µs",
                f"{row['bytes'] / 1e6:.2f} MB",
            ]
        )
    header = ["model, adapters", "step", "ratio (quartiles)", "switching", "tensors"]
    return markdown(header, lines)


TABLES = {"formats": formats, "schemes": schemes, "shapes": shapes, "talora": talora, "routing": routing}


def filled(page: str) -> str:
    """A page's text with its tables made anew."""
    for name, make in TABLES.items():
        block = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        if block.search(page):
            table = make()
            page = block.sub(lambda found, table=table: found[1] + table + "\n" + found[2], page)
    return page


if __name__ == "__main__":
    for path in PAGES:
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")

"""Tables of plans, from what `bench_budget.py` has measured."""

from collections.abc import Iterator

from harness import grouped

MODELS = {"ddpm-fashion-mnist-32": "embedded", "cifar10-pixel": "`cifar10-pixel`"}


def budget() -> Iterator[dict[str, str]]:
    """A plan beside other choices of equal size."""
    for row in grouped("budget", "part")["sizes"]:
        size = " and ".join(f"`{each}`" for each in row["size"].split(" + "))
        yield {"model": MODELS[row["model"]], "size of": size if "+" not in row["size"] else f"mean of {size}"} | {
            **_chosen(row),
            "bytes": f"{row['bytes']:,}",
            **_beside_the_plan(row),
        }


def budget_steps() -> Iterator[dict[str, str]]:
    """A plan beside the uniform scheme whose step takes as long."""
    for row in grouped("budget", "part")["steps"]:
        low, high = row["spread_seconds"]
        yield {"model": MODELS[row["model"]], "step of": f"`{row['size']}`"} | {
            **_chosen(row),
            "step, batch " + str(row["batch"]): f"{1e3 * row['seconds']:.1f} ({1e3 * low:.1f} – {1e3 * high:.1f}) ms",
            "predicted": f"{1e3 * row['predicted_seconds']:.1f} ms",
            **_beside_the_plan(row),
        }


def _chosen(row: dict) -> dict[str, str]:
    return {"choice": f"scheme `{row['choice']}`" if row["choice"].startswith("w") else row["choice"]}


def _beside_the_plan(row: dict) -> dict[str, str]:
    gain = "–"
    if "plan_gains_db" in row:
        gain = "{:+.2f} ({:+.2f} – {:+.2f})".format(row["plan_gains_db"], *row["plan_gains_db_interval"])
    return {
        "predicted `traj_rel_l2`": f"{row['predicted_traj_rel_l2']:.4f}",
        "PSNR (dB)": "{:.1f} ({:.1f} – {:.1f})".format(row["image_psnr_db"], *row["image_psnr_db_interval"]),
        "the plan gains (dB, paired)": gain,
        "pictures": str(row["num_samples"]),
    }


def budget_psnr() -> Iterator[dict[str, str]]:
    """A target for PSNR, and what a checkpoint gives on fresh noise."""
    for row in grouped("budget", "part")["psnr"]:
        yield {
            "model": MODELS[row["model"]],
            "target": f"{row['target_psnr']:g} dB",
            "predicted": f"{row['predicted_psnr_db']:.1f} dB",
            "found": "{:.1f} ({:.1f} – {:.1f}) dB".format(row["image_psnr_db"], *row["image_psnr_db_interval"]),
            "bytes": f"{row['bytes']:,}",
            "runs": str(len(row["runs"])),
            "pictures": str(row["num_samples"]),
        }


def budget_sums() -> Iterator[dict[str, str]]:
    """Errors of mixes, beside the sums of their layers' errors."""
    for row in grouped("budget", "part")["sums"]:
        own, floats, bytes_ = (row[key] for key in ("squared_error", "sum_others_float", "sum_others_8_bits"))
        yield {
            "mix": f"{row['mix']}, {row['share_at_4_bits']:.0%} of the layers at 4 bits",
            "squared error": f"{own:.2e}",
            "sum, others float": f"{floats / own:.2f} ×",
            "sum, others at 8 bits": f"{bytes_ / own:.2f} ×",
        }

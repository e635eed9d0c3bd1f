"""Plot errors over the timesteps, from the results files.

python tests/benchmarks/plot_timesteps.py
"""

from statistics import mean

import matplotlib as mpl
from harness import RESULTS, read_results
from tables import CELLS

mpl.use("Agg")
import matplotlib.pyplot as plt

BASELINES = ("w4a4-signed", "int-w4a4", "ptq-signed", "ptq")


def plot(results: str, key: str, labels: dict[str, str] | None = None) -> None:
    """Write `model_cards/results/<results>-timesteps.png`: a line for each value of `key`, mean over seeds."""
    rows = [row for row in read_results(results)["rows"] if "eps_rel_l2_by_timestep" in row]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for name in dict.fromkeys(row[key] for row in rows):
        cells = [row["eps_rel_l2_by_timestep"] for row in rows if row[key] == name]
        timesteps = [float(t) for t in cells[0]]
        style = "--" if name in BASELINES else "-"
        label = (labels or {}).get(name, name).replace("`", "")
        axes.plot(timesteps, [mean(c[t] for c in cells) for t in cells[0]], style, marker=".", label=label)
    axes.set(yscale="log", xlabel="timestep (noise on the left, image on the right)", ylabel="relative error of ε")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    figure.savefig(RESULTS / f"{results}-timesteps.png", dpi=120)


if __name__ == "__main__":
    plot("ddpm-fashion-mnist-32", "scheme")
    plot("talora", "cell", CELLS)

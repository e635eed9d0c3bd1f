"""Plot the error of every scheme over the timesteps, from the results file.

python tests/benchmarks/plot_timesteps.py
"""

from statistics import mean

import matplotlib as mpl
from harness import RESULTS, read_results

mpl.use("Agg")
import matplotlib.pyplot as plt

NAME = "ddpm-fashion-mnist-32"


def main() -> None:
    """Write `model_cards/results/<name>-timesteps.png`."""
    rows = read_results(NAME)["rows"]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for scheme in dict.fromkeys(row["scheme"] for row in rows):
        cells = [row["eps_rel_l2_by_timestep"] for row in rows if row["scheme"] == scheme]
        timesteps = [float(t) for t in cells[0]]
        style = "--" if scheme in ("w4a4-signed", "int-w4a4") else "-"
        axes.plot(timesteps, [mean(c[t] for c in cells) for t in cells[0]], style, marker=".", label=scheme)
    axes.set(yscale="log", xlabel="timestep (noise on the left, image on the right)", ylabel="relative error of ε")
    axes.invert_xaxis()
    axes.grid(alpha=0.3)
    axes.legend(ncols=2, fontsize=8)
    figure.savefig(RESULTS / f"{NAME}-timesteps.png", dpi=120)


if __name__ == "__main__":
    main()

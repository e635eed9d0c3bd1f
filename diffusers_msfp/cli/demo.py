"""`demo`: the embedded model, quantized, beside full precision."""

from pathlib import Path

import numpy as np

from ..assets import EMBEDDED_MODEL
from ..evaluation import image_grid, sample_images
from ..outputs import require_writable_file, require_writable_folder, writing
from .compare import compare
from .quantize import quantize
from .shared.load import load_pipeline
from .shared.terminal import progress, stderr

SCHEMES = ("w8a8", "w4a8", "w4a4")
PICTURES = 10


def demo(out: str | Path = "msfp-demo", *, steps: int = 50, seed: int = 0) -> dict:
    """Quantize the embedded Fashion-MNIST DDPM, sample it beside full precision, and compare.

    Args:
        out (`str` or `Path`): folder for `demo.png` and the quantized checkpoints.
        steps (`int`): denoising steps of the pictures.
        seed (`int`): of calibration and noise.

    Returns:
        `dict`: `picture` (path of the PNG; rows: full precision, then each scheme) and `schemes`: name → figures of
        `quantize` and `compare`.
    """
    out = Path(out)
    require_writable_folder(out)
    require_writable_file(out / "demo.png")
    out.mkdir(parents=True, exist_ok=True)
    rows, labels, figures = [], [], {}

    def draw(source: str | Path, label: str) -> None:
        with progress(f"sampling {label}") as report:
            rows.append(sample_images(load_pipeline(str(source)), num=PICTURES, steps=steps, seed=seed, on_step=report))
        labels.append(label)

    draw(EMBEDDED_MODEL, "full precision")
    for scheme in SCHEMES:
        stderr.print(f"[bold]{scheme}[/]: quantizing, sampling, comparing")
        target = out / scheme
        made = quantize(str(EMBEDDED_MODEL), target, scheme=scheme, seed=seed, overwrite=True)
        figures[scheme] = made | compare(str(EMBEDDED_MODEL), str(target), seed=seed)
        draw(target, f"{scheme}, {made['bytes_after'] / 1e6:.2f} MB")
    picture = out / "demo.png"
    with writing(picture):
        image_grid(np.concatenate(rows), columns=PICTURES, scale=2, labels=labels).save(picture)
    return {"picture": str(picture), "schemes": figures}

"""`demo`: the embedded model, quantized, beside full precision."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..assets import EMBEDDED_MODEL, TUNED_MODELS
from ..checkpoint.describe import read_config
from ..errors import ConfigError
from ..evaluation import image_grid, sample_images
from ..outputs import png_of, require_writable_file, require_writable_folder, write_file
from ..results import Result
from ..sampling.calls import unseen
from .compare import CheckpointComparison, compare
from .quantize import QuantizedCheckpoint, quantize
from .shared.load import load_pipeline
from .shared.terminal import progress, stderr

SCHEMES = tuple(TUNED_MODELS)
PICTURES = 10


def tuned(scheme: str) -> str:
    """What the demo calls a checkpoint that the package brings."""
    return f"{scheme}, recipe msfp"


@dataclass(frozen=True, kw_only=True)
class DemoScheme(Result):
    """One scheme of the demo.

    Args:
        quantized (`QuantizedCheckpoint`, *optional*), compared (`CheckpointComparison`): what `quantize` and `compare`
            found; in `to_dict` all of both side by side. The former is None for a checkpoint that the package brings.
    """

    quantized: QuantizedCheckpoint | None
    compared: CheckpointComparison

    def to_dict(self) -> dict[str, Any]:
        """See the class."""
        return ({} if self.quantized is None else self.quantized.to_dict()) | self.compared.to_dict()


@dataclass(frozen=True, kw_only=True)
class Demo(Result):
    """What `demo` wrote.

    Args:
        picture (`str`): path of the PNG; rows: full precision, then each scheme, at once and fine-tuned.
        schemes (`Mapping[str, DemoScheme]`): by name, and prepared checkpoints as `tuned(name)`.
    """

    picture: str
    schemes: Mapping[str, DemoScheme]


def demo(out: str | Path = "msfp-demo", *, num_inference_steps: int = 50, seed: int = 0) -> Demo:
    """Quantize the embedded Fashion-MNIST DDPM, sample it beside full precision, and compare.

    Below each scheme stands a checkpoint that the package brings: fine-tuning takes longer than a demo may.

    Args:
        out (`str` or `Path`): folder for `demo.png` and the quantized checkpoints.
        num_inference_steps (`int`): denoising steps of the pictures.
        seed (`int`): of calibration and noise.
    """
    out = Path(out)
    require_writable_folder(out)
    require_writable_file(out / "demo.png")
    for scheme in SCHEMES:
        made_from = Path(read_config(out / scheme / "unet").get("_name_or_path") or "")
        if (out / scheme).exists() and made_from.parts[-2:] != (EMBEDDED_MODEL.name, "unet"):
            raise ConfigError(
                f"A demo replaces what an earlier one made, but {out / scheme} is something else. Choose another "
                f"folder: `--out`."
            )
    out.mkdir(parents=True, exist_ok=True)
    rows, labels, figures = [], [], {}

    def draw(source: str | Path, label: str) -> None:
        with progress(f"sampling {label}") as report:
            rows.append(
                sample_images(
                    load_pipeline(str(source)),
                    num_samples=PICTURES,
                    num_inference_steps=num_inference_steps,
                    seed=unseen(seed),  # calibration has seen the other
                    on_progress=report,
                )
            )
        labels.append(label)

    draw(EMBEDDED_MODEL, "full precision")
    for scheme in SCHEMES:
        stderr.print(f"[bold]{scheme}[/]: quantizing, sampling, comparing")
        target = out / scheme
        made = quantize(str(EMBEDDED_MODEL), target, scheme=scheme, seed=seed, overwrite=True)
        figures[scheme] = DemoScheme(quantized=made, compared=compare(str(EMBEDDED_MODEL), str(target), seed=seed))
        draw(target, f"{scheme}, {made.bytes_quantized / 1e6:.2f} MB")
        name, prepared = tuned(scheme), TUNED_MODELS[scheme]
        stderr.print(f"[bold]{name}[/]: the prepared checkpoint, sampling, comparing")
        compared = compare(str(EMBEDDED_MODEL), str(prepared), seed=seed)
        figures[name] = DemoScheme(quantized=None, compared=compared)
        draw(prepared, f"{name}, {compared.bytes_quantized / 1e6:.2f} MB")
    picture = out / "demo.png"
    write_file(picture, png_of(image_grid(np.concatenate(rows), columns=PICTURES, scale=2, labels=labels)))
    return Demo(picture=str(picture), schemes=figures)

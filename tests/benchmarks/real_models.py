"""What benchmarks need to know of the trained models: how they are called, and the pictures that they learned from."""

import json
import sys
from pathlib import Path

import numpy as np
from diffusers import DiffusionPipeline

sys.path.insert(0, str(Path(__file__).with_name("training")))

from captions import prompts_for  # noqa: E402
from data import load_cifar10  # noqa: E402
from loop import RESULTS  # noqa: E402


def asked_of(model: Path, pipe: DiffusionPipeline) -> dict:
    """What a real model is called with: prompts of its captions, where it takes some, and the guidance of its card."""
    card = model / RESULTS
    settings = json.loads(card.read_text(encoding="utf-8"))["training"]["settings"] if card.is_file() else {}
    asked = {"guidance_scale": settings["guidance"]} if "guidance" in settings else {}
    prompts = prompts_for(pipe)
    return asked if prompts is None else asked | {"prompts": prompts}


def real_pictures(data: Path, folder: Path) -> Path:
    """An archive that evaluations read: Fashion-MNIST's own; JPEG CIFAR-10's test pictures, decoded into a folder."""
    with np.load(data) as archive:
        if "offsets" not in archive:
            return data
    decoded = folder / f"{data.stem}-test.npz"
    if not decoded.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        images = load_cifar10(data, train=False).images
        np.savez(part := folder / f"{data.stem}-test.part.npz", x_test=images.permute(0, 2, 3, 1).numpy())
        part.replace(decoded)
    return decoded

"""The embedded model: a real DDPM trained on Fashion-MNIST, fp16, 1.8 M parameters. Recipe and figures in `model_cards/`."""

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "ddpm-fashion-mnist-32"

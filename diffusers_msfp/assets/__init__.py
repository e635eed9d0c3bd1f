"""The embedded model: a real DDPM trained on Fashion-MNIST, fp16, 1.8 M parameters; its card is in `model_cards/`."""

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "ddpm-fashion-mnist-32"

"""A DDPM trained on Fashion-MNIST (fp16, 1.8 M parameters, its card in `model_cards/`), twice quantized, and classifiers.

The classifiers' weights belong to classes in `evaluation.images.features`: `FashionFeatures`, which
`tests/benchmarks/fashion_features.py` trains, and `Cifar10Features`, whose origin and licence stand in
`cifar10-resnet56.md`.
"""

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "ddpm-fashion-mnist-32"
TUNED_MODELS = {scheme: Path(__file__).parent / f"ddpm-fashion-mnist-32-{scheme}" for scheme in ("w4a8", "w4a4")}
"""Scheme → the same model after the recipe `msfp`."""
FASHION_FEATURES = Path(__file__).parent / "fashion-features.safetensors"
CIFAR10_FEATURES = Path(__file__).parent / "cifar10-resnet56.safetensors"

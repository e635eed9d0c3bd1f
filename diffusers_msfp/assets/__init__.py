"""A DDPM trained on Fashion-MNIST, fp16, 1.8 M parameters (card in `model_cards/`), and a classifier for its data.

The classifier's weights belong to `evaluation.features.FashionFeatures`; `tests/benchmarks/fashion_features.py` trains
them.
"""

from pathlib import Path

EMBEDDED_MODEL = Path(__file__).parent / "ddpm-fashion-mnist-32"
FASHION_FEATURES = Path(__file__).parent / "fashion-features.safetensors"

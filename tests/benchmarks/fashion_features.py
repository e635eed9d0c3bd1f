"""Train the small Fashion-MNIST classifier whose features measure Fréchet distances: `evaluation.FEATURES["fashion"]`.

    python tests/benchmarks/fashion_features.py --data fashion_mnist.npz

takes about a minute on two cores, validates it and writes its weights into the package, with test accuracy and the
response to added noise in `model_cards/results/fashion-features.json`. Rows of other results files that hold Fréchet
distances are of the weights that the package had then.
"""

from typing import Annotated

import numpy as np
import torch
import typer
from harness import write_results
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from diffusers_msfp.assets import FASHION_FEATURES
from diffusers_msfp.evaluation.images.distances import frechet_distance
from diffusers_msfp.evaluation.images.features import FashionFeatures, extract, feature_network


def load_images(data: str, split: str) -> tuple[Tensor, Tensor]:
    """Images padded to 32×32 in [0, 1], and labels."""
    archive = np.load(data)
    images = torch.from_numpy(archive[f"x_{split}"]).float()[:, None] / 255
    return F.pad(images, (2, 2, 2, 2)), torch.from_numpy(archive[f"y_{split}"]).long()


def fashion_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of the features of two sets of images `(N, 1, 32, 32)` in [0, 1].

    Raises:
        ValueError: a set has not more images than there are features, so that its covariance is singular.
    """
    few = min(len(real), len(fake))
    if few <= FashionFeatures.width:
        raise ValueError(
            f"A Fréchet distance must be of more pictures than there are features, {FashionFeatures.width}, but got "
            f"{few}: draw more."
        )
    network = feature_network("fashion")
    return frechet_distance(extract(network, real).pooled, extract(network, fake).pooled)


def main(data: Annotated[str, typer.Option(help="fashion_mnist.npz")], epochs: int = 3, seed: int = 0) -> None:
    """Train, validate, write."""
    torch.manual_seed(seed)
    images, labels = load_images(data, "train")
    model = FashionFeatures()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    batches = epochs * len(images) // 256
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=batches + 1)
    order = torch.cat([torch.randperm(len(images)) for _ in range(epochs)])
    for batch in order[: batches * 256].view(batches, 256):
        loss = F.cross_entropy(model(images[batch]).logits, labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    save_file(model.state_dict(), FASHION_FEATURES)
    test, test_labels = load_images(data, "test")
    guesses = extract(model, test).logits.argmax(1)
    accuracy = (guesses == test_labels).float().mean().item()
    shuffled = test[torch.randperm(len(test))]
    one, two = shuffled[:5000], shuffled[5000:]
    rows = [{"test_accuracy": round(accuracy, 4)}]
    for grey_levels in (0, 5, 10, 20, 40):
        noisy = (two + torch.randn(two.shape) * grey_levels / 255).clamp(0, 1)
        rows.append({"noise_grey_levels": grey_levels, "frechet_distance": round(fashion_distance(one, noisy), 4)})
        typer.echo(rows[-1], err=True)
    typer.echo(f"test accuracy {accuracy:.4f}", err=True)
    write_results("fashion-features", "python tests/benchmarks/fashion_features.py --data fashion_mnist.npz", rows)


if __name__ == "__main__":
    typer.run(main)

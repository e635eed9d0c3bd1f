"""A small Fashion-MNIST classifier whose features measure Fréchet distances. Not Inception, so never called FID.

    python tests/benchmarks/fashion_features.py --data fashion_mnist.npz

trains it (about a minute on two cores), validates it and writes `fashion_features.safetensors` beside this file, with
test accuracy and the response to added noise in `model_cards/results/fashion-features.json`.
"""

from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from harness import write_results
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.image.fid import FrechetInceptionDistance

WEIGHTS = Path(__file__).with_name("fashion_features.safetensors")
WIDTH = 64


class FashionFeatures(nn.Module):
    """Images `(N, 1, 32, 32)` in [0, 1] → features `(N, 64)`."""

    num_features = WIDTH

    def __init__(self) -> None:
        super().__init__()
        sizes = (1, 32, WIDTH, WIDTH)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(sizes, sizes[1:], strict=False))
        self.norms = nn.ModuleList(nn.BatchNorm2d(size) for size in sizes[1:])
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, images: Tensor) -> Tensor:
        """Features before the classifier."""
        x = images * 2 - 1
        for conv, norm in zip(self.convs, self.norms, strict=True):
            x = F.max_pool2d(F.relu(norm(conv(x))), 2)
        return x.mean((2, 3))


def load_images(data: str, split: str) -> tuple[Tensor, Tensor]:
    """Images padded to 32×32 in [0, 1], and labels."""
    archive = np.load(data)
    images = torch.from_numpy(archive[f"x_{split}"]).float()[:, None] / 255
    return F.pad(images, (2, 2, 2, 2)), torch.from_numpy(archive[f"y_{split}"]).long()


def features() -> FashionFeatures:
    """The trained network."""
    model = FashionFeatures()
    model.load_state_dict(load_file(WEIGHTS))
    return model.eval().requires_grad_(False)


def frechet_distance(real: Tensor, fake: Tensor) -> float:
    """Fréchet distance of the features of two sets of images `(N, 1, 32, 32)` in [0, 1]."""
    metric = FrechetInceptionDistance(feature=features(), normalize=True, input_img_size=(1, 32, 32))
    for images, is_real in ((real, True), (fake, False)):
        for part in images.split(256):
            metric.update(part, real=is_real)
    return metric.compute().item()


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
        loss = F.cross_entropy(model.head(model(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model.eval()
    save_file(model.state_dict(), WEIGHTS)
    test, test_labels = load_images(data, "test")
    with torch.no_grad():
        guesses = torch.cat([model.head(model(part)).argmax(1) for part in test.split(1000)])
    accuracy = (guesses == test_labels).float().mean().item()
    shuffled = test[torch.randperm(len(test))]
    one, two = shuffled[:5000], shuffled[5000:]
    rows = [{"test_accuracy": round(accuracy, 4)}]
    for grey_levels in (0, 5, 10, 20, 40):
        noisy = (two + torch.randn(two.shape) * grey_levels / 255).clamp(0, 1)
        rows.append({"noise_grey_levels": grey_levels, "frechet_distance": round(frechet_distance(one, noisy), 4)})
        typer.echo(rows[-1], err=True)
    typer.echo(f"test accuracy {accuracy:.4f}", err=True)
    write_results("fashion-features", "python tests/benchmarks/fashion_features.py --data fashion_mnist.npz", rows)


if __name__ == "__main__":
    typer.run(main)

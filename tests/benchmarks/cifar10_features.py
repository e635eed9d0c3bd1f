"""Put the CIFAR-10 classifier of `evaluation.FEATURES["cifar10-resnet56"]` into the package, in float16.

    python tests/benchmarks/cifar10_features.py --weights resnet56-4bfd9763.th --data cifar10_jpeg60k.npz

`resnet56-4bfd9763.th` is that of https://github.com/akamaster/pytorch_resnet_cifar10. Test accuracy, before and after
rounding, and the response to added noise go to `model_cards/results/cifar10-features.json`. The pictures are JPEG
CIFAR-10: those of CIFAR-10 after JPEG, which costs accuracy.
"""

import sys
from pathlib import Path
from typing import Annotated

import torch
import typer
from harness import write_results
from safetensors.torch import save_file
from torch import Tensor

from diffusers_msfp.assets import CIFAR10_FEATURES
from diffusers_msfp.evaluation.images.distances import frechet_distance
from diffusers_msfp.evaluation.images.features import Cifar10Features, extract

sys.path[:0] = [str(Path(__file__).parent / "training")]

from data import load_cifar10  # noqa: E402


def main(
    weights: Annotated[Path, typer.Option(help="resnet56-4bfd9763.th")],
    data: Annotated[Path, typer.Option(help="cifar10_jpeg60k.npz")],
) -> None:
    """Convert, validate, write."""
    given = torch.load(weights, map_location="cpu", weights_only=True)["state_dict"]
    given = {name.removeprefix("module."): tensor for name, tensor in given.items()}
    save_file({n: t.half() if t.is_floating_point() else t for n, t in given.items()}, CIFAR10_FEATURES)
    original, network = Cifar10Features().eval(), Cifar10Features.trained()
    original.load_state_dict(given)
    test = load_cifar10(data, train=False)
    images = test.images / 255

    def accuracy(model: Cifar10Features) -> float:
        return (extract(model, images).logits.argmax(1) == test.labels).float().mean().item()

    def distance(one: Tensor, other: Tensor) -> float:
        return frechet_distance(extract(network, one).pooled, extract(network, other).pooled)

    rows = [{"test_accuracy": round(accuracy(network), 4), "test_accuracy_float32": round(accuracy(original), 4)}]
    generator = torch.Generator().manual_seed(0)
    shuffled = images[torch.randperm(len(images), generator=generator)]
    one, two = shuffled.chunk(2)
    for levels in (0, 5, 10, 20, 40):
        noisy = (two + torch.randn(two.shape, generator=generator) * levels / 255).clamp(0, 1)
        rows.append({"noise_levels": levels, "frechet_distance": round(distance(one, noisy), 4)})
        typer.echo(rows[-1], err=True)
    command = "python tests/benchmarks/cifar10_features.py --weights resnet56-4bfd9763.th --data cifar10_jpeg60k.npz"
    write_results("cifar10-features", command, rows)


if __name__ == "__main__":
    typer.run(main)

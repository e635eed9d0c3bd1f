"""Train (on) the embedded Fashion-MNIST DDPM: the recipe behind `diffusers_msfp/assets/ddpm-fashion-mnist-32`.

The 60 000 training images are padded to 32×32, scaled to [-1, 1] and flipped at random; the test images are never read.
Loss: mean squared error of the predicted noise, timesteps uniform (DDPM, arXiv 2006.11239, algorithm 1). The weights
kept are the exponential moving average. A run is resumed from its own folder when it was interrupted.

    python tests/benchmarks/train_fashion_mnist.py --data fashion_mnist.npz --init MODEL_DIR --out DIR
"""

import json
import math
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from PIL import Image

IMAGE_SIZE = 32
WARMUP_STEPS = 200


def load_images(data: Path) -> torch.Tensor:
    """Training images, `(60000, 1, 32, 32)` uint8, padded with 2 black pixels on each side."""
    with np.load(data) as arrays:
        images = torch.from_numpy(arrays["x_train"])
    return torch.nn.functional.pad(images, (2, 2, 2, 2))[:, None]  # (N, 1, 32, 32)


def draw_batch(images: torch.Tensor, step: int, batch_size: int, seed: int, num_timesteps: int):
    """Clean images, noise and timesteps: a function of `(seed, step)` alone, so a resumed run is the same."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
    index = torch.randint(len(images), (batch_size,), generator=generator)
    clean = images[index].float() / 127.5 - 1
    flip = torch.rand(batch_size, generator=generator) < 0.5
    clean = torch.where(flip[:, None, None, None], clean.flip(-1), clean)
    noise = torch.randn(clean.shape, generator=generator)
    timesteps = torch.randint(num_timesteps, (batch_size,), generator=generator)
    return clean, noise, timesteps


def learning_rate(step: int, steps: int, peak: float) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < WARMUP_STEPS:
        return peak * (step + 1) / WARMUP_STEPS
    return peak * 0.5 * (1 + math.cos(math.pi * (step - WARMUP_STEPS) / max(1, steps - WARMUP_STEPS)))


def save_grid(unet: UNet2DModel, scheduler: DDPMScheduler, path: Path) -> None:
    """64 images in 50 DDIM steps, 8 by 8."""
    pipe = DDPMPipeline(unet, DDIMScheduler.from_config(scheduler.config))
    pipe.set_progress_bar_config(disable=True)
    images = pipe(64, torch.Generator().manual_seed(0), num_inference_steps=50, output_type="np").images
    grid = images.reshape(8, 8, IMAGE_SIZE, IMAGE_SIZE).transpose(0, 2, 1, 3).reshape(8 * IMAGE_SIZE, -1)
    Image.fromarray((grid * 255).round().astype("uint8")).resize((768, 768), Image.Resampling.NEAREST).save(path)


def main(
    data: Annotated[Path, typer.Option(help="fashion_mnist.npz with x_train (60000, 28, 28) uint8")],
    init: Annotated[Path, typer.Option(help="pipeline directory to start from")],
    out: Annotated[Path, typer.Option(help="pipeline directory to write; holds the run's state too")],
    steps: int = 3000,
    batch_size: int = 64,
    peak_lr: float = 3e-4,
    ema_decay: float = 0.999,
    seed: int = 1,
    save_every: int = 500,
    bf16: bool = False,
) -> None:
    """Train for `steps` steps and write the averaged weights as a stock `DDPMPipeline`."""
    torch.manual_seed(seed)
    out.mkdir(parents=True, exist_ok=True)
    images = load_images(data)
    scheduler = DDPMScheduler.from_pretrained(init, subfolder="scheduler")
    unet = UNet2DModel.from_pretrained(init, subfolder="unet").train().to(memory_format=torch.channels_last)
    average = UNet2DModel.from_pretrained(init, subfolder="unet").eval()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=peak_lr, weight_decay=1e-4, fused=True)
    first, losses, seconds = 0, [], 0.0
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file)
        unet.load_state_dict(state["unet"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        first, losses, seconds = state["step"], state["losses"], state["seconds"]

    started = time.monotonic() - seconds
    for step in range(first, steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, peak_lr)
        clean, noise, timesteps = draw_batch(images, step, batch_size, seed, scheduler.config.num_train_timesteps)
        noisy = scheduler.add_noise(clean, noise, timesteps).to(memory_format=torch.channels_last)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            predicted = unet(noisy, timesteps).sample
        loss = (predicted.float() - noise).square().mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(ema_decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for mean, parameter in zip(average.parameters(), unet.parameters(), strict=True):
                mean.lerp_(parameter, 1 - decay)
        losses.append(loss.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            seconds = time.monotonic() - started
            recent = sum(losses[-save_every:]) / len(losses[-save_every:])
            typer.echo(f"step {step + 1}/{steps}  loss {recent:.5f}  {seconds / 60:.1f} min", err=True)
            state = {"unet": unet.state_dict(), "average": average.state_dict(), "optimizer": optimizer.state_dict()}
            state |= {"step": step + 1, "losses": losses, "seconds": seconds}
            torch.save(state, state_file.with_suffix(".tmp"))
            state_file.with_suffix(".tmp").replace(state_file)
            save_grid(average, scheduler, out / "samples.png")

    DDPMPipeline(average, scheduler).save_pretrained(out)
    recipe = {
        "steps": steps,
        "batch_size": batch_size,
        "peak_lr": peak_lr,
        "ema_decay": ema_decay,
        "seed": seed,
        "bf16": bf16,
    }
    final = sum(losses[-500:]) / len(losses[-500:])
    recipe |= {"minutes": round(seconds / 60, 1), "loss_last_500_steps": round(final, 5), "torch": torch.__version__}
    (out / "training.json").write_text(json.dumps(recipe, indent=2) + "\n")


if __name__ == "__main__":
    typer.run(main)

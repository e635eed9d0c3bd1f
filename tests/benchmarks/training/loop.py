"""The training loop of every model: accelerate, moving average, atomic checkpoints, a curve and samples to look at."""

import json
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from accelerate import Accelerator
from data import batch_generator
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import Attention, AttnProcessor
from diffusers.training_utils import EMAModel
from PIL import Image
from torch import Tensor, nn

from diffusers_msfp.checkpoint.describe import config_of_origin

RESULTS = "results/training.json"
"""In a folder of `model_cards`: how its weights were trained."""
BFLOAT16, FLOAT32 = "bfloat16 autocast", "float32"
"""What updates are computed in, as cards say it."""
WINDOW = 50
"""Updates whose mean loss is one point of the curve."""


@dataclass(frozen=True)
class Settings:
    """How a model is trained.

    Args:
        updates (`int`): in all; the learning rate falls to zero over the last `cooldown` of them.
        batch_size (`int`): pictures of an update, over all processes.
        learning_rate (`float`): its peak, after `warmup` updates.
        ema_decay (`float`): of the moving average, which is what is kept.
        weight_decay, clip (`float`): of AdamW; largest norm of the gradient.
        seed (`int`): of weights, data order, noise.
    """

    updates: int = 60_000
    batch_size: int = 64
    learning_rate: float = 4e-4
    warmup: int = 500
    cooldown: float = 0.3
    ema_decay: float = 0.9995
    weight_decay: float = 1e-3
    clip: float = 1.0
    seed: int = 0

    def end(self, stop_at: int | None = None) -> int:
        """Updates after which a run ends, which may be asked to stop early."""
        return self.updates if stop_at is None else min(self.updates, stop_at)

    def rate(self, update: int, begun: int = 0) -> float:
        """Learning rate of an update: linear warm-up from `begun` on, constant, linear to zero."""
        remaining = (self.updates - update) / max(1.0, self.cooldown * self.updates)
        return self.learning_rate * min(1.0, (update - begun + 1) / self.warmup, max(0.0, remaining))


class SettingsError(ValueError):
    """A run cannot begin, or go on, with these settings."""


@dataclass
class Progress:
    """What a run knows of itself; stored with each checkpoint.

    Args:
        update (`int`): updates made.
        begun (`int`): those of them that published weights had, with which it began.
        seconds (`float`): of training, over all sessions.
        precisions (`dict[str, int]`): in what updates were computed → how many; runs of before do not say.
        curve (`list[float]`): mean loss of each `WINDOW` updates.
        window (`list[float]`): losses since the curve's last point.
    """

    update: int = 0
    begun: int = 0
    seconds: float = 0.0
    precisions: dict[str, int] = field(default_factory=dict)
    curve: list[float] = field(default_factory=list)
    window: list[float] = field(default_factory=list)

    def add(self, loss: float, precision: str) -> None:
        """Count an update."""
        self.update += 1
        self.precisions[precision] = self.precisions.get(precision, 0) + 1
        self.window.append(loss)
        if len(self.window) == WINDOW:
            self.curve.append(sum(self.window) / WINDOW)
            self.window.clear()

    def state_dict(self) -> dict:
        """For accelerate."""
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        """For accelerate."""
        vars(self).update(state)


class Task(nn.Module):
    """A model to be trained: its networks are children, its forward gives the loss.

    A subclass has `draw` and `sample_grid`, and `pipeline`, unless it exports something else than a pipeline.

    Args:
        settings (`Settings`): of its training, and where a subclass has more, of its networks.
        made_of (`Mapping[str, str]`, *optional*): what else a run depends on → its digest.
    """

    name: str
    defaults: type[Settings] = Settings

    def __init__(self, settings: Settings, made_of: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.settings, self.made_of = settings, dict(made_of or {})

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        """The data and noise of one update, on the CPU."""
        raise NotImplementedError

    def sample_grid(self, num: int = 64, steps: int = 50) -> Tensor:
        """Pictures `(num, channels, H, W)` in [0, 1], of the weights that the networks have now, from seed 0."""
        raise NotImplementedError

    def pipeline(self) -> DiffusionPipeline:
        """The networks in a stock pipeline."""
        raise NotImplementedError

    def begin_with(self, folder: Path) -> None:
        """Take the weights of an exported pipeline.

        Raises:
            RuntimeError: they are another network's.
        """
        stored = DiffusionPipeline.from_pretrained(folder)
        for name, network in self.pipeline().components.items():
            if isinstance(network, nn.Module):
                network.load_state_dict(stored.components[name].state_dict())

    def cast(self) -> None:
        """To the dtypes in which the networks are published: float16."""
        self.half()

    def export(self, folder: Path) -> None:
        """Write the weights that the networks have now; the networks are cast."""
        self.eval().cast()
        self.pipeline().save_pretrained(folder)
        for file in folder.rglob("config.json"):
            file.write_bytes(config_of_origin(file, None))  # the autoencoder remembers where it was loaded from


def train(
    task: Task,
    out: Path,
    *,
    save_every: float = 240.0,
    sample_every: int = 2000,
    stop_at: int | None = None,
    begin_with: Path | None = None,
    say: Callable[[str], None] = print,
) -> Progress:
    """Train, or go on where a run of the same folder stopped.

    Args:
        task (`Task`): what is trained, with weights drawn from the seed.
        out (`Path`): checkpoints (`checkpoint-<update>`), `samples-<update>.png`, `loss.png`, `progress.json`.
        save_every (`float`): seconds between checkpoints; `kill -9` costs no more than these.
        sample_every (`int`): updates between grids.
        stop_at (`int`, *optional*): stop at this update without finishing; 0 only takes up the last checkpoint.
        begin_with (`Path`, *optional*): a folder of `model_cards`, whose averaged weights and number of updates a run
            without checkpoint begins with; the optimizer begins anew, and warms up again.
        say (`Callable[[str], None]`): gets a line at each checkpoint.

    Returns:
        `Progress`: of the run; the task's networks have the averaged weights.

    Raises:
        SettingsError: the run of this folder, or the published weights, have other settings, of which only `updates`
            may change; or processes cannot share a batch equally. `out` is as it was.
    """
    settings = task.settings
    bf16 = torch.cuda.is_available() or torch.ops.mkldnn._is_mkldnn_bf16_supported()
    precision = BFLOAT16 if bf16 else FLOAT32
    accelerator = Accelerator(mixed_precision="bf16" if bf16 else "no", cpu=not torch.cuda.is_available())
    share, rank = _share(settings.batch_size, accelerator.num_processes), accelerator.process_index
    progress = Progress()
    if begin_with is not None and latest_checkpoint(out) is None:
        progress = _begin(task, begin_with)
        say(f"{task.name}: begins with the weights of update {progress.update}")
    if accelerator.is_main_process:
        _keep_settings(task, out / "settings.json")
    task.to(memory_format=torch.channels_last)
    if not torch.cuda.is_available():
        _plain_attention(task)
    trained = [p for p in task.parameters() if p.requires_grad]
    rate, decay = settings.learning_rate, settings.weight_decay
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=decay, betas=(0.9, 0.99), fused=True)
    model, optimizer = accelerator.prepare(task.train(), optimizer)
    ema = EMAModel(trained, decay=settings.ema_decay, use_ema_warmup=True, power=0.75, foreach=True)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema, progress)
    if (latest := latest_checkpoint(out)) is not None:
        accelerator.load_state(str(latest))
        ema.to(accelerator.device)  # accelerate loads it on the CPU
        say(f"{task.name}: goes on at update {progress.update}")
    begun, saved, first = time.monotonic() - progress.seconds, time.monotonic(), progress.update
    started = time.monotonic()
    end = settings.end(stop_at)

    def save() -> None:
        progress.seconds = time.monotonic() - begun
        _save(accelerator, out, progress)

    with _stop_on_signals() as stopping:
        while progress.update < end and not stopping:
            batch = task.draw(settings.batch_size, batch_generator(settings.seed, progress.update))
            mine = [part[rank * share : (rank + 1) * share].to(accelerator.device) for part in batch]
            for group in optimizer.param_groups:
                group["lr"] = settings.rate(progress.update, progress.begun)
            with accelerator.autocast():
                loss = model(*mine)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(trained, settings.clip)
            optimizer.step()
            optimizer.zero_grad()
            ema.step(trained)
            progress.add(accelerator.reduce(loss.detach().float(), "mean").item(), precision)
            last = progress.update == end
            sampled = progress.update % sample_every == 0 or progress.update == settings.updates
            if last or sampled or time.monotonic() - saved > save_every:
                save()
                speed = (time.monotonic() - started) / (progress.update - first)
                hours = speed * (settings.updates - progress.update) / 3600
                recent = (progress.window or progress.curve[-1:])[-WINDOW:]
                say(
                    f"{task.name}: update {progress.update}/{settings.updates}, loss {sum(recent) / len(recent):.4f}, "
                    f"{speed:.2f} s an update, {hours:.1f} h left"
                )
                if sampled and accelerator.is_main_process:
                    with _average(ema, trained):
                        save_grid(task.sample_grid(), out / f"samples-{progress.update:06d}.png")
                saved = time.monotonic()
        if stopping:  # wherever the signal came
            save()
            say(f"{task.name}: stopped at update {progress.update}")
    ema.copy_to(trained)
    return progress


def _plain_attention(task: Task) -> None:
    """Attention as two products and a softmax, which on a CPU takes half as long as the fused one, at 256 tokens."""
    for module in task.modules():
        if isinstance(module, Attention):
            module.set_processor(AttnProcessor())


def _identity(task: Task) -> dict:
    """What a run must have to be the same, as JSON knows it."""
    return json.loads(json.dumps(asdict(task.settings) | ({"made_of": task.made_of} if task.made_of else {})))


def _identity_of(training: Mapping) -> dict:
    """The same of published weights."""
    return training["settings"] | ({"made_of": training["made_of"]} if training.get("made_of") else {})


def _keep_settings(task: Task, file: Path) -> None:
    """Write what a run is begun with; a run that goes on must have the same."""
    asked = _identity(task)
    if file.is_file() and (other := _differing(asked, json.loads(file.read_text(encoding="utf-8")))):
        then, now = other
        raise SettingsError(
            f"A run must go on with the settings that it was begun with, {then} in {file}, but got {now}. Give these "
            f"again, or begin another run: `--out`."
        )
    file.parent.mkdir(parents=True, exist_ok=True)
    _write(file, json.dumps(asked, indent=1) + "\n")


def _begin(task: Task, folder: Path) -> Progress:
    """Take published weights, which must be of the same settings, and what is known of their training."""
    file = folder / RESULTS
    before = json.loads(file.read_text(encoding="utf-8"))["training"]
    if other := _differing(_identity(task), _identity_of(before)):
        then, now = other
        raise SettingsError(
            f"A run must begin with weights that were trained with its settings, {then} in {file}, but got {now}. Give "
            f"those of the file, or begin without `--begin-with`."
        )
    task.begin_with(folder)
    done, hours, precisions = before["updates"], before["hours"], dict(before.get("precisions", {}))
    return Progress(done, done, 3600 * hours, precisions)


def _differing(asked: Mapping, before: Mapping) -> tuple[dict, dict] | None:
    """What another run had, and what is asked, where these differ; only `updates` may."""
    changed = [name for name in asked if asked[name] != before.get(name) and name != "updates"]
    return tuple({name: values.get(name) for name in changed} for values in (before, asked)) if changed else None


def _share(batch_size: int, processes: int) -> int:
    """Pictures of a batch for each process."""
    if batch_size % processes:
        raise SettingsError(
            f"Processes must share a batch equally, but got {batch_size} pictures for {processes} processes. Give a "
            f"`--batch-size` that {processes} divides."
        )
    return batch_size // processes


@contextmanager
def _average(ema: EMAModel, parameters: list[nn.Parameter]) -> Iterator[None]:
    """The averaged weights in the model's place for a while."""
    ema.store(parameters)
    ema.copy_to(parameters)
    try:
        with torch.no_grad():
            yield
    finally:
        ema.restore(parameters)


def latest_checkpoint(out: Path) -> Path | None:
    """The newest complete one."""
    return max(out.glob("checkpoint-*"), default=None)


def _save(accelerator: Accelerator, out: Path, progress: Progress) -> None:
    """Write beside, then rename: a checkpoint is there whole or not at all."""
    part = out / "unfinished"
    if accelerator.is_main_process:
        shutil.rmtree(part, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(part))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        target = out / f"checkpoint-{progress.update:07d}"
        if not target.exists():
            part.rename(target)
        for old in sorted(out.glob("checkpoint-*"))[:-1]:
            shutil.rmtree(old)
        _write(out / "progress.json", json.dumps(asdict(progress), indent=1) + "\n")
        _plot(progress, out / "loss.png")


def _write(file: Path, text: str) -> None:
    part = file.with_suffix(".part")
    part.write_text(text, encoding="utf-8")
    part.replace(file)


def _plot(progress: Progress, file: Path) -> None:
    from matplotlib.figure import Figure

    axes = (figure := Figure(figsize=(6, 3.5), layout="constrained")).subplots()
    axes.plot([progress.begun + WINDOW * (i + 1) for i in range(len(progress.curve))], progress.curve, linewidth=0.8)
    axes.set(xlabel="update", ylabel=f"loss, mean of {WINDOW} updates", yscale="log")
    figure.savefig(file, dpi=120)


def save_grid(images: Tensor, file: Path, columns: int = 8, zoom: int = 3) -> None:
    """A grid of pictures `(N, channels, H, W)` in [0, 1]."""
    rows = [torch.cat(list(row), -1) for row in images.split(columns) if len(row) == columns]
    grid = (torch.cat(rows, -2).permute(1, 2, 0) * 255).round().to(torch.uint8).squeeze(-1)
    picture = Image.fromarray(grid.numpy())
    picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST).save(file)


@contextmanager
def _stop_on_signals() -> Iterator[list[int]]:
    """Filled when the run is asked to end; it then saves and returns, and signals take their effect again."""
    asked: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in numbers}
    try:
        for number in numbers:
            signal.signal(number, lambda received, _frame: asked.append(received))
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)

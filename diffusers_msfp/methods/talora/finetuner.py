"""Fine-tuning: the quantized model learns to answer as the full-precision one along its own trajectories.

EfficientDM's data-free distillation (arXiv 2310.03270) with several adapters and a router (TALoRA) and the loss of
`losses.py` (DFA); as reconstructed from summaries of arXiv 2505.21591. Processes are accelerate's.
"""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, is_tensorboard_available
from diffusers import DiffusionPipeline
from diffusers.training_utils import EMAModel
from torch import Tensor

from ...compat.accelerate import own_states
from ...compat.wrappers import seen_through, sees_through
from ...errors import ConfigError, NonFiniteError, UnsupportedError
from ...results import OnProgress
from ...sampling.calls import call_arguments
from ...sampling.denoisers import denoiser_of, denoisers_of, each_quantized, scheduler_of
from ...sampling.denoising_factor import RunFactors, at_timestep, step_arguments
from ...sampling.solvers import with_parts
from ...sampling.timestep import check_timesteps
from ...sampling.trajectory import DenoisingStep, Trajectories
from ...sampling.used_output import counted, used_channels
from ..blocks import block_outputs, trainable_blocks
from ..losses import floats, loss_weights, real_factors, squared_error, weighted_mean
from ..previews import preview
from ..routes import routing_of
from ..runs import Stop, deferred_signals, digests_of
from . import Trainee
from .config import (
    DEFAULT_UPDATES,
    FinetuneConfig,
    Finetuned,
    Turn,
    example_seed,
    exploration_factor,
    learning_rate_factor,
    turn_at,
)
from .folder import Progress, TrainingFolder, optimizer_for
from .student import Student

logger = logging.getLogger(__name__)


class Finetuner:
    """One fine-tuning run of one denoiser; `finetune` is the short form.

    Args:
        pipe (`DiffusionPipeline`): quantized and calibrated; changed in place by `run`.
        teacher (`DiffusionPipeline`): the full-precision original; its scheduler is the sampler trained for.
        config (`FinetuneConfig`, *optional*): settings.
        work_dir (`str` or `Path`, *optional*): for checkpoints and, where it is installed, TensorBoard's logs; a run
            found there is resumed.
        prompts (`list[str]`, *optional*): taken in turn where the pipeline takes prompts.
        on_progress (`OnProgress`, *optional*): called with (done, total, loss=loss); total is 0 while
            it is not known.
        on_preview (`Callable[[int, np.ndarray], None]`, *optional*): called with (done, pictures `(N, H, W, C)`).
        **arguments: passed on to the pipelines, e.g. `guidance_scale=…`.

    Raises:
        ConfigError: settings or pipelines that do not fit.
    """

    @sees_through
    def __init__(
        self,
        pipe: DiffusionPipeline,
        teacher: DiffusionPipeline,
        config: FinetuneConfig | None = None,
        *,
        work_dir: str | Path | None = None,
        prompts: list[str] | None = None,
        on_progress: OnProgress | None = None,
        on_preview: Callable[[int, np.ndarray], None] | None = None,
        **arguments: Any,
    ) -> None:
        view, *others = each_quantized(pipe, teacher).values()
        if others:
            raise ConfigError(
                f"One denoiser learns at a time, but {type(pipe).__name__} has several quantized ones: "
                f"{', '.join(denoisers_of(pipe))}. Call `finetune(pipe, teacher)`, which trains one after the other."
            )
        pipe, teacher = view
        self.pipe, self.teacher, self.config = pipe, teacher, config or FinetuneConfig()
        self.on_progress, self.on_preview, self._stop = on_progress, on_preview, Stop()
        config, model, original = self.config, denoiser_of(pipe), denoiser_of(teacher)
        scheduler, work_dir = scheduler_of(teacher), Path(work_dir) if work_dir else None
        with own_states():
            self.accelerator = Accelerator(
                gradient_accumulation_steps=config.gradient_accumulation_steps,
                mixed_precision="no",  # autocast is entered by hand, whatever the launcher's own setting
                cpu=model.device.type == "cpu",
                log_with="tensorboard" if work_dir and is_tensorboard_available() else None,
                project_dir=work_dir,
                kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)],
            )
        make_arguments = call_arguments(teacher, prompts, config.num_inference_steps, arguments)
        self._previewed = with_parts(pipe, scheduler=teacher.scheduler)
        self.preview_arguments = call_arguments(
            self._previewed, prompts, config.num_inference_steps, {"output_type": "np"} | arguments
        )
        self.sampler = RunFactors(scheduler, config.num_inference_steps, **step_arguments(scheduler, arguments))
        batches = config.batch_size, config.seed, self.accelerator.process_index, self.accelerator.num_processes
        self.trajectories = Trajectories(teacher, make_arguments, *batches, self.sampler)
        timesteps = self.trajectories.timesteps()
        num_timesteps = max(int(scheduler.config.get("num_train_timesteps") or 1), 1 + math.ceil(max(timesteps)))
        if config.num_adapters > 1:  # one needs no table
            check_timesteps(timesteps, num_timesteps)
        digests = digests_of(teacher, model, prompts, arguments) if work_dir else {}  # before layers are replaced
        self.student = Student(
            model,
            original,
            num_timesteps=num_timesteps,
            num_adapters=config.num_adapters,
            rank=cast(int, config.rank),
            placement=config.placement,
            reads=config.reads,
            router_groups=config.router_groups,
            seed=config.seed,
        )
        try:
            self._prepare(timesteps, work_dir, digests)
        except BaseException:
            self.student.abandon()
            raise

    def _prepare(self, timesteps: list[float], work_dir: Path | None, digests: dict[str, str]) -> None:
        """Router, optimizer and checkpoints."""
        config, student = self.config, self.student
        student.watch_timesteps(timesteps)
        factors = dict.fromkeys(timesteps, 1.0)
        if config.denoising_factor_exponent:
            answers = (student(step)[0][0] for step in self.trajectories.steps())
            factors = real_factors(self.sampler, self.trajectories, answers) or self.sampler.required(timesteps)
            squares = floats(factors.values(), self.accelerator.device).square()
            factors = dict(zip(factors, self.accelerator.reduce(squares, "mean").sqrt().tolist(), strict=True))
        self.weights = loss_weights(factors, config.denoising_factor_exponent, config.denoising_factor_floor)
        if config.num_adapters > 1:
            student.router.warm_start(self._loads(len(timesteps)))
        if config.gradient_checkpointing:
            student.checkpoint_gradients()
        self.blocks, self.used = {}, None
        if config.blockwise:
            original, step = denoiser_of(self.teacher), self.trajectories[0]
            self.blocks = trainable_blocks(student.model, Trainee, original, step)
            self.used = used_channels(self.teacher, original, step.args, step.kwargs)
        self.trainable = [parameter for parameter in student.parameters() if parameter.requires_grad]
        self.ema = EMAModel(self.trainable, decay=config.ema_decay) if config.ema_decay else None
        self.progress = Progress(student, self.ema)
        with own_states(self.accelerator):
            parts = student, optimizer_for(student, config)
            self.wrapped, self.optimizer = self.accelerator.prepare(*parts, device_placement=[False, False])
        self.folder = TrainingFolder(work_dir, self.accelerator, self.progress, config, digests)
        self.folder.resume()
        if work_dir:
            self.accelerator.init_trackers("finetune")

    def _loads(self, steps: int) -> dict[float, float]:
        """Timestep → root of the weighted squared error before training, over one rollout and all processes."""
        errors = self.student.errors_by_timestep(self.trajectories[number] for number in range(steps))
        sums = self.accelerator.reduce(floats(errors.values(), self.accelerator.device), "sum")
        if not torch.isfinite(sums).all():
            raise NonFiniteError("The teacher's and the student's outputs must be finite, but got NaN or infinity.")
        means = (sums[:, 0] / sums[:, 1].clamp_min(1)).tolist()
        return {timestep: (self._weight(timestep) * mean) ** 0.5 for timestep, mean in zip(errors, means, strict=True)}

    def run(self) -> Finetuned:
        """Train to the end and turn the student into a deployed model.

        With a `work_dir`, Ctrl-C and SIGTERM take effect after the update under way, whose state is saved.
        """
        progress = self.progress
        try:
            with seen_through(self.pipe, self.teacher), deferred_signals(self.folder.path is not None) as self._stop:
                while not progress.total or progress.update < progress.total:
                    self.update()
            if self.ema is not None:
                self.ema.copy_to(self.trainable)
            scheduler = type(scheduler_of(self.teacher)).__name__
            model = self.student.finish({**self.config.to_dict(), "updates": progress.update, "scheduler": scheduler})
        except BaseException:
            self.student.abandon()
            raise
        finally:
            for tracker in self.accelerator.trackers:
                tracker.finish()
        routing = routing_of(model)
        usage = [[1.0]] if routing is None else routing.usage()  # one for all where layers follow a finite set
        return Finetuned(
            updates=progress.update,
            seconds=progress.seconds,
            losses=progress.losses,
            usage=usage,
            collapsed=self.config.num_adapters > 1 and any(max(shares) == 1 for shares in usage),
        )

    def update(self) -> None:
        """One optimizer step, with what belongs to it."""
        progress, config, started = self.progress, self.config, time.perf_counter()
        if not progress.total and config.minutes is None:
            progress.total = config.train_steps or DEFAULT_UPDATES
        turn = turn_at(self.blocks, progress.update, progress.total or DEFAULT_UPDATES)
        factor = learning_rate_factor(turn.update, turn.total)
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak"] * factor
        number, losses = config.gradient_accumulation_steps, list[Tensor]()
        for micro in range(number):
            with self.accelerator.accumulate(self.wrapped):
                losses.append(self._backward(progress.update * number + micro, turn))
                self.optimizer.step()
                self.optimizer.zero_grad()
        if self.ema is not None:
            self.ema.step(self.trainable)
        loss = self.accelerator.gather(torch.stack(losses).mean()[None]).mean().item()
        if not np.isfinite(loss):
            raise NonFiniteError(
                f"The loss must be finite, but got {loss} at update {progress.update}. Lower the learning rates; the "
                f"quantized model is as it was."
            )
        progress.update += 1
        progress.seconds += time.perf_counter() - started
        progress.losses.append(loss)
        progress.set_length(config.minutes, self.accelerator)
        self._report(loss, factor)

    def _backward(self, number: int, turn: Turn) -> Tensor:
        """Forward and backward of one batch; returns its loss."""
        config, step, block = self.config, self.trajectories[number], turn.block
        with torch.autocast(step.output.device.type, torch.bfloat16, enabled=config.mixed_precision == "bf16"):
            outputs, balance = self.wrapped(step, self._exploration(number, step, turn), block)
        if block is None:
            targets = [step.output]
        else:
            targets = block_outputs(denoiser_of(self.teacher), block, step, gradients=False)
            outputs, targets = (counted(self.used, block, each) for each in (outputs, targets))
        weight = floats(map(self._weight, step.timesteps.tolist()), step.output.device)
        loss = sum(
            (
                weighted_mean(weight, squared_error(output, target, relative=block is not None))
                for output, target in zip(outputs, targets, strict=True)
            ),
            start=0 * balance.detach(),
        )
        self.accelerator.backward(loss + config.balance * balance)
        return loss.detach()

    def _exploration(self, number: int, step: DenoisingStep, turn: Turn) -> Tensor | None:
        """Noise on the router's choice, equal for equal samples whatever the number of processes."""
        scale = self.config.exploration * exploration_factor(turn.update, turn.total)
        if not scale or self.config.num_adapters == 1:
            return None
        generator = torch.Generator().manual_seed(example_seed(self.config.seed, number))
        own = self.trajectories.own(self.student.router.gumbel(self.config.batch_size, generator)) * scale
        return own.repeat(len(step.timesteps) // len(own), 1, 1).to(step.output.device)

    def _weight(self, timestep: float) -> float:
        """The loss weight of the sampler's nearest timestep."""
        return at_timestep(self.weights, timestep)

    def _report(self, loss: float, factor: float) -> None:
        if self.folder.path is not None:
            self.accelerator.log({"loss": loss, "learning_rate_factor": factor}, step=self.progress.update)
        if self.on_progress is not None:
            self.on_progress(self.progress.update, self.progress.total, loss=loss)
        wanted = self.on_preview is not None and self.accelerator.is_main_process and self.folder.preview_due()
        if wanted and self._stop.asked is None:
            with self.folder.previewing():
                self._show()
        self.folder.keep(self._stop)

    def _show(self) -> None:
        """Hand on a preview; a run that can have none goes on without."""
        try:
            pictures = self.preview()
        except UnsupportedError as error:
            self.on_preview = None
            logger.warning("Fine-tuning goes on without previews. %s", error)
        else:
            cast(Callable, self.on_preview)(self.progress.update, pictures)

    def preview(self, *, teacher: bool = False) -> np.ndarray:
        """See `methods.previews.preview`: of the student as it is, or of the teacher."""
        pipe = self.teacher if teacher else self._previewed
        with self.student.routed():
            return preview(pipe, self.preview_arguments, self.trajectories.share, self.config.seed)

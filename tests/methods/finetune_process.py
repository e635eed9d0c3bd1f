"""A fine-tuning run as a process of its own: `python finetune_process.py SETTINGS.json`, or by `accelerate launch`."""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from diffusers import DDIMScheduler, DiffusionPipeline

from diffusers_msfp import FinetuneConfig
from diffusers_msfp.compat.accelerate import leave_process_group
from diffusers_msfp.methods.talora.finetuner import Finetuner


def main() -> None:
    given = json.loads(Path(sys.argv[1]).read_text())
    teacher = DiffusionPipeline.from_pretrained(given["teacher"])
    teacher.scheduler = DDIMScheduler.from_config(teacher.scheduler.config)
    pipe = DiffusionPipeline.from_pretrained(given["student"])
    run = Finetuner(
        pipe,
        teacher,
        FinetuneConfig(**given["config"]),
        work_dir=given.get("work_dir"),
        on_progress=lambda done, *_, **__: (
            os.kill(os.getpid(), signal.SIGKILL) if done == given.get("killed_at") else None
        ),
    )
    step, gradients = run.optimizer.step, {}

    def keep_first_gradients(*args, **kwargs):
        if not gradients:
            named = run.student.named_parameters()
            gradients.update({name: p.grad.clone() for name, p in named if p.grad is not None})
        return step(*args, **kwargs)

    run.optimizer.step = keep_first_gradients
    resumed = run.progress.update
    result = run.run()
    if run.accelerator.is_main_process:
        state = {"gradients": gradients, "model": pipe.unet.state_dict(), "losses": result.losses}
        torch.save(state | {"resumed": resumed, "processes": run.accelerator.num_processes}, given["out"])
    leave_process_group(run.accelerator)


if __name__ == "__main__":
    main()

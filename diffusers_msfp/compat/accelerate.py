"""Internals of accelerate (all since 1.0) and of `torch.distributed` beneath it."""

import time

import torch
from accelerate import Accelerator

SET_BY_HOOKS = ("_hf_hook", "_old_forward", "forward")
"""Attributes that accelerate's hooks set on a module and bind to it."""


def leave_process_group(accelerator: Accelerator | None = None) -> None:
    """End trackers and the process group, if there is one; every process of it must call this.

    A process group of gloo joins its threads when it is freed, and holds the interpreter's lock while it does. A
    thread that is just about to free a reduced tensor needs that lock, and the process never ends (torch 2.13: in one
    of ten runs whose last step was a reduction). So all wait for each other, then the threads get the lock.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        time.sleep(0.1)  # what the threads hold cannot be asked for
    if accelerator is not None:
        accelerator.end_training()
    elif torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()

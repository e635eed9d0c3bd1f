"""What launching a kernel takes."""

from contextlib import AbstractContextManager, nullcontext

import torch

_TILES = ((128, 128, 8), (128, 64, 4), (64, 64, 4), (32, 64, 4))  # rows, columns, warps


def on(device: torch.device) -> AbstractContextManager:
    """Make this the current device, the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def tile(rows: int, columns: int, device: torch.device) -> tuple[int, int, int]:
    """Rows, columns and warps of a program: the largest tile that gives every multiprocessor one."""
    wanted = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    fits = (t for t in _TILES if -(-rows // t[0]) * -(-columns // t[1]) >= wanted)
    return next(fits, _TILES[-1])

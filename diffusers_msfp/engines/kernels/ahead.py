"""Compile the CPU kernels ahead of the first picture, by calling each as engines do."""

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from ...formats import FORMATS
from ...numerics import QParams
from ...results import OnProgress
from .. import kernels
from ..grid import InputGrid

_MANY = 2**21  # values that several threads share


def _calls() -> dict[str, Callable[[], object]]:
    one = InputGrid.of(
        QParams(FORMATS["fp4_e2m1"], torch.tensor(1.0, dtype=torch.float32), torch.tensor(0.0, dtype=torch.float32))
    )
    two = replace(one, low_bits=1)
    calls: dict[str, Callable[[], object]] = {}
    for dtype in (torch.bfloat16, torch.float32):
        said = str(dtype).removeprefix("torch.")
        for size in (16, _MANY):
            x = torch.zeros(size, dtype=dtype)
            some = f"{said}, {'several threads' if size == _MANY else 'one thread'}"
            calls[f"quantize, {some}"] = partial(kernels.quantize, x, one)
            calls[f"quantize to two bytes, {some}"] = partial(kernels.quantize, x, two)
            for out in {dtype, torch.float32}:
                calls[f"centre to {str(out).removeprefix('torch.')}, {some}"] = partial(kernels.centre, x, one, out)
            affine = torch.ones(16, dtype=dtype), torch.zeros(16, dtype=dtype)
            for batch in (1, 16) if size == _MANY else (1,):  # several threads share one image, or the images
                images = x.view(batch, 16, -1, 1).contiguous(memory_format=torch.channels_last)
                for grid in (one, None):
                    name = f"norm{' and quantize' if grid else ''}, batch {batch}, {some}"
                    calls[name] = partial(kernels.norm, images, 4, *affine, 1e-5, True, grid)
    for dtype in (torch.int8, torch.int32):
        packed, table = torch.zeros(2, 2, dtype=torch.uint8), torch.zeros(16, dtype=dtype)
        calls[f"expand to {str(dtype).removeprefix('torch.')}"] = partial(kernels.expand, packed, 4, 4, table)
    codes = torch.zeros(1, 4, 5, 5, dtype=torch.uint8).contiguous(memory_format=torch.channels_last)
    calls["columns"] = partial(kernels.columns, codes, *[(3, 3), (1, 1), (1, 1), (1, 1)], 0)
    calls["softmax"] = partial(kernels.softmax_numerators, torch.zeros(4, 16, dtype=torch.bfloat16))
    return calls


def compile_kernels(on_progress: OnProgress | None = None) -> dict[str, float]:
    """Call every kernel once with every type of values, so that what has to be compiled is, and is kept on disk.

    Args:
        on_progress (`OnProgress`, *optional*): called with (done, total) after each.

    Returns:
        `dict[str, float]`: kernel → seconds of the call; next to nothing where it had been compiled before.
    """
    calls, seconds = _calls(), {}
    for done, (name, call) in enumerate(calls.items()):
        start = time.perf_counter()
        call()
        seconds[name] = time.perf_counter() - start
        if on_progress:
            on_progress(done + 1, len(calls))
    return seconds

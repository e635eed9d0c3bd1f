"""Each engine on one layer of this machine: why it refuses it, or its time beside torch's own layers."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn

from ..compat.torch import has_bf16_instructions
from ..engines import ENGINES, Engine
from ..errors import first_line
from ..layers import QUANT_LAYERS, QuantLayer
from ..results import OnProgress, Result
from ..schemes import resolve

CHANNELS, SIZE, BATCH, SCHEME = 128, 32, 2, "w4a4"
LAYER = f"3 × 3 convolution, {CHANNELS} → {CHANNELS} channels, {BATCH} × {SIZE} × {SIZE}, `{SCHEME}`"
"""The layer that is timed: of the kind in which a UNet spends most of its time."""
_ROUNDS, _WARMUP = 9, 2


@dataclass(frozen=True, kw_only=True)
class EngineTrial(Result):
    """An engine, or torch's own layer, on a device.

    Args:
        engine (`str`): in `ENGINES`; `torch bfloat16` and `torch float32` are float layers, for comparison.
        device (`str`): where the layer was.
        refusal (`str`, *optional*): why it does not run the layer; what it fails with, where it should.
        milliseconds (`float`, *optional*): of a call, the median of a few; None where it was refused or not timed.
        failed (`bool`): it took the layer and then raised: its installation is broken.
    """

    engine: str
    device: str
    refusal: str | None = None
    milliseconds: float | None = None
    failed: bool = False


@torch.no_grad()
def try_engines(
    devices: list[torch.device], *, timed: bool = True, on_progress: OnProgress | None = None
) -> list[EngineTrial]:
    """Try all engines on every device, with the same layer.

    Args:
        devices (`list[torch.device]`): to put the layer on.
        timed (`bool`): also time those that take it.
        on_progress (`OnProgress`, *optional*): called with (done, total, part=engine) after each.
    """
    layer = _layer()
    rows: list[EngineTrial] = []
    total = len(devices) * (len(ENGINES) + 2)
    for device in devices:
        for row in _on_device(layer, device, timed):
            rows.append(row)
            if on_progress is not None:
                on_progress(len(rows), total, part=row.engine)
    return rows


def _layer() -> QuantLayer:
    """Quantized from random weights, with ranges of random inputs."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        module = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)
        x = torch.randn(BATCH, CHANNELS, SIZE, SIZE)
    layer = QUANT_LAYERS[nn.Conv2d].from_float(module, "layer", resolve("layer", SCHEME, {}))
    layer(x)
    layer.freeze()
    return layer


def _on_device(layer: QuantLayer, device: torch.device, timed: bool) -> Iterator[EngineTrial]:
    where = str(device)
    try:
        layer.to(device)
        x = _input(device)
    except Exception as error:  # noqa: BLE001 – a driver can fail in any way
        refusal = f"fails: {first_line(error)}"
        yield EngineTrial(engine="reference", device=where, refusal=refusal, failed=True)
        return
    for name, cls in ENGINES.items():
        engine = cls()
        try:
            reason = engine.refusal(layer)
        except Exception as error:  # noqa: BLE001 – as above
            yield EngineTrial(engine=name, device=where, refusal=f"fails: {first_line(error)}", failed=True)
            continue
        if reason is not None:
            yield EngineTrial(engine=name, device=where, refusal=reason)
        else:
            yield _trial(name, device, partial(_prepared_call, engine, layer, x, []), timed)
    for dtype in (torch.bfloat16, torch.float32):
        name = f"torch {str(dtype).removeprefix('torch.')}"
        plain = layer.to_float(dtype).to(dtype)
        yield _trial(name, device, partial(plain, x.to(dtype)), timed)


def _prepared_call(engine: Engine, layer: QuantLayer, x: Tensor, made: list) -> Tensor:
    """Made ready in the first call."""
    if not made:
        made.append(engine.prepare(layer) or layer)
    return made[0](x)


def _trial(name: str, device: torch.device, call: Callable[[], Tensor], timed: bool) -> EngineTrial:
    try:
        call()
        milliseconds = 1e3 * _seconds(call, device) if timed else None
    except Exception as error:  # noqa: BLE001 – what a broken installation raises can be anything
        return EngineTrial(engine=name, device=str(device), refusal=f"fails: {first_line(error)}", failed=True)
    return EngineTrial(engine=name, device=str(device), milliseconds=milliseconds)


def _seconds(call: Callable[[], Tensor], device: torch.device) -> float:
    times = []
    for _ in range(_WARMUP + _ROUNDS):
        start = time.perf_counter()
        call()
        if device.type != "cpu":
            torch.accelerator.synchronize()
        times.append(time.perf_counter() - start)
    return median(times[_WARMUP:])


def _input(device: torch.device) -> Tensor:
    """In the dtype that models have here: bfloat16 where a CPU multiplies it, and on accelerators."""
    dtype = torch.bfloat16 if device.type != "cpu" or has_bf16_instructions() else torch.float32
    x = torch.randn(BATCH, CHANNELS, SIZE, SIZE, generator=torch.Generator().manual_seed(1))
    return x.to(device, dtype).contiguous(memory_format=torch.channels_last)

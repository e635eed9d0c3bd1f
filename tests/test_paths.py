"""The paths that `diffusers_msfp/README.md` writes down are those of real calls, and control flows down."""

import os
import re
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_unet
from diffusers import DDIMScheduler, DDPMPipeline

from diffusers_msfp import FinetuneConfig, quantize_pipeline
from diffusers_msfp.methods.talora.finetuner import Finetuner

PACKAGE = Path(__file__).parents[1] / "diffusers_msfp"
README = (PACKAGE / "README.md").read_text(encoding="utf-8")
ROOMS = [room for row in re.findall(r"^\| (.+?) \|", README, re.M)[2:] for room in re.findall(r"`(\w+)`", row)]
BASE = ROOMS[: ROOMS.index("numerics")]
"""Names, data and other packages' internals: entered from everywhere."""


def written(title: str) -> list[str]:
    section = README[README.index(f"### {title}\n") :].split("\n###")[0].split("\n## ")[0]
    return re.findall(r"^\d\. `(\w+)`", section, re.M)


def room_of(frame) -> str | None:
    file = frame.f_code.co_filename
    inside = file.startswith(str(PACKAGE) + os.sep)
    return Path(file).relative_to(PACKAGE).parts[0].removesuffix(".py") if inside else None


def trace(call) -> tuple[list[str], set[tuple[str, str]]]:
    """Rooms in the order in which a call enters them first, and where one room called a higher one itself.

    Hooks and `__torch_function__` are torch's calls, whatever room called torch.
    """
    entered, upward = [], set()

    def look(frame, event, _) -> None:
        if event != "call" or (room := room_of(frame)) is None:
            return
        if room not in entered:
            entered.append(room)
        caller = room_of(frame.f_back) if frame.f_back else None
        ours = not frame.f_code.co_name.startswith(("<", "__torch_function__"))
        if caller and ROOMS.index(room) > ROOMS.index(caller) and ours:
            upward.add((caller, room))

    sys.setprofile(look)
    try:
        call()
    finally:
        sys.setprofile(None)
    return [room for room in entered if room not in BASE], upward


@pytest.fixture
def pipe():
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_the_rooms_are_all_there():
    folders = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    modules = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "__main__"}
    assert set(ROOMS) == folders | modules


def test_quantize_and_a_step(pipe):
    entered, upward = trace(lambda: quantize_pipeline(pipe, "w4a4", num_samples=1, num_inference_steps=2))
    assert entered == written("`quantize_pipeline`")
    hooks = {("calibration", "sampling")}  # `watching_calls` calls what it was given
    assert {edge for edge in upward if edge[0] not in BASE} <= {("layers", "engines")} | hooks
    x = torch.randn(1, 3, 8, 8)
    with torch.no_grad():
        pipe.unet(x, 5)
        entered, upward = trace(lambda: pipe.unet(x, 5))
    assert entered == written("A denoising step")
    assert upward <= {("layers", "engines")}


def test_an_update_is_written_down(pipe):
    quantize_pipeline(pipe, "w4a4", num_samples=1, num_inference_steps=2)
    config = FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=2, rank=2)
    run = Finetuner(pipe, DDPMPipeline(make_unet(), DDIMScheduler()), config)
    entered, upward = trace(run.run)
    assert entered == written("An update of fine-tuning")
    assert upward <= {("layers", "engines")}


def test_upward_calls_are_found():
    namespace = {"__name__": "x"}
    for room, body in (("plugin", "def high(): pass"), ("numerics", "def low(f): f()")):
        exec(compile(body, str(PACKAGE / room / "made.py"), "exec"), namespace)
    assert trace(lambda: namespace["low"](namespace["high"])) == (["numerics", "plugin"], {("numerics", "plugin")})

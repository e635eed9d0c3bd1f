"""A method is a folder and a line in the registry: a small one, added by these steps, lives a checkpoint's life."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
from conftest import equal_state, make_unet
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import nn

from diffusers_msfp import cli, quantize_pipeline
from diffusers_msfp.checkpoint.record import ModelRecord
from diffusers_msfp.errors import CheckpointError, StateError
from diffusers_msfp.methods import METHODS
from diffusers_msfp.methods.method import Method, Part, read_part, require_order
from diffusers_msfp.plugin.recipe import RecipeRun, plan_stages
from diffusers_msfp.recipes import RECIPES, Stage


@dataclass(frozen=True)
class NoteConfig:
    number: int = 7


@dataclass(frozen=True)
class NoteRecord:
    length: int

    def __post_init__(self) -> None:
        if self.length != 1:
            raise CheckpointError(f"`note.length` in config.json must be 1, but got {self.length!r}.")


class Note(nn.Module):
    def __init__(self, value: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("value", value)

    def check(self, name: str) -> None:
        if int(self.value) < 0:
            raise CheckpointError(f"`{name}.value` must be positive, but got {int(self.value)}.")


def write_note(pipe, teacher, config: NoteConfig, *, prompts=None) -> dict:  # noqa: ARG001
    require_order(pipe.unet, "note")
    pipe.unet.note = Note(torch.tensor([config.number], dtype=torch.uint8))
    return {"number": config.number}


def attach(model: nn.Module, record: NoteRecord) -> None:
    model.note = Note(torch.empty(record.length, dtype=torch.uint8, device="meta"))


NOTE = Method(
    "note",
    NoteConfig,
    write_note,
    Part(
        "note",
        read=partial(read_part, NoteRecord, "note"),
        write=vars,
        record_of=lambda model: NoteRecord(1) if hasattr(model, "note") else None,
        attach=attach,
        stored={Note: ("value",)},
        detach=lambda model: model.__delattr__("note") if hasattr(model, "note") else None,
        describe=lambda record, tensors: {"length": record.length, "tensors": len(tensors) > 0},
    ),
    forbids={"note": "There is a note already."},
    resumes=False,
)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(METHODS._items, "note", NOTE)
    monkeypatch.setitem(RECIPES._items, "noted", (Stage("note", {"number": 9}),))


def make_pipe() -> DDPMPipeline:
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_lives_a_checkpoint_s_life(registered, tmp_path):
    pipe = quantize_pipeline(make_pipe(), "w4a4", num_samples=1, num_inference_steps=2)
    plain = ModelRecord.of(pipe.unet)
    (tmp_path / "run").mkdir()
    run = RecipeRun(tmp_path / "run", plan_stages("noted", {}), {})

    def save(each, folder):
        each.save_pretrained(folder)

    class Quiet:
        def __enter__(self):
            return lambda *_, **__: None

        def __exit__(self, *_):
            return None

    run.run(pipe, make_pipe(), prompts=None, save=save, progress=lambda _: Quiet())
    assert run.figures[0]["figures"] == {"number": 9}
    record = ModelRecord.of(pipe.unet)
    assert record.parts == {"note": NoteRecord(1)}
    assert record.layers == plain.layers

    pipe.unet.save_pretrained(tmp_path / "unet")
    loaded = UNet2DModel.from_pretrained(tmp_path / "unet")
    assert equal_state(loaded, pipe.unet)
    assert int(loaded.note.value) == 9
    assert cli.inspect(tmp_path / "unet").components["."].parts["note"] == {
        "length": 1,
        "tensors": True,
    }
    with pytest.raises(StateError, match="There is a note already"):
        write_note(pipe, None, NoteConfig())
    loaded.dequantize()
    assert not hasattr(loaded, "note")


def test_without_it_its_checkpoint_is_refused(registered, monkeypatch, tmp_path):
    pipe = quantize_pipeline(make_pipe(), "w4a4", num_samples=1, num_inference_steps=2)
    write_note(pipe, None, NoteConfig())
    pipe.unet.save_pretrained(tmp_path)
    monkeypatch.delitem(METHODS._items, "note")
    with pytest.raises(CheckpointError, match="only known keys, but `quantization_config` in config.json has note"):
        UNet2DModel.from_pretrained(tmp_path)

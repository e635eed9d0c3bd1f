"""Where verbs write: what is read outlasts it, links are followed, and only what is ours is replaced."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ONE_BLOCK, make_unet
from diffusers import DDPMPipeline, DDPMScheduler, DiffusionPipeline
from PIL import Image
from pipelines import make_small_pipe
from single_files import write_original

from diffusers_msfp import cli
from diffusers_msfp.checkpoint.describe import file_bytes
from diffusers_msfp.cli import space_create
from diffusers_msfp.cli.shared import load
from diffusers_msfp.cli.shared.budget import BudgetRequest
from diffusers_msfp.cli.shared.load import load_pipeline, model_bytes
from diffusers_msfp.cli.shared.store import check_target, publish, write_checkpoint
from diffusers_msfp.errors import ConfigError


@pytest.fixture
def pipe(packed_dir, tmp_path) -> Path:
    return Path(shutil.copytree(packed_dir, tmp_path / "pipe"))


@pytest.mark.parametrize(("source", "out"), [(".", "."), ("unet", "."), (".", "unet")])
def test_what_is_read_is_not_replaced(pipe, source, out, monkeypatch):
    monkeypatch.chdir(pipe.parent)
    before = sorted(pipe.rglob("*"))
    with pytest.raises(ConfigError, match="What is read must outlast what is written"):
        check_target(pipe / out, True, read=["user/model", None, Path("pipe") / source])
    assert sorted(pipe.rglob("*")) == before
    assert check_target(pipe / "new", True, read=[pipe]) == pipe / "new"


def test_a_repository_keeps_its_history(pipe):
    (pipe / ".git").mkdir()
    with pytest.raises(ConfigError, match="is a git repository"):
        check_target(pipe, True, read=[])


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(pipe, tmp_path, there):
    disk, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to("disk")
    if there:
        shutil.copytree(pipe, disk)
    out = check_target(link, True, read=[])
    assert out == disk
    (tmp_path / "work").mkdir()
    made = Path(shutil.copytree(pipe, tmp_path / "work" / "made"))
    (made / "new").touch()
    publish(made, out)
    assert link.is_symlink()
    assert (link / "new").is_file()
    assert not (tmp_path / "work" / "old").exists()


def test_what_cannot_be_moved_into_place_costs_nothing(pipe, tmp_path, monkeypatch):
    out, before = Path(shutil.copytree(pipe, tmp_path / "out")), sorted(each.name for each in pipe.iterdir())
    made = Path(shutil.copytree(pipe, tmp_path / "work" / "made"))
    (made / "new").touch()
    rename = Path.rename

    def fail(self, target):
        if self == made:
            raise KeyboardInterrupt
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", fail)
        with pytest.raises(KeyboardInterrupt):
            publish(made, out)
    assert sorted(each.name for each in out.iterdir()) == before
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda path, ignore_errors=False: None if ignore_errors else os.rmdir(path))
        publish(made, out)
    assert (out / "new").is_file()


@pytest.mark.parametrize("given", ["images", "prompts", "plan"])
def test_inputs_of_a_run_outlast_it(pipe, tiny_dir, given):
    (pipe / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(pipe / "pictures" / "one.png")
    file = pipe / "file"
    file.write_text("a hat\n")
    more = {
        "images": {"images": pipe / "pictures"},
        "prompts": {"prompts": file},
        "plan": {"budget": BudgetRequest({}, file)},
    }[given]
    with pytest.raises(ConfigError, match="What is read must outlast what is written"):
        cli.quantize(str(tiny_dir), pipe, overwrite=True, **more)
    assert file.is_file()
    assert (pipe / "pictures").is_dir()


def test_what_cannot_be_removed_costs_a_line(pipe, tmp_path, monkeypatch, capsys):
    out = Path(shutil.copytree(pipe, tmp_path / "out"))
    rmtree = shutil.rmtree

    def refuse(path, ignore_errors=False, **more):
        if Path(path).name == "old" and not ignore_errors:
            raise PermissionError("it belongs to somebody else")
        rmtree(path, ignore_errors=ignore_errors, **more)

    monkeypatch.setattr(shutil, "rmtree", refuse)
    write_checkpoint(DiffusionPipeline.from_pretrained(pipe), out)
    assert "is complete; what it replaces stays in" in " ".join(capsys.readouterr().err.split())


def test_a_plan_that_is_made_anew_may_lie_in_what_is_replaced(tmp_path):
    source, out = tmp_path / "source", tmp_path / "out"
    DDPMPipeline(make_unet(**ONE_BLOCK), DDPMScheduler()).save_pretrained(source)
    settings = {"target_bytes": 1e9, "choices": ("w4a8", "w8a8"), "num_samples": 1, "num_calibration": 1}
    for _ in range(2):
        request = BudgetRequest(settings, out / "plan.json", overwrite=True)
        cli.quantize(str(source), out, budget=request, overwrite=True, num_samples=1, num_inference_steps=2)
    assert (out / "plan.json").is_file()


def test_a_demo_replaces_its_own(pipe, tmp_path):
    (tmp_path / "models").mkdir()
    own = Path(shutil.copytree(pipe, tmp_path / "models" / "w4a8"))
    with pytest.raises(ConfigError, match="replaces what an earlier one made, but .*w4a8 is something else"):
        cli.demo(tmp_path / "models")
    assert (own / "unet").is_dir()


def test_sizes_are_those_of_files_wherever_they_lie(tmp_path, monkeypatch):
    pipe = make_small_pipe().to(torch.float16)
    folder, file = tmp_path / "folder", tmp_path / "model.safetensors"
    pipe.save_pretrained(folder)
    write_original(pipe, file, dtype=torch.float16)
    stored = file_bytes(folder / "unet")
    loaded = load_pipeline(str(folder)).unet
    assert loaded.dtype == torch.float32
    monkeypatch.setattr(load, "fetch", lambda source, _variant=None: folder if source == "user/model" else Path(source))
    for source in (folder, "user/model", file):
        assert model_bytes(str(source), loaded, "unet") == pytest.approx(stored, rel=0.15)  # headers


def test_only_spaces_are_replaced_by_spaces(pipe, tmp_path):
    out = tmp_path / "flask"
    out.mkdir()
    (out / "app.py").write_text("import flask\n")
    with pytest.raises(ConfigError, match="replaces Spaces only"):
        space_create(str(pipe), out, overwrite=True)
    space = tmp_path / "space"
    for _ in range(2):
        space_create(str(pipe), space, overwrite=True)
    assert (space / "app.py").is_file()

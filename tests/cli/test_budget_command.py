"""Targets on the command line: kept, stored, used again, refused."""

import json
from unittest.mock import Mock

import pytest
import torch
from command_line import program
from conftest import ONE_BLOCK, make_unet
from diffusers import DDIMScheduler, DDPMPipeline
from safetensors.torch import load_file

from diffusers_msfp.budget import BudgetPlan
from diffusers_msfp.checkpoint.describe import file_bytes
from diffusers_msfp.cli import quantize
from diffusers_msfp.cli.shared import budget

FEW = ("--num-samples", 1, "--num-inference-steps", 2)


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("source")
    DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler()).save_pretrained(path)
    return str(path)


def test_a_target_is_kept_and_its_plan_serves_again(source, tmp_path):
    out, file = tmp_path / "out", tmp_path / "plan.json"
    done = program("quantize", source, "--out", out, "--target-bytes", "46kB", "--plan", file, *FEW, "--json")
    assert done.returncode == 0, done.stderr
    assert file_bytes(out / "unet") == json.loads(done.stdout)["bytes_quantized"] <= 46_000
    assert "traj_rel_l2" in done.stderr
    plan = BudgetPlan.read(file)
    assert BudgetPlan.read(out / "budget.json") == plan
    assert len({layer.scheme for layer in plan.layers}) > 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []

    again = tmp_path / "again"
    done = program("quantize", source, "--out", again, "--plan", file, *FEW, "--json")
    assert done.returncode == 0, done.stderr
    weights = "unet/diffusion_pytorch_model.safetensors"
    ours, theirs = load_file(again / weights), load_file(out / weights)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)

    shown = program("inspect", out)
    assert "planned for a file of at most 0.046 MB" in shown.stdout
    assert "× its error" in shown.stdout
    described = json.loads(program("inspect", out, "--json").stdout)
    assert set(described["unet"]["why"]) == {layer.name for layer in plan.layers}

    page = tmp_path / "page.html"
    done = program("report", out, "--out", page, "--num-samples", 1, "--num-inference-steps", 2, "--no-speed")
    assert done.returncode == 0, done.stderr
    text = page.read_text()
    assert "What the budget was spent on" in text
    assert "error of the output over the size of the file" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--target-bytes", "12XB"), "must read like 1.2MB"),
        (("--target-step", "fast"), "must read like 90ms"),
        (("--target-bytes", "1MB", "--target-psnr", "30"), "One target"),
        (("--target-bytes", "1MB", "--scheme", "w4a4"), "Leave `--scheme`"),
        (("--target-bytes", "1MB", "--recipe", "rounded"), "may add tensors"),
        (("--target-bytes", "1MB", "--modules-to-not-convert", "mid_block"), "leaves mid_block float"),
        (("--plan", "none.json"), "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_refused(source, tmp_path, arguments, message):
    done = program("quantize", source, "--out", tmp_path / "out", *arguments)
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert not (tmp_path / "out").exists()


def test_an_interrupted_plan_goes_on_with_the_same_command(source, tmp_path, monkeypatch):
    plan = ("--target-bytes", "46kB", "--plan", tmp_path / "p.json")
    asked = ("quantize", source, "--out", tmp_path / "out", *plan, *FEW)
    with monkeypatch.context() as broken:
        broken.setitem(quantize.__globals__, "parts_of", Mock(side_effect=KeyboardInterrupt))
        assert program(*asked).returncode != 0
    done = program(*asked)
    assert done.returncode == 0, done.stderr
    assert BudgetPlan.read(tmp_path / "p.json") == BudgetPlan.read(tmp_path / "out" / "budget.json")


def test_a_timed_plan_is_not_timed_anew_after_an_interruption(source, tmp_path, monkeypatch):
    asked = (
        "quantize",
        source,
        "--out",
        tmp_path / "out",
        "--target-step",
        "10s",
        "--plan",
        tmp_path / "new" / "p.json",
    )
    with monkeypatch.context() as broken:
        broken.setitem(quantize.__globals__, "parts_of", Mock(side_effect=KeyboardInterrupt))
        assert program(*asked, *FEW).returncode != 0
    monkeypatch.setattr(budget, "plan_budget", Mock(side_effect=AssertionError("planned a second time")))
    done = program(*asked, *FEW)
    assert done.returncode == 0, done.stderr
    assert BudgetPlan.read(tmp_path / "new" / "p.json") == BudgetPlan.read(tmp_path / "out" / "budget.json")


def test_an_interrupted_planning_says_what_is_kept(source, tmp_path, monkeypatch):
    monkeypatch.setattr(budget, "plan_budget", Mock(side_effect=KeyboardInterrupt))
    done = program("quantize", source, "--out", tmp_path / "out", "--target-bytes", "46kB", *FEW)
    assert done.returncode == 130
    assert ".out.plan keeps what is measured, and the same command goes on with it" in " ".join(done.stderr.split())


def test_a_model_alone_has_its_plan_beside_it(source, tmp_path):
    file = tmp_path / "plan.json"
    assert (
        program(
            "quantize", source, "--out", tmp_path / "whole", "--target-bytes", "46kB", "--plan", file, *FEW
        ).returncode
        == 0
    )
    alone = tmp_path / "alone"
    done = program("quantize", f"{source}/unet", "--out", alone, "--plan", file)
    assert done.returncode == 0, done.stderr
    assert BudgetPlan.read(alone / "budget.json") == BudgetPlan.read(file)


def test_overwriting_takes_plans_alone(source, tmp_path):
    notes = tmp_path / "notes.json"
    notes.write_text("{}")
    asked = ("quantize", source, "--out", tmp_path / "out", "--target-bytes", "46kB", "--plan", notes, "--overwrite")
    done = program(*asked, *FEW)
    assert done.returncode == 2
    assert "replaces plans only" in " ".join(done.stderr.split())
    assert notes.read_text() == "{}"

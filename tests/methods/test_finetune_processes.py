"""Fine-tuning that is killed and resumed, and shared between processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import make_dit_pipe, make_unet
from diffusers import DDIMScheduler, DDPMPipeline
from pipelines import make_small_pipe

from diffusers_msfp import quantize_pipeline
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.layers.convert import layers_by_name
from diffusers_msfp.methods.talora.config import FinetuneConfig
from diffusers_msfp.methods.talora.finetuner import Finetuner

SCRIPT = Path(__file__).with_name("finetune_process.py")
CONFIG = {"num_inference_steps": 3, "batch_size": 4, "rank": 4, "train_steps": 8, "checkpoint_every": 2}
LAUNCH = (
    "accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
)
TIMEOUT = 240


def start(folder: Path, name: str, tiny_dir: str, packed_dir: str, *, processes: int = 1, **given) -> subprocess.Popen:
    settings = {"teacher": tiny_dir, "student": packed_dir, "config": CONFIG, "out": str(folder / f"{name}.pt")} | given
    file = folder / f"{name}.json"
    file.write_text(json.dumps(settings))
    port = ["--main_process_port", str(29000 + os.getpid() % 2000)]
    launch = ["-m", *LAUNCH.split(), *port] if processes > 1 else []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([sys.executable, *launch, str(SCRIPT), str(file)], env=environment, start_new_session=True)


def finished(process: subprocess.Popen, folder: Path, name: str) -> dict:
    assert process.wait(TIMEOUT) == 0
    return torch.load(folder / f"{name}.pt")


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_dir, packed_dir) -> dict:
    """An uninterrupted run in one process."""
    folder = tmp_path_factory.mktemp("whole")
    return finished(start(folder, "whole", tiny_dir, packed_dir), folder, "whole")


def test_killed_between_checkpoints_it_resumes_to_the_same_result(tmp_path, tiny_dir, packed_dir, whole):
    work = tmp_path / "work"
    process = start(tmp_path, "killed", tiny_dir, packed_dir, work_dir=str(work), killed_at=5)
    assert process.wait(TIMEOUT) == -signal.SIGKILL
    assert not (tmp_path / "killed.pt").exists()
    (work / "checkpoint-999.part").mkdir()  # what a kill while writing leaves
    result = finished(start(tmp_path, "resumed", tiny_dir, packed_dir, work_dir=str(work)), tmp_path, "resumed")
    assert result["resumed"] == 4
    assert result["losses"] == whole["losses"]
    assert equal(result["model"], whole["model"])
    assert list((work / "finetune").glob("events.out.*")), "TensorBoard's log"


def test_two_processes_see_the_data_of_one(tmp_path, tiny_dir, packed_dir, whole):
    result = finished(start(tmp_path, "two", tiny_dir, packed_dir, processes=2), tmp_path, "two")
    assert result["processes"] == 2
    assert result["gradients"].keys() == whole["gradients"].keys()
    one = torch.cat([whole["gradients"][name].flatten() for name in whole["gradients"]])
    two = torch.cat([result["gradients"][name].flatten() for name in whole["gradients"]])
    assert one.norm() > 0
    assert (one - two).norm() / one.norm() < 1e-3
    assert result["losses"][0] == pytest.approx(whole["losses"][0], rel=1e-4)
    assert sum(result["losses"]) == pytest.approx(sum(whole["losses"]), rel=0.1)
    assert torch.equal(result["model"]["timestep_router.table"], whole["model"]["timestep_router.table"])


def test_a_run_with_other_settings_is_not_continued(tmp_path, packed_pipe):
    settings = tmp_path / "settings.json"
    settings.write_text(json.dumps({"rank": 3}))
    teacher = DDPMPipeline(make_unet(), DDIMScheduler())
    state = {key: value.clone() for key, value in packed_pipe.unet.state_dict().items()}
    with pytest.raises(ConfigError, match=r"holds a training run with other settings \(.*rank.*\). Give the same"):
        Finetuner(packed_pipe, teacher, FinetuneConfig(**CONFIG), work_dir=tmp_path)
    assert equal(state, packed_pipe.unet.state_dict())
    settings.write_text("")
    with pytest.raises(ConfigError, match="must be JSON, but it is not"):
        Finetuner(packed_pipe, teacher, FinetuneConfig(**CONFIG), work_dir=tmp_path)
    settings.unlink()
    Finetuner(packed_pipe, teacher, FinetuneConfig(**CONFIG), work_dir=tmp_path).student.abandon()
    other = DDPMPipeline(make_unet(), DDIMScheduler(beta_end=0.03))
    with pytest.raises(ConfigError, match=r"other settings \(inputs\)"):
        Finetuner(packed_pipe, other, FinetuneConfig(**CONFIG), work_dir=tmp_path)
    assert equal(state, packed_pipe.unet.state_dict())
    renamed = DDPMPipeline(make_unet(), type("Other", (DDIMScheduler,), {})())
    with pytest.raises(ConfigError, match=r"other settings \(inputs\)"):
        Finetuner(packed_pipe, renamed, FinetuneConfig(**CONFIG), work_dir=tmp_path)


def test_a_run_does_not_go_on_with_other_classes_or_text(tmp_path):
    named, pipe = make_dit_pipe(), make_dit_pipe()
    quantize_pipeline(pipe, "w4a4", num_samples=1, num_inference_steps=2)
    config = FinetuneConfig(**CONFIG)
    Finetuner(pipe, named, config, work_dir=tmp_path / "a").student.abandon()
    named.labels = {"ship": 0}
    with pytest.raises(ConfigError, match=r"other settings \(inputs\)"):
        Finetuner(pipe, named, config, work_dir=tmp_path / "a")
    teacher, texts = make_small_pipe(), {"prompts": ["a hat"]}
    pipe = quantize_pipeline(make_small_pipe(), "w4a4", num_samples=1, num_inference_steps=2, **texts)
    Finetuner(pipe, teacher, config, work_dir=tmp_path / "b", **texts).student.abandon()
    with torch.no_grad():
        next(teacher.text_encoder.parameters()).add_(1)
    with pytest.raises(ConfigError, match=r"other settings \(inputs\)"):
        Finetuner(pipe, teacher, config, work_dir=tmp_path / "b", **texts)


def test_going_on_leaves_the_users_random_numbers(tmp_path, packed_pipe):
    teacher = DDPMPipeline(make_unet(), DDIMScheduler())
    run = Finetuner(packed_pipe, teacher, FinetuneConfig(**CONFIG), work_dir=tmp_path)
    run.update()
    run.folder.save()
    run.student.abandon()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    again = Finetuner(packed_pipe, teacher, FinetuneConfig(**CONFIG), work_dir=tmp_path)
    assert again.progress.update == 1
    assert torch.equal(torch.rand(3), expected)
    again.student.abandon()


@pytest.mark.parametrize("changed", ["input_scale", "input_zero_point", "bias", "norm"])
def test_a_run_does_not_go_on_with_another_model(changed, tmp_path, packed_pipe):
    teacher, model = DDPMPipeline(make_unet(), DDIMScheduler()), packed_pipe.unet
    Finetuner(packed_pipe, teacher, FinetuneConfig(**CONFIG), work_dir=tmp_path).student.abandon()
    layer = next(each for each in layers_by_name(model).values() if each.input_format and each.bias is not None)
    tensor = model.conv_norm_out.weight if changed == "norm" else getattr(layer, changed)
    before = tensor.detach().clone()
    tensor.data.mul_(1.5).add_(0.5)
    with pytest.raises(ConfigError, match=r"other settings \(model\)"):
        Finetuner(packed_pipe, teacher, FinetuneConfig(**CONFIG), work_dir=tmp_path)
    tensor.data.copy_(before)
    Finetuner(packed_pipe, teacher, FinetuneConfig(**CONFIG), work_dir=tmp_path).student.abandon()

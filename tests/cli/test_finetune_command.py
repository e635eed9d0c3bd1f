"""`finetune` of checkpoints that hold more than packed weights."""

import json

import pytest
import torch
from command_line import program
from diffusers import DiffusionPipeline

from diffusers_msfp import (
    CorrectionConfig,
    FinetuneConfig,
    TemporalConfig,
    cli,
    correct_output,
    maintain_temporal,
)
from diffusers_msfp.cli.shared.store import only_run
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.sampling.solvers import with_ddim


@pytest.mark.parametrize("placement", ["side", "merged"])
def test_finetune_corrects_the_output_of_a_corrected_checkpoint_anew(tiny_dir, packed_pipe, tmp_path, placement):
    teacher = with_ddim(DiffusionPipeline.from_pretrained(tiny_dir))
    correct_output(packed_pipe, teacher, CorrectionConfig(num_samples=2, num_inference_steps=3))
    packed_pipe.save_pretrained(tmp_path / "corrected")
    config = FinetuneConfig(train_steps=2, num_inference_steps=3, batch_size=2, placement=placement)
    made = cli.finetune(tmp_path / "corrected", tiny_dir, tmp_path / "tuned", config)
    assert made.corrected
    tuned = DiffusionPipeline.from_pretrained(tmp_path / "tuned")
    table = tuned.unet.output_correction.a.clone()
    assert not torch.equal(table, packed_pipe.unet.output_correction.a)
    correct_output(tuned, teacher, CorrectionConfig(num_inference_steps=3))
    assert torch.equal(tuned.unet.output_correction.a, table)


def test_one_run_at_a_time(tiny_dir, packed_dir, tmp_path):
    training = tmp_path / "out-training"
    training.mkdir()
    with only_run(training, "do this"), pytest.raises(ConfigError, match="One run at a time can write"):
        cli.finetune(packed_dir, tiny_dir, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_finetune_of_parameters_for_each_timestep(tiny_dir, packed_pipe, tmp_path):
    teacher = with_ddim(DiffusionPipeline.from_pretrained(tiny_dir))
    settings = {"num_inference_steps": 3, "iterations": 0, "cache_above": None, "fsc": "all", "num_samples": 2}
    maintain_temporal(packed_pipe, teacher, TemporalConfig(**settings))
    packed_pipe.save_pretrained(tmp_path / "sets")
    options = ["--placement", "merged", "--num-adapters", 1, "--train-steps", 2, "--num-inference-steps", 3]
    command = ["finetune", tmp_path / "sets", "--teacher", tiny_dir, "--out", tmp_path / "tuned", *options]
    made = program(*command, "--no-compare", "--json")
    assert made.returncode == 0, made.stderr
    result = json.loads(made.stdout)
    assert (result["intervals"], result["usage"], result["corrected"]) == ([], [[1.0]], False)
    assert program(*command, "--no-compare", "--overwrite").returncode == 0
    assert DiffusionPipeline.from_pretrained(tmp_path / "tuned").unet.temporal_set.plan.training["finetuning"]

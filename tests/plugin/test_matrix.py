"""Which pipelines and samplers work: quantized, saved and reloaded, they sample the same."""

import diffusers
import numpy as np
import pipelines
import pytest
import torch
from diffusers import DiffusionPipeline
from matrix import PIPELINES, PROMPT, SCHEDULERS, Case, sample

from diffusers_msfp import MSFPConfig, calibration_state, quantize_pipeline
from diffusers_msfp.layers import QuantLayer


def check_round_trip(case: Case, pipe: DiffusionPipeline, folder) -> None:
    reference = sample(pipe, case.arguments)
    own = {key: value for key, value in case.arguments.items() if key not in ("prompt", "class_labels")}
    config = MSFPConfig("w4a8", components_to_quantize=case.components)
    quantize_pipeline(pipe, config, num_samples=1, num_inference_steps=2, **own)
    pipe.save_pretrained(folder)
    expected = sample(pipe, case.arguments)
    again = DiffusionPipeline.from_pretrained(folder)
    assert type(again) is type(pipe)
    assert type(again.scheduler) is type(pipe.scheduler)
    assert calibration_state(again) == "frozen"
    for name, part in again.components.items():
        if isinstance(part, torch.nn.Module):
            assert any(isinstance(m, QuantLayer) for m in part.modules()) == (name in case.components), name
    assert np.isfinite(expected).all()
    assert 0 < np.abs(expected - reference).mean() < 0.2
    assert (sample(again, case.arguments) == expected).all()


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name, tmp_path):
    case = PIPELINES[name]
    check_round_trip(case, case.make(), tmp_path)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_scheduler(name, tmp_path):
    pipe = pipelines.make_small_pipe()
    pipe.scheduler = getattr(diffusers, SCHEDULERS[name]).from_config(pipe.scheduler.config | {"clip_sample": False})
    check_round_trip(Case(pipelines.make_small_pipe, ("unet",), PROMPT), pipe, tmp_path)

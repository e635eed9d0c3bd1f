"""Layers that read a concatenation, in parts."""

import copy

import pytest
import torch
from conftest import equal_state, make_condition_unet, make_dit_pipe, make_unet
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from torch import nn

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    RoundingConfig,
    SplitConfig,
    TemporalConfig,
    calibrate,
    finetune,
    learn_rounding,
    maintain_temporal,
    quantize_pipeline,
    set_engine,
    split_shortcuts,
)
from diffusers_msfp.errors import CheckpointError, ConfigError, NonFiniteError
from diffusers_msfp.nn.split import split_layer, whole_name
from diffusers_msfp.workflow.calibrate import restart_observation
from diffusers_msfp.workflow.sampling import call_arguments
from diffusers_msfp.workflow.split import concatenated_inputs, split_skeleton
from diffusers_msfp.workflow.trajectory import rollout

SHORT = SplitConfig(num_samples=2, num_inference_steps=3)
SHORTCUTS = {  # of `make_unet`: what comes from below, and the skip connection
    "up_blocks.0.resnets.0.conv_shortcut": [64, 64],
    "up_blocks.0.resnets.1.conv_shortcut": [64, 32],
    "up_blocks.1.resnets.0.conv_shortcut": [64, 32],
    "up_blocks.1.resnets.1.conv_shortcut": [32, 32],
}


@pytest.fixture
def teacher() -> DDPMPipeline:
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def quantized(teacher, scheme="w4a4", **overrides):
    config = MSFPConfig(scheme, scheme_overrides=overrides)
    return quantize_pipeline(copy.deepcopy(teacher), config, num_samples=2, num_inference_steps=3)


def predicted(pipe) -> torch.Tensor:
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))
    with torch.no_grad():
        return pipe.unet(x, torch.tensor([900, 20])).sample


@pytest.mark.parametrize(
    ("layer", "shape", "sizes"),
    [
        (nn.Conv2d(7, 5, 3, stride=2, padding=1, padding_mode="reflect"), (2, 7, 6, 6), [4, 3]),
        (nn.Conv1d(6, 4, 3, dilation=2, bias=False), (2, 6, 9), [1, 2, 3]),
        (nn.Linear(8, 3), (2, 5, 8), [6, 2]),
    ],
)
def test_parts_sum_to_the_whole(layer, shape, sizes):
    split, x = split_layer(layer, sizes), torch.randn(shape)
    torch.testing.assert_close(split(x), layer(x))
    assert sum(part.bias is not None for part in split.children()) == (layer.bias is not None)
    merged = split.merged()
    assert type(merged) is type(layer)
    assert torch.equal(merged(x), layer(x))


def test_shortcuts_of_up_blocks_are_found(teacher):
    step = rollout(teacher, call_arguments(teacher, None, 2, {}), 0, 1, 0)[0]
    found = concatenated_inputs(teacher.unet, step)
    assert {name: list(sizes) for name, sizes in found.items()} == SHORTCUTS  # no sine beside cosine, no down block


@pytest.mark.parametrize("engine", ["reference", "auto"])
def test_only_the_shortcuts_change_and_get_better(teacher, engine):
    for name in SHORTCUTS:  # what one range for both would lose
        shortcut = teacher.unet.get_submodule(name)
        shortcut.weight.data[:, SHORTCUTS[name][0] :] *= 30
    pipe = quantized(teacher)
    set_engine(pipe, engine)
    before, error = pipe.unet.state_dict(), (predicted(pipe) - predicted(teacher)).norm()
    result = split_shortcuts(pipe, teacher, SHORT)
    assert result["split"] == pipe.unet.config.quantization_config.split == SHORTCUTS
    after = pipe.unet.state_dict()
    kept = [key for key in before if not any(key.startswith(name) for name in SHORTCUTS)]
    assert all(torch.equal(before[key], after[key]) for key in kept)
    assert {key.rsplit(".", 2)[0] for key in after if key not in before} == set(SHORTCUTS)
    assert (predicted(pipe) - predicted(teacher)).norm() < 0.8 * error

    first = predicted(pipe)
    parts = pipe.unet.get_submodule("up_blocks.0.resnets.1.conv_shortcut")
    assert [part.engine is None for part in parts.children()] == [engine == "reference"] * 2
    set_engine(pipe, "reference")
    torch.testing.assert_close(predicted(pipe), first, rtol=0.02, atol=0.02)


def test_checkpoint_holds_the_parts(teacher, tmp_path):
    pipe = quantized(teacher, **{"*conv_shortcut": "w4a8"})  # a glob that no part's name matches
    split_shortcuts(pipe, teacher, SHORT)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    assert equal_state(loaded.unet, pipe.unet)
    assert torch.equal(predicted(loaded), predicted(pipe))
    part = loaded.unet.get_submodule("up_blocks.0.resnets.1.conv_shortcut.1")
    assert part.input_format.bits == 8
    calibrate(loaded, num_samples=1, num_inference_steps=2)
    assert part.input_format.bits == 8
    weight = loaded.unet.up_blocks[0].resnets[1].conv_shortcut
    decoded = torch.cat([part.dequantize_weight() for part in weight.children()], 1)
    whole = loaded.unet.dequantize().up_blocks[0].resnets[1].conv_shortcut
    assert type(whole) is nn.Conv2d
    assert torch.equal(whole.weight, decoded)


def test_observing_parts_are_saved(teacher, tmp_path):
    pipe = quantized(teacher, **{"*conv_shortcut": "w4a8"})
    split_shortcuts(pipe, teacher, SHORT)
    restart_observation(pipe.unet)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    part = loaded.unet.get_submodule("up_blocks.0.resnets.1.conv_shortcut.1")
    assert part.observing
    assert set(part.input_candidates) == set(
        pipe.unet.get_submodule("up_blocks.0.resnets.1.conv_shortcut.1").input_candidates
    )
    assert all("8" in name.split("_")[0] for name in part.input_candidates)


def test_all_later_stages_take_it(teacher, tmp_path):
    pipe = quantized(teacher)
    split_shortcuts(pipe, teacher, SHORT)
    maintain_temporal(pipe, teacher, TemporalConfig(iterations=1, num_inference_steps=3, fsc="block"))
    result = learn_rounding(
        pipe, teacher, RoundingConfig(iterations=2, num_samples=4, num_inference_steps=3, batch_size=2)
    )
    assert result["weights"] > 0
    finetune(pipe, teacher, FinetuneConfig(train_steps=2, batch_size=2, rank=2, num_inference_steps=3))
    pipe.save_pretrained(tmp_path)
    assert torch.equal(predicted(DiffusionPipeline.from_pretrained(tmp_path)), predicted(pipe))


def test_weights_alone_and_float_layers(teacher):
    pipe = quantized(teacher, "w4a16", up_blocks="w4a16")
    split_shortcuts(pipe, teacher, SHORT)
    part = pipe.unet.get_submodule("up_blocks.1.resnets.0.conv_shortcut.0")
    assert part.input_format is None
    assert not part.observing
    pipe = quantize_pipeline(
        copy.deepcopy(teacher), MSFPConfig("w4a16", modules_to_not_convert=["up_blocks.0"]), num_samples=1
    )
    assert list(split_shortcuts(pipe, teacher, SHORT)["split"]) == list(SHORTCUTS)[2:]


def test_nothing_to_split(caplog):
    teacher = make_dit_pipe()
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a8", num_samples=1, num_inference_steps=2)
    before = copy.deepcopy(pipe.transformer)
    assert split_shortcuts(pipe, teacher, SHORT)["split"] == {}
    assert "nothing is split" in caplog.text
    assert equal_state(before, pipe.transformer)


def test_refusals(teacher):
    pipe = quantized(teacher)
    broken = copy.deepcopy(teacher)
    broken.unet.up_blocks[1].resnets[0].conv_shortcut.weight.data[0, 0] = torch.nan
    before = copy.deepcopy(pipe.unet)
    with pytest.raises(NonFiniteError, match=r"up_blocks\.1\.resnets\.0\.conv_shortcut"):
        split_shortcuts(pipe, broken, SHORT)
    assert equal_state(before, pipe.unet)
    maintain_temporal(pipe, teacher, TemporalConfig(iterations=0, num_inference_steps=3))
    with pytest.raises(ConfigError, match="before temporal maintenance"):
        split_shortcuts(pipe, teacher, SHORT)
    with pytest.raises(ConfigError, match="num_samples"):
        SplitConfig(num_samples=0)


@pytest.mark.parametrize(
    "split",
    [
        {"no.layer": [1, 2]},
        {"conv_in": [1, 1]},
        {"conv_in": [4, -1]},
        {"conv_in": 3},
        {"conv_in": []},
        {"conv_in": [True, 2]},
        {"conv_norm_out": [16, 16]},
        {"": [3]},
    ],
)
def test_skeletons_of_others_are_refused(split):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        split_skeleton(make_unet(), split)


def test_record_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match="`split`"):
        MSFPConfig(split=["conv_in"])


def test_parts_know_their_whole():
    model = make_condition_unet()
    parts = split_skeleton(model, {"up_blocks.0.resnets.0.conv_shortcut": [64, 64]})
    assert parts == {f"up_blocks.0.resnets.0.conv_shortcut.{i}": "up_blocks.0.resnets.0.conv_shortcut" for i in (0, 1)}
    assert all(whole_name(part, model.get_submodule(part)) == whole for part, whole in parts.items())
    assert whole_name("conv_in", model.conv_in) == "conv_in"

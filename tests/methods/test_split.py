"""Layers that read a concatenation, in parts."""

import copy

import pytest
import torch
from conftest import equal_state, make_condition_unet, make_dit_pipe, make_unet
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from diffusers_msfp import (
    FinetuneConfig,
    MSFPConfig,
    RoundingConfig,
    SplitConfig,
    TemporalConfig,
    calibrate,
    export_adapter,
    finetune,
    learn_rounding,
    maintain_temporal,
    quantize_pipeline,
    set_engine,
    split_shortcuts,
)
from diffusers_msfp.errors import CheckpointError, ConfigError, NonFiniteError, StateError, UnsupportedError
from diffusers_msfp.layers.split import split_layer, whole_name
from diffusers_msfp.methods.split.shortcuts import concatenated_inputs
from diffusers_msfp.methods.split.skeleton import split_of, split_skeleton
from diffusers_msfp.plugin.calibrate import restart_observation
from diffusers_msfp.sampling.calls import call_arguments
from diffusers_msfp.sampling.trajectory import rollout

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


@pytest.fixture(scope="module")
def _packed() -> DDPMPipeline:
    """What `packed_pipe` is a copy of."""
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return quantized(pipe)


@pytest.fixture(scope="module")
def _split(_packed) -> DDPMPipeline:
    """With its shortcuts in parts."""
    teacher, pipe = DDPMPipeline(make_unet(), DDIMScheduler()), copy.deepcopy(_packed)
    teacher.set_progress_bar_config(disable=True)
    split_shortcuts(pipe, teacher, SHORT)
    return pipe


@pytest.fixture(scope="module")
def wider() -> DDPMPipeline:
    """With 8 bits for what the parts of its shortcuts read."""
    teacher = DDPMPipeline(make_unet(), DDIMScheduler())
    teacher.set_progress_bar_config(disable=True)
    pipe = quantized(teacher, **{"*conv_shortcut": "w4a8"})  # a glob that no part's name matches
    split_shortcuts(pipe, teacher, SHORT)
    return pipe


@pytest.fixture
def split_pipe(_split) -> DDPMPipeline:
    """A pipeline of one's own whose shortcuts are in parts."""
    return copy.deepcopy(_split)


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
    assert isinstance(split, type(layer))
    assert set(split.state_dict()) == {f"{i}.weight" for i in range(len(sizes))} | (
        {"0.bias"} if layer.bias is not None else set()
    )
    merged = split.merged()
    assert type(merged) is type(layer)
    assert torch.equal(merged(x), layer(x))
    assert merged.weight.requires_grad


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
    assert result.split == split_of(pipe.unet) == SHORTCUTS
    shortcuts = [pipe.unet.get_submodule(name) for name in SHORTCUTS]
    assert {part.input_format.bits for each in shortcuts for part in each.children()} == {8}  # they read residual sums
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


def test_checkpoint_holds_the_parts(wider, tmp_path):
    pipe = copy.deepcopy(wider)
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


def test_observing_parts_are_saved(wider, tmp_path):
    pipe = copy.deepcopy(wider)
    restart_observation(pipe.unet)
    pipe.save_pretrained(tmp_path)
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    part = loaded.unet.get_submodule("up_blocks.0.resnets.1.conv_shortcut.1")
    assert part.observing
    assert set(part.input_candidates) == set(
        pipe.unet.get_submodule("up_blocks.0.resnets.1.conv_shortcut.1").input_candidates
    )
    assert all("8" in name.split("_")[0] for name in part.input_candidates)


def test_all_later_stages_take_it(teacher, split_pipe, tmp_path):
    pipe = split_pipe
    maintain_temporal(pipe, teacher, TemporalConfig(iterations=1, num_inference_steps=3, fsc="block"))
    short = {"iterations": 2, "num_samples": 4, "num_inference_steps": 3, "batch_size": 2}
    for granularity in ("block", "layer"):
        result = learn_rounding(pipe, teacher, RoundingConfig(**short, granularity=granularity))
        assert result.weights > 0
    parts = {part["part"]: part["layers"] for part in result.parts}
    assert all(parts[name] == 2 for name in SHORTCUTS)
    finetune(pipe, teacher, FinetuneConfig(train_steps=2, batch_size=2, rank=2, num_inference_steps=3))
    pipe.save_pretrained(tmp_path)
    assert torch.equal(predicted(DiffusionPipeline.from_pretrained(tmp_path)), predicted(pipe))
    with pytest.raises(UnsupportedError, match=r"parts of a split layer like `up_blocks.*` fit no other model"):
        export_adapter(pipe.unet, 0, tmp_path / "lora")


def test_users_adapters_stand_beside_all_parts(packed_pipe, split_pipe, tmp_path):
    plain, pipe, untouched = packed_pipe, split_pipe, copy.deepcopy(split_pipe.unet)
    for each in (plain, pipe):
        torch.manual_seed(0)
        lora = LoraConfig(r=2, target_modules=["conv_shortcut", "to_q"], init_lora_weights=False)
        before = predicted(each)
        inject_adapter_in_model(lora, each.unet)
        assert not torch.equal(predicted(each), before)
        added = {name: p.shape for name, p in each.unet.named_parameters() if "lora" in name}
        assert len([name for name in added if "up_blocks.0.resnets.1.conv_shortcut" in name]) == 2
    assert added == {name: p.shape for name, p in plain.unet.named_parameters() if "lora" in name}
    pipe.unet.save_pretrained(tmp_path)
    assert equal_state(type(pipe.unet).from_pretrained(tmp_path), untouched)


def test_adapters_on_one_part_are_in_the_way_of_joining_them(split_pipe):
    model = split_pipe.unet
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv_shortcut.0"]), model)
    before = model.state_dict()
    with pytest.raises(UnsupportedError, match="unload these first"):
        model.dequantize()
    assert before.keys() == model.state_dict().keys()


def test_a_used_config_quantizes_another_model(teacher, split_pipe, tmp_path):
    config = split_pipe.unet.config.quantization_config
    pipe = quantize_pipeline(copy.deepcopy(teacher), config, num_samples=2, num_inference_steps=3)
    assert split_of(pipe.unet) is None
    pipe.save_pretrained(tmp_path)
    assert torch.equal(predicted(DiffusionPipeline.from_pretrained(tmp_path)), predicted(pipe))
    teacher.save_pretrained(tmp_path / "float")
    loaded = type(teacher.unet).from_pretrained(tmp_path / "float", subfolder="unet", quantization_config=config)
    assert split_of(loaded) is None


def test_weights_alone_and_float_layers(teacher):
    pipe = quantized(teacher, "w4a16", up_blocks="w4a16")
    split_shortcuts(pipe, teacher, SHORT)
    part = pipe.unet.get_submodule("up_blocks.1.resnets.0.conv_shortcut.0")
    assert part.input_format is None
    assert not part.observing
    pipe = quantize_pipeline(
        copy.deepcopy(teacher), MSFPConfig("w4a16", modules_to_not_convert=["up_blocks.0"]), num_samples=1
    )
    assert list(split_shortcuts(pipe, teacher, SHORT).split) == list(SHORTCUTS)[2:]


def test_nothing_to_split(caplog):
    teacher = make_dit_pipe()
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a8", num_samples=1, num_inference_steps=2)
    before = copy.deepcopy(pipe.transformer)
    assert split_shortcuts(pipe, teacher, SHORT).split == {}
    assert "nothing is split" in caplog.text
    assert equal_state(before, pipe.transformer)


def test_refusals(teacher, packed_pipe):
    pipe = packed_pipe
    broken = copy.deepcopy(teacher)
    broken.unet.up_blocks[1].resnets[0].conv_shortcut.weight.data[0, 0] = torch.nan
    before = copy.deepcopy(pipe.unet)
    with pytest.raises(NonFiniteError, match=r"up_blocks\.1\.resnets\.0\.conv_shortcut"):
        split_shortcuts(pipe, broken, SHORT)
    assert equal_state(before, pipe.unet)
    with pytest.raises(StateError, match="full-precision original, but got a quantized model"):
        split_shortcuts(pipe, copy.deepcopy(packed_pipe), SHORT)
    adapted = copy.deepcopy(teacher)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["conv_shortcut"]), adapted.unet)
    with pytest.raises(StateError, match="without adapters"):
        split_shortcuts(pipe, adapted, SHORT)
    maintain_temporal(pipe, teacher, TemporalConfig(iterations=0, num_inference_steps=3))
    with pytest.raises(StateError, match="before temporal maintenance"):
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
        {"up_blocks.0.resnets.0.conv_shortcut": [64, 64], "up_blocks.0.resnets.0.conv_shortcut.1": [32, 32]},
    ],
)
def test_skeletons_of_others_are_refused(split):
    with pytest.raises(CheckpointError, match=r"config\.json"):
        split_skeleton(make_unet(), split)


def test_observing_parts_of_a_layer_that_should_stay_float_are_refused(split_pipe, tmp_path):
    pipe = split_pipe
    restart_observation(pipe.unet)
    pipe.unet.config.quantization_config.modules_to_not_convert = ["up_blocks.0"]
    pipe.save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="its scheme has nothing to try"):
        DiffusionPipeline.from_pretrained(tmp_path)


def test_record_of_another_kind_is_refused():
    with pytest.raises(CheckpointError, match="`split`"):
        MSFPConfig.from_dict({"quant_method": "msfp", "split": ["conv_in"]})


def test_parts_know_their_whole():
    model = make_condition_unet()
    whole = "up_blocks.0.resnets.0.conv_shortcut"
    split_skeleton(model, {whole: [64, 64]})
    for part in (f"{whole}.0", f"{whole}.1"):
        assert whole_name(part, model.get_submodule(part)) == whole
    assert whole_name("conv_in", model.conv_in) == "conv_in"

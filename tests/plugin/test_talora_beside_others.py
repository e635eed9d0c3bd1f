"""Adapters beside other things: an output correction, calibration, another strength, gradient checkpointing."""

import copy
import logging
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import equal_state, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from torch.utils.checkpoint import checkpoint

from diffusers_msfp import (
    CorrectionConfig,
    FinetuneConfig,
    MSFPPipelineMixin,
    StateError,
    calibrate,
    correct_output,
    export_adapter,
    finetune,
    import_adapter,
    uncorrect_output,
)
from diffusers_msfp.errors import CheckpointError
from diffusers_msfp.methods.correction.attach import attach_correction, correction_of
from diffusers_msfp.methods.correction.table import CorrectionTable
from diffusers_msfp.methods.talora.finetuner import Finetuner
from diffusers_msfp.plugin.adapters.talora_files import load_talora, save_talora

LOW, HIGH = 10, 900  # timesteps with adapters of their own
TUNING = {"train_steps": 1, "num_inference_steps": 2, "batch_size": 2, "rank": 2}
SMALL = CorrectionConfig(num_samples=2, num_inference_steps=2)
FEW = {"num_samples": 2, "num_inference_steps": 2}


@pytest.fixture(scope="module")
def teacher() -> DDPMPipeline:
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def strong(unet) -> None:
    torch.manual_seed(3)
    for module in unet.modules():
        if getattr(module, "adapters", None) is not None:
            torch.nn.init.normal_(module.adapters.up, std=0.05)


@pytest.fixture(scope="module")
def made(_packed, teacher) -> dict[str, DDPMPipeline]:
    """The base, corrected or not; with adapters, beside the weights or merged."""
    pipes = {"base": _packed, "corrected": copy.deepcopy(_packed)}
    correct_output(pipes["corrected"], teacher, SMALL)
    for placement in ("side", "merged"):
        pipes[placement] = copy.deepcopy(_packed)
        finetune(pipes[placement], teacher, FinetuneConfig(**TUNING, placement=placement))
        strong(pipes[placement].unet)
    return pipes


@pytest.fixture
def pipes(made) -> dict[str, DDPMPipeline]:
    return {name: MSFPPipelineMixin.attach(copy.deepcopy(pipe)) for name, pipe in made.items()}


def says(caplog, words: str) -> bool:
    return any(words in record.getMessage() for record in caplog.records)


# ── a corrected output ───────────────────────────────────────────────────────────────────────────────────────────────


def test_an_imported_adapter_takes_the_correction_of_another_off(pipes, tmp_path, caplog):
    export_adapter(pipes["side"].unet, 1, tmp_path)
    other = copy.deepcopy(pipes["side"].unet)
    table = CorrectionTable(torch.tensor([5.0]), *(torch.ones(1, 3) for _ in range(3)))
    attach_correction(other, table)
    import_adapter(other, 0, tmp_path)
    assert correction_of(other) is None
    assert "as they were, and is taken off" in caplog.text


def test_a_corrected_base_rests_while_adapters_are_on_it(pipes, images, tmp_path, caplog):
    save_talora(pipes["side"].unet, tmp_path)
    pipe, expected = pipes["corrected"], run(pipes["corrected"].unet, images)
    before = copy.deepcopy(pipe.unet)
    with caplog.at_level(logging.WARNING, "diffusers_msfp"):
        pipe.load_talora(tmp_path)
    assert says(caplog, "rests until they are unloaded")
    assert torch.equal(run(pipe.unet, images), run(pipes["side"].unet, images))
    pipe.disable_talora()
    assert torch.equal(run(pipe.unet, images), expected)
    pipe.set_talora_scale(0.5)
    pipe.enable_talora()
    pipes["side"].set_talora_scale(0.5)
    assert torch.equal(run(pipe.unet, images), run(pipes["side"].unet, images))
    pipe.set_talora_scale(1)
    with caplog.at_level(logging.WARNING, "diffusers_msfp"):
        pipe.unet.save_pretrained(tmp_path / "whole")
    assert says(caplog, "rests, and is not saved")
    copied = copy.deepcopy(pipe)
    pipe.save_pretrained(tmp_path / "whole")
    pipes["side"].set_talora_scale(1)
    again = DiffusionPipeline.from_pretrained(tmp_path / "whole")
    assert torch.equal(run(again.unet, images), run(pipes["side"].unet, images))
    for each in (pipe, copied):
        each.unload_talora()
        assert equal_state(each.unet, before)
        assert torch.equal(run(each.unet, images), expected)


def test_a_correction_of_adapters_goes_with_them(pipes, teacher, images, tmp_path, caplog):
    pipe, plain, base = pipes["side"], run(pipes["side"].unet, images), run(pipes["base"].unet, images)
    correct_output(pipe, teacher, SMALL)
    corrected = run(pipe.unet, images)
    assert not torch.equal(corrected, plain)
    pipe.disable_talora()
    assert torch.equal(run(pipe.unet, images), base)
    pipe.enable_talora()
    pipe.set_talora_scale(0.5)
    half = run(pipe.unet, images)
    uncorrected = copy.deepcopy(pipe)
    uncorrect_output(uncorrected)
    assert torch.equal(run(uncorrected.unet, images), half)
    pipe.set_talora_scale(1)
    assert torch.equal(run(pipe.unet, images), corrected)

    pipe.save_talora(tmp_path / "adapters")
    pipe.save_pretrained(tmp_path / "whole")
    for source in ("adapters", "whole"):
        for kind in ("base", "corrected"):
            other = copy.deepcopy(pipes[kind])
            expected = run(other.unet, images)
            other.load_talora(tmp_path / source)
            assert torch.equal(run(other.unet, images), corrected)
            other.unload_talora()
            assert torch.equal(run(other.unet, images), expected)
            assert equal_state(other.unet, pipes[kind].unet)
    with caplog.at_level(logging.WARNING, "diffusers_msfp"):
        pipe.unload_talora()
    assert says(caplog, "fitted to the model with its adapters")
    assert torch.equal(run(pipe.unet, images), base)
    assert equal_state(pipe.unet, pipes["base"].unet)


def test_nothing_corrects_a_model_after_uncorrect_output(pipes, images, tmp_path):
    save_talora(pipes["side"].unet, tmp_path)
    pipe = pipes["corrected"]
    pipe.load_talora(tmp_path)
    uncorrect_output(pipe)
    pipe.unload_talora()
    assert torch.equal(run(pipe.unet, images), run(pipes["base"].unet, images))


@pytest.mark.parametrize("blockwise", [False, True])
@pytest.mark.parametrize("placement", ["side", "merged"])
def test_fine_tuning_neither_sees_a_correction_nor_leaves_it(pipes, teacher, images, caplog, placement, blockwise):
    config = FinetuneConfig(**TUNING, placement=placement, blockwise=blockwise)
    expected = run(pipes["corrected"].unet, images)
    for kind in ("base", "corrected"):
        with caplog.at_level(logging.WARNING, "diffusers_msfp"):
            finetune(pipes[kind], teacher, config)
    assert says(caplog, "rests until" if placement == "side" else "is taken off")
    assert equal_state(pipes["base"].unet, pipes["corrected"].unet)
    assert torch.equal(run(pipes["base"].unet, images), run(pipes["corrected"].unet, images))
    if placement == "side":
        pipes["corrected"].unload_talora()
        assert torch.equal(run(pipes["corrected"].unet, images), expected)


def test_fine_tuning_that_is_given_up_leaves_it(pipes, teacher, images):
    pipe, expected = pipes["corrected"], run(pipes["corrected"].unet, images)
    tuner = Finetuner(pipe, teacher, FinetuneConfig(**TUNING))
    assert correction_of(pipe.unet) is None
    tuner.student.abandon()
    assert torch.equal(run(pipe.unet, images), expected)


def test_damaged_corrections_of_adapters_change_nothing(pipes, teacher, tmp_path, monkeypatch):
    monkeypatch.setenv("MSFP_CHECK_DIGEST", "0")
    correct_output(pipes["side"], teacher, SMALL)
    for change in (lambda table: table.a.fill_(float("nan")), lambda table: delattr(table, "c")):
        damaged = copy.deepcopy(pipes["side"].unet)
        change(damaged.output_correction)
        save_talora(damaged, tmp_path)
        before = copy.deepcopy(pipes["corrected"].unet)
        with pytest.raises(CheckpointError, match="output_correction"):
            load_talora(pipes["corrected"].unet, tmp_path)
        assert equal_state(before, pipes["corrected"].unet)


# ── another strength ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("change", [lambda p: p.disable_talora(), lambda p: p.set_talora_scale(0.5)])
def test_what_would_be_lost_is_neither_saved_nor_corrected(pipes, teacher, tmp_path, change):
    pipe = pipes["side"]
    change(pipe)
    verbs = {
        "whole": lambda folder: pipe.save_pretrained(folder),
        "model": lambda folder: pipe.unet.save_pretrained(folder),
        "adapters": lambda folder: pipe.save_talora(folder),
    }
    for name, verb in verbs.items():
        with pytest.raises(StateError, match=r"adapters as they were trained.*`pipe.enable_talora\(\)`"):
            verb(tmp_path / name)
        assert not list((tmp_path / name).rglob("*.safetensors"))
    with pytest.raises(StateError, match="adapters as they were trained"):
        correct_output(pipe, teacher, SMALL)
    pipe.enable_talora()
    pipe.set_talora_scale(1)
    for name, verb in verbs.items():
        verb(tmp_path / name)
        assert list((tmp_path / name).rglob("*.safetensors"))


# ── calibration ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_ranges_under_adapters_beside_the_weights_are_not_set_anew(pipes, images):
    pipe = pipes["side"]
    before, expected = copy.deepcopy(pipe.unet), run(pipe.unet, images)
    with pytest.raises(StateError, match=r"`unload_talora`"):
        calibrate(pipe, **FEW)
    assert equal_state(before, pipe.unet)
    assert torch.equal(run(pipe.unet, images), expected)
    pipe.unload_talora()
    calibrate(pipe, **FEW)


def test_merged_ones_get_ranges_of_what_they_read(pipes, images, tmp_path):
    pipe = pipes["merged"]
    weights = {name: value.clone() for name, value in pipe.unet.state_dict().items() if "weight" in name}
    calibrate(pipe, **FEW)
    now = pipe.unet.state_dict()
    assert all(torch.equal(now[name], value) for name, value in weights.items())
    scales = [value for name, value in now.items() if name.endswith("input_scale")]
    assert scales
    assert all(value.shape == (2,) and value[0] == value[1] for value in scales)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    for timestep in (10, 900):
        assert torch.equal(run(again.unet, images, timestep), run(pipe.unet, images, timestep))


# ── gradient checkpointing ───────────────────────────────────────────────────────────────────────────────────────────


def close(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() < 0.12 * b.norm())


def gradient(unet, images, loss) -> torch.Tensor:
    x = images.clone().requires_grad_()
    loss(unet, x).backward()
    return x.grad


def calls_at(*timesteps):
    """The loss of calls at these timesteps."""
    return lambda unet, x: sum(unet(x, timestep).sample.square().mean() for timestep in timesteps)


def look_after_a_call(unet, x):
    loss = calls_at(LOW)(unet, x)
    with torch.no_grad():
        unet(x, HIGH)
    return loss


def whole_calls(unet, x):
    """Of the model, whose hooks run again."""
    parts = [checkpoint(lambda x, t=t: unet(x, t).sample.square().mean(), x, use_reentrant=False) for t in (LOW, HIGH)]
    return sum(parts)


def by_hand(unet, images, after) -> torch.Tensor:
    """Blocks are checkpointed by somebody's own code."""
    unet = copy.deepcopy(unet)
    for block in (*unet.down_blocks, unet.mid_block):
        block.forward = lambda *args, forward=block.forward, **kwargs: checkpoint(
            forward, *args, use_reentrant=False, **kwargs
        )
    return gradient(unet, images, after)


@pytest.mark.parametrize("reads", ["float", "codes"])
def test_gradients_are_recomputed_with_the_adapter_of_their_call(made, teacher, images, reads):
    pipe = copy.deepcopy(made["base"])
    finetune(pipe, teacher, FinetuneConfig(**TUNING, placement="side", reads=reads))
    strong(pipe.unet)
    plain = pipe.unet.train()
    plain.timestep_router.table[:, :500] = 0
    plain.timestep_router.table[:, 500:] = 1
    checkpointed = copy.deepcopy(plain)
    checkpointed.enable_gradient_checkpointing()
    low, high, both = (gradient(plain, images, calls_at(*each)) for each in ((LOW,), (HIGH,), (LOW, HIGH)))
    for _ in range(2):
        assert close(gradient(checkpointed, images, look_after_a_call), low)
        assert close(gradient(checkpointed, images, calls_at(LOW)), low)
        assert close(gradient(checkpointed, images, calls_at(HIGH)), high)
        assert close(gradient(plain, images, whole_calls), both)
        assert close(by_hand(plain, images, look_after_a_call), low)
        assert close(gradient(checkpointed, images, calls_at(LOW, HIGH)), both)
    assert not close(low, high)


def test_gradients_recomputed_in_another_thread_find_their_adapter(pipes, images):
    """Autograd recomputes checkpointed activations in threads of its own on accelerators."""
    unet = pipes["side"].unet
    unet.enable_gradient_checkpointing()
    unet.train()
    x = images.clone().requires_grad_()
    loss = unet(x, HIGH).sample.square().mean()
    with ThreadPoolExecutor(1) as pool:
        pool.submit(loss.backward).result()
    assert x.grad.abs().sum() > 0


def test_adapters_are_not_loaded_under_group_offload(pipes, tmp_path):
    pipes["side"].save_talora(tmp_path)
    unet, cpu = pipes["base"].unet, torch.device("cpu")
    unet.enable_group_offload(cpu, cpu, offload_type="leaf_level")
    with pytest.raises(StateError, match="but this UNet2DModel is. Load it anew; it can be offloaded afterwards"):
        pipes["base"].load_talora(tmp_path)
    assert not hasattr(unet, "timestep_router")

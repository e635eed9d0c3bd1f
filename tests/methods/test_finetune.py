"""Fine-tuning of whole pipelines, in one process."""

import copy
import sys
from dataclasses import make_dataclass

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import equal_state, make_condition_unet, make_dit_pipe, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.utils import BaseOutput
from pipelines import ATTENDING, make_small_pipe, make_teacher

from diffusers_msfp import FinetuneConfig, MSFPConfig, calibrate, finetune, freeze, quantize_pipeline
from diffusers_msfp.checkpoint.record import ModelRecord
from diffusers_msfp.errors import ConfigError, NonFiniteError, ShapeError, StateError, UnsupportedError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.layers.convert import replace_module
from diffusers_msfp.methods.talora import Trainee
from diffusers_msfp.methods.talora.config import exploration_factor, learning_rate_factor, turn_at
from diffusers_msfp.methods.talora.finetuner import Finetuner
from diffusers_msfp.plugin.quantize import quantize_model
from diffusers_msfp.sampling.calls import call_arguments
from diffusers_msfp.sampling.solvers import with_ddim
from diffusers_msfp.sampling.timestep import check_timesteps
from diffusers_msfp.sampling.trajectory import Trajectories

SHORT = {"train_steps": 2, "num_inference_steps": 4, "batch_size": 4, "rank": 4}
ONE = SHORT | {"train_steps": 1}


@pytest.fixture
def teacher() -> DDPMPipeline:
    return make_teacher()


@pytest.fixture(scope="module")
def _packed() -> DDPMPipeline:
    """What `packed_pipe` is a copy of."""
    return quantize_pipeline(make_teacher(), "w4a4", num_samples=4, num_inference_steps=3)


@pytest.fixture(scope="module")
def by_default(_packed):
    """A pipeline that was fine-tuned with the default settings, not to be changed, and what became of the run."""
    pipe = copy.deepcopy(_packed)
    return pipe, finetune(pipe, make_teacher(), FinetuneConfig(**SHORT))


def state_of(model) -> dict:
    return {key: value.clone() for key, value in model.state_dict().items()}


def unchanged(model, state: dict) -> bool:
    now = model.state_dict()
    return now.keys() == state.keys() and all(torch.equal(now[key], state[key]) for key in state)


@pytest.fixture(scope="session")
def coarse(embedded) -> DDPMPipeline:
    """The embedded model at w4a4, calibrated on little."""
    pipe = with_ddim(copy.deepcopy(embedded))
    pipe.set_progress_bar_config(disable=True)
    return quantize_pipeline(pipe, "w4a4", num_samples=8, num_inference_steps=5)


@pytest.mark.parametrize("placement", ["merged", pytest.param("side", marks=pytest.mark.slow)])
def test_it_lowers_the_error_of_a_trained_model(coarse, embedded, placement, tmp_path):
    teacher, pipe = with_ddim(embedded), copy.deepcopy(coarse)
    before = compare_pipelines(teacher, pipe, num_samples=4, num_inference_steps=10).traj_rel_l2
    config = FinetuneConfig(
        train_steps=40, num_inference_steps=10, batch_size=4, placement=placement, denoising_factor_exponent=0
    )
    seen = []
    result = finetune(pipe, teacher, config, on_progress=lambda *update, **info: seen.append((*update, info["loss"])))
    after = compare_pipelines(teacher, pipe, num_samples=4, num_inference_steps=10).traj_rel_l2
    assert after < 0.93 * before
    assert result.updates == 40 == len(result.losses)
    assert seen[-1] == (40, 40, result.losses[-1])
    assert not result.collapsed
    assert not any(isinstance(module, Trainee) for module in pipe.unet.modules())

    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(again) is DDPMPipeline
    assert type(again.unet) is UNet2DModel
    assert equal_state(again.unet, pipe.unet)
    assert again.unet.config.quantization_config.to_dict() == pipe.unet.config.quantization_config.to_dict()
    x, timesteps = torch.randn(3, 1, 32, 32), torch.tensor([10, 900, 400])
    assert torch.equal(run(again.unet, x, timesteps), run(pipe.unet, x, timesteps))
    record = ModelRecord.of(again.unet).parts["adapters"].to_dict()
    assert record["placement"] == placement
    assert record["training"]["updates"] == 40


def test_equal_seeds_give_equal_models(packed_pipe, teacher, by_default):
    different = copy.deepcopy(packed_pipe)
    for pipe, seed in ((packed_pipe, 0), (different, 1)):
        finetune(pipe, teacher, FinetuneConfig(**SHORT, seed=seed))
    assert equal_state(packed_pipe.unet, by_default[0].unet)
    assert not equal_state(packed_pipe.unet, different.unet)


@pytest.mark.parametrize(
    "settings",
    [
        {"num_adapters": 1},
        {"num_adapters": 4, "router_groups": ("down_blocks.*", "mid_block.*")},
        {"gradient_accumulation_steps": 2},
        {"ema_decay": 0.5},
        {"mixed_precision": "bf16"},
        {"blockwise": True},
        {"denoising_factor_exponent": 2.0},
        {"exploration": 1.0},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_options_run_and_change_the_model(packed_pipe, teacher, by_default, settings):
    before = copy.deepcopy(packed_pipe.unet)
    result = finetune(packed_pipe, teacher, FinetuneConfig(**SHORT | settings))
    assert all(np.isfinite(result.losses))
    groups, adapters = len(settings.get("router_groups", ())) + 1, settings.get("num_adapters", 2)
    assert np.asarray(result.usage).shape == (groups, adapters)
    x = torch.randn(1, 3, 8, 8)
    assert not torch.equal(run(before, x), run(packed_pipe.unet, x))
    assert not torch.equal(run(by_default[0].unet, x), run(packed_pipe.unet, x))
    assert packed_pipe.unet.timestep_router.table.shape == (groups, 1000)
    if groups > 1:
        layers = dict(packed_pipe.unet.named_modules())
        assert [layers[n].group for n in ("down_blocks.0.resnets.0.conv1", "conv_out")] == [0, 2]


def test_gradient_checkpointing_changes_memory_not_numbers(packed_pipe, teacher, by_default, monkeypatch):
    calls, checkpoint = [], torch.utils.checkpoint.checkpoint
    monkeypatch.setattr(
        torch.utils.checkpoint, "checkpoint", lambda *args, **kwargs: calls.append(1) or checkpoint(*args, **kwargs)
    )
    pipe, result = by_default
    again = finetune(packed_pipe, teacher, FinetuneConfig(**SHORT, gradient_checkpointing=True))
    assert calls
    assert all(np.isfinite(again.losses))
    assert again.losses == pytest.approx(result.losses, rel=1e-4)
    x = torch.randn(1, 3, 8, 8)
    torch.testing.assert_close(run(packed_pipe.unet, x), run(pipe.unet, x), rtol=1e-4, atol=1e-4)
    assert packed_pipe.unet.timestep_router.table.shape == (1, 1000)


def test_a_batch_holds_every_sample_once_at_its_own_timestep(teacher):
    make = call_arguments(teacher, None, 5, {})
    whole = Trajectories(teacher, make, 4, seed=3)
    halves = [Trajectories(teacher, make, 4, seed=3, rank=rank, world=2) for rank in (0, 1)]
    seen = set()
    for number in range(5):
        step = whole[number]
        parts = [half[number] for half in halves]
        assert torch.equal(step.timesteps, torch.cat([part.timesteps for part in parts]))
        assert torch.allclose(step.output, torch.cat([part.output for part in parts]), atol=1e-5)
        assert torch.allclose(step.output, run(teacher.unet, step.args[0], step.timesteps), atol=1e-5)
        seen |= set(zip(range(4), step.timesteps.tolist(), strict=True))
    assert len(seen) == 4 * 5
    assert torch.equal(whole[7].timesteps, Trajectories(teacher, make, 4, seed=3)[7].timesteps)
    with pytest.raises(ConfigError, match="must be a multiple of the 3 processes, but got 4"):
        Trajectories(teacher, make, 4, seed=0, world=3)


def test_labels_and_guidance_are_the_pipeline_s(tmp_path):
    pipe, teacher = make_dit_pipe(), make_dit_pipe()
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
    result = finetune(pipe, teacher, FinetuneConfig(**SHORT), guidance_scale=4.0)
    assert result.updates == 2
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert equal_state(again.transformer, pipe.transformer)


def test_the_teacher_is_not_changed_and_the_student_left_alone_by_a_failure(packed_pipe, teacher):
    teacher_state, state = state_of(teacher.unet), state_of(packed_pipe.unet)
    flags = [parameter.requires_grad for parameter in packed_pipe.unet.parameters()]
    assert any(flags)

    def stop(*_, **__):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(packed_pipe, teacher, FinetuneConfig(**SHORT), on_progress=stop)
    assert unchanged(packed_pipe.unet, state)
    assert not any(isinstance(module, Trainee) for module in packed_pipe.unet.modules())
    with pytest.raises(KeyboardInterrupt):
        finetune(packed_pipe, teacher, FinetuneConfig(**SHORT, gradient_checkpointing=True), on_progress=stop)
    assert not packed_pipe.unet.is_gradient_checkpointing
    assert [parameter.requires_grad for parameter in packed_pipe.unet.parameters()] == flags
    assert unchanged(teacher.unet, teacher_state)
    broken = copy.deepcopy(teacher)
    broken.unet.conv_out.bias.data[0] = float("nan")
    for adapters in (1, 2):
        with pytest.raises(NonFiniteError, match="must be finite"):
            finetune(packed_pipe, broken, FinetuneConfig(**SHORT, num_adapters=adapters))
        assert unchanged(packed_pipe.unet, state)
    finetune(packed_pipe, teacher, FinetuneConfig(**ONE))


@pytest.mark.parametrize("placement", ["merged", "side"])
@pytest.mark.parametrize("method", ["finish", "prepare", "connect", "set_aside"])
def test_a_failure_at_either_end_leaves_the_model_as_it_was(packed_pipe, teacher, monkeypatch, placement, method):
    state, calls = state_of(packed_pipe.unet), []
    student = sys.modules["diffusers_msfp.methods.talora.student"]
    inner = Trainee.finish if method == "finish" else replace_module

    def third(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3 or method in ("connect", "set_aside"):
            raise KeyboardInterrupt
        return inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        if method == "finish":
            patch.setattr(Trainee, "finish", third)
        else:
            patch.setattr(student, "replace_module" if method == "prepare" else method, third)
        with pytest.raises(KeyboardInterrupt):
            finetune(packed_pipe, teacher, FinetuneConfig(**ONE, placement=placement))
    assert unchanged(packed_pipe.unet, state)
    assert not any(isinstance(module, Trainee) for module in packed_pipe.unet.modules())
    finetune(packed_pipe, teacher, FinetuneConfig(**ONE, placement=placement))


def test_bad_requests_are_refused_before_anything_is_changed(packed_pipe, teacher):
    state = state_of(packed_pipe.unet)
    other = DDPMPipeline(make_unet(**ATTENDING | {"block_out_channels": (16,)}), DDIMScheduler())
    with pytest.raises(ShapeError, match=r"The teacher's `.*` must have shape"):
        finetune(packed_pipe, other, FinetuneConfig(**SHORT))
    conditional = DDPMPipeline(make_condition_unet(), DDIMScheduler())
    with pytest.raises(ShapeError, match="a UNet2DModel, but got UNet2DConditionModel"):
        finetune(packed_pipe, conditional, FinetuneConfig(**SHORT))
    observing = copy.deepcopy(teacher)
    quantize_model(observing.unet, MSFPConfig(scheme="w4a4"))
    with pytest.raises(StateError, match="Only a calibrated model"):
        finetune(observing, teacher, FinetuneConfig(**SHORT))
    with pytest.raises(StateError, match="with quantized layers is needed"):
        finetune(copy.deepcopy(teacher), teacher, FinetuneConfig(**SHORT))
    with pytest.raises(ConfigError, match=r"`router_groups` must match a layer, but 'nowhere' matches none"):
        finetune(packed_pipe, teacher, FinetuneConfig(**SHORT, router_groups=("nowhere",)))
    half = copy.deepcopy(packed_pipe)
    half.unet.register_buffer("anchor", torch.zeros(1))
    for parameter in half.unet.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.half()
    with pytest.raises(ConfigError, match="float16 models underflow"):
        finetune(half, teacher, FinetuneConfig(**SHORT))
    for parameter in half.unet.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    with pytest.raises(ConfigError, match="is bfloat16 and the teacher float32"):
        finetune(half, teacher, FinetuneConfig(**SHORT))
    with pytest.raises(ConfigError, match="which it cannot tell apart. Use fewer steps"):
        check_timesteps([1.2, 0.9, 0.1], 1000)
    with pytest.raises(ConfigError, match="which it cannot tell apart"):
        check_timesteps([2000.0, 0.0], 1000)
    assert unchanged(packed_pipe.unet, state)
    finetune(packed_pipe, teacher, FinetuneConfig(**ONE))
    with pytest.raises(StateError, match="has adapters already"):
        finetune(packed_pipe, teacher, FinetuneConfig(**SHORT))
    with pytest.raises(UnsupportedError, match="merged ones cannot be undone"):
        packed_pipe.unet.dequantize()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "need a `rank` of at least 1, but got 0"),
        ({"rank": -1, "placement": "merged"}, "`rank` must be at least 1"),
        ({"num_adapters": 300}, "at most 256, but got 300"),
        ({"placement": "inside"}, "one of merged, side, but got 'inside'"),
        ({"reads": "minds"}, "`reads` must be one of float, codes, but got 'minds'"),
        ({"reads": "float", "placement": "merged"}, "beside the weights, but got 'float' with `placement='merged'`"),
        ({"train_steps": 1, "minutes": 1.0}, "exclude each other"),
        ({"minutes": 0.0}, "`minutes` must be a number above 0"),
        ({"minutes": float("inf")}, "`minutes` must be a number above 0"),
        ({"learning_rate": float("nan")}, "`learning_rate` must be finite"),
        ({"ema_decay": 1.0}, r"must lie in \[0, 1\)"),
        ({"mixed_precision": "fp8"}, "one of no, bf16"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        FinetuneConfig(**settings)


def test_minutes_set_the_number_of_updates(packed_pipe, teacher):
    config = FinetuneConfig(**{**SHORT, "train_steps": None}, minutes=0.02)
    result = finetune(packed_pipe, teacher, config)
    assert 6 <= result.updates < 200
    assert result.seconds < 10


def test_preview_shows_the_student(packed_pipe, teacher):
    shown = []
    config = FinetuneConfig(**SHORT, preview_every=1)
    finetune(packed_pipe, teacher, config, on_preview=lambda *preview: shown.append(preview))
    assert [update for update, _ in shown] == [1, 2]
    assert shown[0][1].shape == (8, 8, 8, 3)
    assert not np.array_equal(shown[0][1], shown[1][1])


@pytest.mark.parametrize("field", ["image", "audios"])
def test_previews_of_pipelines_that_put_out_other_fields(packed_pipe, teacher, caplog, field):
    class Other(DDPMPipeline):
        @torch.no_grad()
        def __call__(self, batch_size=1, generator=None, num_inference_steps=2, output_type="np"):
            made = super().__call__(batch_size, generator, num_inference_steps, output_type)
            return make_dataclass(field, [(field, np.ndarray)], bases=(BaseOutput,))(made.images)

    pipe, original = (Other(each.unet, each.scheduler) for each in (packed_pipe, teacher))
    for each in (pipe, original):
        each.set_progress_bar_config(disable=True)
    shown = []
    config = FinetuneConfig(**SHORT, preview_every=1)
    result = finetune(pipe, original, config, on_preview=lambda *preview: shown.append(preview))
    assert result.updates == 2
    if field == "image":
        assert [pictures.shape for _, pictures in shown] == [(8, 8, 8, 3)] * 2
    else:
        assert not shown
        assert caplog.text.count("goes on without previews") == 1


@pytest.mark.parametrize("size", [3, 16])
def test_previews_beside_arguments_with_a_row_for_each_sample(size):
    teacher = make_small_pipe()
    teacher.set_progress_bar_config(disable=True)
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a8", prompts=["a hat"], num_samples=2, num_inference_steps=2)
    rows = {"prompt": None, "prompt_embeds": torch.randn(size, 8, 16), "guidance_scale": 1.0}
    config = FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=size, rank=2, preview_every=1)
    shown = []
    finetune(pipe, teacher, config, on_preview=lambda *preview: shown.append(preview), **rows)
    assert [pictures.shape for _, pictures in shown] == [(8, 8, 8, 3)]


def test_schedules():
    assert learning_rate_factor(0, 100) == pytest.approx(1 / 20)
    assert learning_rate_factor(100, 100) == 0
    assert exploration_factor(0, 100) == 1
    assert exploration_factor(50, 100) == 0
    assert turn_at({}, 3, 8) == (None, 3, 8)
    turns = [turn_at({"a": 1, "b": 3}, update, 8) for update in range(10)]
    assert turns == [("a", i, 2) for i in range(2)] + [("b", i, 6) for i in range(8)]


def test_every_block_is_trained_at_the_full_rate_in_the_order_of_running(packed_pipe, teacher, monkeypatch):
    monkeypatch.setattr(Finetuner, "_backward", lambda _self, _number, turn: seen.append(turn) or torch.zeros(()))
    seen = []
    finetune(packed_pipe, teacher, FinetuneConfig(**SHORT | {"train_steps": 200}, blockwise=True, preview_every=0))
    order = list(dict.fromkeys(turn.block for turn in seen))
    assert (
        order.index("down_blocks.0") < order.index("mid_block") < order.index("up_blocks.0") < order.index("conv_out")
    )
    for block in order:
        mine = [turn for turn in seen if turn.block == block]
        assert [turn.update for turn in mine] == list(range(mine[0].total))
        assert max(learning_rate_factor(turn.update, turn.total) for turn in mine) > 0.7


def test_a_fine_tuned_model_is_calibrated_anew_where_its_adapters_are_its_weights(packed_pipe, teacher):
    side = copy.deepcopy(packed_pipe)
    finetune(side, teacher, FinetuneConfig(**SHORT))
    with pytest.raises(StateError, match="calibrate, and fine-tune"):
        calibrate(side, num_samples=2, num_inference_steps=2)
    finetune(packed_pipe, teacher, FinetuneConfig(**SHORT | {"placement": "merged", "num_adapters": 1}))
    before = compare_pipelines(teacher, packed_pipe, num_samples=4, num_inference_steps=3).eps_rel_l2
    calibrate(packed_pipe, num_samples=4, num_inference_steps=3)
    after = compare_pipelines(teacher, packed_pipe, num_samples=4, num_inference_steps=3).eps_rel_l2
    assert after < 1.2 * before


@pytest.fixture
def _own_state():
    AcceleratorState._reset_state()
    GradientState._reset_state()
    yield
    AcceleratorState._reset_state()
    GradientState._reset_state()


@pytest.mark.usefixtures("_own_state")
def test_the_user_s_own_accelerator_stays_as_it_is(packed_pipe, teacher):
    own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    before = own.mixed_precision, own.gradient_accumulation_steps, own.sync_gradients
    ours = finetune(copy.deepcopy(packed_pipe), teacher, FinetuneConfig(**SHORT, gradient_accumulation_steps=2))
    assert (own.mixed_precision, own.gradient_accumulation_steps, own.sync_gradients) == before
    AcceleratorState._reset_state()
    GradientState._reset_state()
    alone = finetune(packed_pipe, teacher, FinetuneConfig(**SHORT, gradient_accumulation_steps=2))
    assert ours.losses == alone.losses
    assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


def test_a_model_that_was_quantized_and_run_in_inference_mode_is_trained(teacher):
    pipe = copy.deepcopy(teacher)
    with torch.inference_mode():
        quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
        pipe(1, num_inference_steps=1)
    assert not any(tensor.is_inference() for tensor in pipe.unet.state_dict().values())
    assert len(finetune(pipe, teacher, FinetuneConfig(**SHORT)).losses) == 2


def test_a_model_that_was_observed_and_frozen_in_inference_mode_is_trained(teacher):
    pipe = copy.deepcopy(teacher)
    quantize_model(pipe.unet, MSFPConfig("w4a4"))
    with torch.inference_mode():
        pipe(1, num_inference_steps=2)
        freeze(pipe.unet)
    assert not any(tensor.is_inference() for tensor in pipe.unet.state_dict().values())
    assert len(finetune(pipe, teacher, FinetuneConfig(**SHORT)).losses) == 2


def test_a_model_that_was_made_float_in_inference_mode_is_trained(packed_pipe, images):
    with torch.inference_mode():
        packed_pipe.unet.dequantize()
    packed_pipe.unet(images, 1).sample.sum().backward()
    assert all(parameter.grad is not None for parameter in packed_pipe.unet.conv_in.parameters())


def test_one_more_update_at_a_time(packed_pipe, teacher):
    run_ = Finetuner(packed_pipe, teacher, FinetuneConfig(**SHORT))
    run_.update()
    assert run_.progress.update == 1
    assert sum(isinstance(module, Trainee) for module in packed_pipe.unet.modules()) > 20
    run_.student.abandon()

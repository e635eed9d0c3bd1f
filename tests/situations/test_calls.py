"""What pipelines do with their denoiser's arguments, and to the denoiser itself, while they run."""

import copy

import pytest
import torch
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    ModularPipeline,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
    T2IAdapter,
)
from pipelines import make_small_pipe, make_small_wan

from diffusers_msfp import (
    CorrectionConfig,
    FinetuneConfig,
    MSFPConfig,
    RoundingConfig,
    correct_output,
    finetune,
    learn_rounding,
    quantize_pipeline,
)
from diffusers_msfp.errors import NothingToDoError, UnsupportedError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.methods.talora.finetuner import Finetuner
from diffusers_msfp.sampling.calls import call_arguments
from diffusers_msfp.sampling.denoisers import model_output
from diffusers_msfp.sampling.timestep import TimestepArgument, timestep_argument
from diffusers_msfp.sampling.trajectory import DenoisingStep, mix, rollout

FAST = {"num_samples": 1, "num_inference_steps": 2}
SIZE = {"height": 16, "width": 16}


def make_t2i() -> StableDiffusionAdapterPipeline:
    """Its adapter's features are large, so that whoever loses them cannot overlook it."""
    parts = {key: part for key, part in make_small_pipe().components.items() if key != "image_encoder"}
    torch.manual_seed(2)
    channels = list(parts["unet"].config.block_out_channels)
    adapter = T2IAdapter(3, channels, num_res_blocks=1, downscale_factor=1, adapter_type="full_adapter")
    return StableDiffusionAdapterPipeline(**parts, adapter=adapter.eval(), requires_safety_checker=False)


@pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning")
@pytest.mark.situation(
    "a T2I-Adapter's features, which the denoiser takes off their list, while it is trained", "right"
)
def test_lists_that_a_denoiser_takes_apart():
    teacher = make_t2i()
    teacher.set_progress_bar_config(disable=True)
    arguments = {"image": torch.rand(1, 3, 16, 16), **SIZE}
    step = rollout(teacher, call_arguments(teacher, ["a hat"], 2, arguments), 0, 1, 0)[0]
    with torch.no_grad():
        for _ in range(2):  # a step may be run many times
            torch.testing.assert_close(model_output(step.run(teacher.unet)), step.output)
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w8a8-wide", prompts=["a hat"], **FAST, **arguments)
    result = compare_pipelines(teacher, pipe, prompts=["a hat"], **FAST, **arguments)
    assert result.eps_rel_l2 < 0.1
    config = CorrectionConfig(num_samples=1, num_inference_steps=2)
    assert max(correct_output(pipe, teacher, config, prompts=["a hat"], **arguments).error_before) < 0.1


@pytest.mark.situation("a timestep for each token, as Wan 2.2 5B and LTX tell their denoisers", "right")
def test_timesteps_by_token():
    teacher = make_small_wan()
    teacher.set_progress_bar_config(disable=True)
    teacher.register_to_config(expand_timesteps=True)
    given = {"height": 16, "width": 16, "num_frames": 1, "output_type": "latent"}
    steps = rollout(teacher, call_arguments(teacher, ["a hat"], 2, given), 0, 2, 0)
    model, argument = teacher.transformer, timestep_argument(teacher.transformer)
    assert argument.given(steps[0].args, steps[0].kwargs).ndim == 2
    mixed = mix(steps, [0, 1], argument)
    assert mixed.timesteps.tolist() == [float(steps[0].timesteps[0]), float(steps[1].timesteps[1])]
    with torch.no_grad():
        torch.testing.assert_close(model_output(mixed.run(model)), mixed.output)
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w8a8-wide", prompts=["a hat"], **FAST, **given)
    before = compare_pipelines(teacher, pipe, prompts=["a hat"], **FAST, **given)
    assert sorted(before.eps_rel_l2_by_timestep) == sorted({f"{float(step.timesteps[0]):g}" for step in steps})
    correct_output(pipe, teacher, CorrectionConfig(num_samples=2, num_inference_steps=2), prompts=["a hat"], **given)
    assert compare_pipelines(teacher, pipe, prompts=["a hat"], **FAST, **given).eps_rel_l2 < 0.1


def make_animation() -> AnimateDiffPipeline:
    """Each frame of a sample is a row of text, and samples are rows of all else."""
    parts = {name: make_small_pipe().components[name] for name in ("vae", "text_encoder", "tokenizer", "unet")}
    torch.manual_seed(3)
    channels = parts["unet"].config.block_out_channels
    adapter = MotionAdapter(channels, motion_norm_num_groups=4, motion_num_attention_heads=2, motion_layers_per_block=1)
    return AnimateDiffPipeline(**parts, motion_adapter=adapter, scheduler=DDIMScheduler())


@pytest.mark.situation("a video model, whose text has a row for each frame, is fine-tuned and rounded", "right")
def test_rows_of_frames():
    teacher = make_animation()
    teacher.set_progress_bar_config(disable=True)
    given = {"num_frames": 2, "height": 16, "width": 16}
    texts = ["a hat", "a shoe"]
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w8a8-wide", prompts=texts, **FAST, **given)
    whole, before = copy.deepcopy(pipe.unet), copy.deepcopy(pipe)
    config = FinetuneConfig(train_steps=1, num_inference_steps=3, batch_size=2, placement="side", preview_every=1)
    shown = []
    run = Finetuner(pipe, teacher, config, prompts=texts, on_preview=lambda *preview: shown.append(preview), **given)
    run.student.router.mlp[-1].bias.data.zero_()
    for number in range(3):  # adapters that were not trained yet add nothing, whichever they are
        step = run.trajectories[number]
        with torch.no_grad():
            (found,), _ = run.student(step)
            expected = model_output(step.run(whole))
        assert (found - expected).norm() < 0.05 * expected.norm()
    run.run()
    blockwise = FinetuneConfig(train_steps=2, num_inference_steps=2, batch_size=2, placement="side", blockwise=True)
    assert finetune(copy.deepcopy(before), teacher, blockwise, prompts=texts, **given).updates == 2
    assert shown[0][1].shape[1:] == (16, 16, 3)
    rounded = copy.deepcopy(teacher)
    quantize_pipeline(rounded, "w4a8", prompts=texts, **FAST, **given)
    settings = RoundingConfig(num_samples=2, num_inference_steps=2, iterations=1, batch_size=2)
    assert learn_rounding(rounded, teacher, settings, prompts=texts, **given).seconds > 0


@pytest.mark.situation("a list with a tensor for each sample, as many as it has channels, while it is trained", "right")
def test_lists_of_samples():
    def step(number: float) -> DenoisingStep:
        x = [torch.full((4, 2, 2), number + row) for row in range(4)]
        captions = [torch.full((row + 1, 3), number + row) for row in range(4)]
        return DenoisingStep(torch.full((4,), number), (x, torch.full((4,), number), captions), {}, torch.stack(x))

    steps = [step(10.0), step(20.0)]
    mixed = mix(steps, [0, 1, 1, 0], TimestepArgument("t", 1))
    assert mixed.timesteps.tolist() == [10, 20, 20, 10]
    for samples in (mixed.args[0], mixed.args[2], mixed.output):
        assert [each.unique().tolist() for each in samples] == [[10], [21], [22], [13]]
    turned = mixed.rows(torch.tensor([3, 0, 1, 2]))
    for samples in (turned.args[0], turned.args[2], turned.output):
        assert [each.unique().tolist() for each in samples] == [[13], [10], [21], [22]]


@pytest.mark.situation("perturbed-attention guidance, which exchanges attention while the pipeline runs", "refused")
def test_attention_that_is_exchanged_during_a_call():
    components = make_small_pipe().components
    teacher = StableDiffusionPAGPipeline(**components, requires_safety_checker=False, pag_applied_layers=["mid"])
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a8", prompts=["a hat"], **FAST, **SIZE)
    before = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    verbs = (
        lambda **more: finetune(
            pipe, teacher, FinetuneConfig(train_steps=1, batch_size=1, num_inference_steps=2), **more
        ),
        lambda **more: correct_output(pipe, teacher, CorrectionConfig(num_samples=1, num_inference_steps=2), **more),
        lambda **more: compare_pipelines(teacher, pipe, **FAST, **more),
    )
    processors = [dict(each.unet.attn_processors) for each in (teacher, pipe)]
    for verb in verbs:
        with pytest.raises(
            (UnsupportedError, NothingToDoError), match="exchanges it while the pipeline runs.*pag_scale=0"
        ):
            verb(prompts=["a hat"], **SIZE)
        assert processors == [each.unet.attn_processors for each in (teacher, pipe)]  # diffusers leaves its own there
        assert all(torch.equal(before[name], tensor) for name, tensor in pipe.unet.state_dict().items())
    compare_pipelines(teacher, pipe, prompts=["a hat"], pag_scale=0.0, **FAST, **SIZE)


@pytest.mark.situation("self-attention guidance, whose exchanged attention computes the same", "right")
def test_attention_that_is_stored_during_a_call():
    teacher = StableDiffusionSAGPipeline(**make_small_pipe().components, requires_safety_checker=False)
    arguments = {"prompts": ["a hat"], "sag_scale": 0.0, **FAST, **SIZE}
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w8a8-wide", **arguments)
    assert compare_pipelines(teacher, pipe, **arguments).eps_rel_l2 < 0.1


@pytest.mark.situation("one `MSFPConfig` for all models that a modular pipeline loads", "refused")
def test_modular_pipelines(monkeypatch):
    pipe = ModularPipeline.__new__(ModularPipeline)
    config = MSFPConfig("w4a4")
    with pytest.raises(UnsupportedError, match="Say which one it is for"):
        pipe.load_components(quantization_config=config)
    monkeypatch.setattr(ModularPipeline, "_component_specs", {}, raising=False)
    for names in ("unet", ["unet"]):
        pipe.load_components(names=names, quantization_config=config)
    pipe.load_components(names=["vae"], quantization_config={"unet": config})

"""What pipelines do with their denoiser's arguments, and to the denoiser itself, while they run."""

import copy
import inspect
import pickle
from contextlib import suppress

import pytest
import torch
from conftest import ONE_BLOCK, make_dit_pipe, make_unet
from diffusers import (
    AnimateDiffPipeline,
    DDIMScheduler,
    DDPMPipeline,
    ImagePipelineOutput,
    ModularPipeline,
    MotionAdapter,
    StableDiffusionAdapterPipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionSAGPipeline,
    T2IAdapter,
    UNet2DModel,
)
from diffusers.utils.torch_utils import randn_tensor
from pipelines import kontext_call, make_kontext, make_small_pipe, make_small_wan

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
from diffusers_msfp.budget.sensitivity import Samples
from diffusers_msfp.errors import ConfigError, NothingToDoError, UnsupportedError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.evaluation.images.samples import draw_pictures
from diffusers_msfp.evaluation.layers import layer_snr
from diffusers_msfp.methods.talora.finetuner import Finetuner
from diffusers_msfp.sampling.calls import batched_calls, call_arguments
from diffusers_msfp.sampling.denoisers import model_output
from diffusers_msfp.sampling.rows import by_picture
from diffusers_msfp.sampling.timestep import TimestepArgument, timestep_argument
from diffusers_msfp.sampling.trajectory import DenoisingStep, mix, rollout
from diffusers_msfp.sampling.used_output import fresh, place_of, watching_samples

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


@pytest.mark.parametrize("leave", [lambda: None, lambda: 1 / 0])
def test_watched_schedulers_stay_what_they_are(leave):
    """Some pipelines ask for the exact class, and others step copies."""
    scheduler, seen = DDIMScheduler(), []
    scheduler.set_timesteps(2)
    other, stock = copy.deepcopy(scheduler), DDIMScheduler.step
    x = torch.ones(1, 1, 2, 2)
    with suppress(ZeroDivisionError), watching_samples(scheduler, seen.append):
        with watching_samples(scheduler, seen.append):
            assert type(scheduler) is DDIMScheduler
            copied = copy.deepcopy(scheduler)
            for each in (copied, other, pickle.loads(pickle.dumps(scheduler))):
                each.step(x, 500, x)
            assert not seen
            assert inspect.signature(scheduler.step) == inspect.signature(other.step)
            scheduler.step(x, 500, x)
            assert len(seen) == 2
        scheduler.step(x, 500, sample=2 * x)
        assert [each.max() for each in seen] == [1, 1, 2]
        leave()
    assert DDIMScheduler.step is stock
    assert "step" not in vars(scheduler)


class PredictingScheduler(DDIMScheduler):
    """As score-based ones, which step in parts of other names."""

    step = None


def test_schedulers_without_a_step_are_left_alone():
    with watching_samples(PredictingScheduler(), pytest.fail):
        pass


ROWS = {  # arguments, and for each the rows that pictures 1 to 3 get; embeddings have two
    "AudioLDM2": {"prompt_embeds": [1, 0, 1], "generated_prompt_embeds": [1, 0, 1]},
    "HiDream": {"prompt_embeds_t5": [1, 0, 1], "pooled_prompt_embeds": [1, 0, 1], "prompt_embeds_llama3": [1, 0, 1]},
    "pictures": {"prompt_embeds": [1, 0, 1], "image": [1, 0, 1], "negative_prompt_embeds": [1, 0, 1]},
    "one picture": {"prompt_embeds": [1, 0, 1], "image_embeds": None},
}


@pytest.mark.parametrize("kind", ROWS)
def test_what_stands_beside_embeddings_is_taken_in_turn(kind):
    arguments = {name: torch.arange(1 if rows is None else 2) for name, rows in ROWS[kind].items()}
    if kind == "HiDream":
        arguments["prompt_embeds_llama3"] = torch.arange(2).expand(4, 2)
    found = by_picture(arguments, {}, 1, 3)
    expected = {name: rows for name, rows in ROWS[kind].items() if rows is not None}
    assert {name: (rows[0] if rows.ndim > 1 else rows).tolist() for name, rows in found.items()} == expected


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
def test_rows_of_frames(monkeypatch):
    monkeypatch.setattr("diffusers_msfp.methods.previews.PREVIEWS", 1)
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
    exclude = ("down_blocks.*", "up_blocks.*", "time_embedding.*", "conv_*")
    settings = RoundingConfig(num_samples=2, num_inference_steps=2, iterations=1, batch_size=2, exclude=exclude)
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


class Keys:
    """What the first step of a run leaves to the others."""

    def __init__(self):
        self.layers = [None]


class Caching(UNet2DModel):
    def forward(self, sample, timestep, extract=False, keys=None):
        output = super().forward(sample, timestep).sample
        if extract:
            keys.layers[0] = output.mean()
        return (output + keys.layers[0],)


class CachingPipeline(DDPMPipeline):
    @torch.no_grad()
    def __call__(self, batch_size=1, generator=None, num_inference_steps=2, output_type="np", return_dict=True):  # noqa: ARG002
        sample, keys = randn_tensor((batch_size, 3, 8, 8), generator=generator), Keys()
        self.scheduler.set_timesteps(num_inference_steps)
        for number, timestep in enumerate(self.scheduler.timesteps):
            (output,) = self.unet(sample, timestep, extract=number == 0, keys=keys)
            sample = self.scheduler.step(output, timestep, sample).prev_sample
        return ImagePipelineOutput(sample.clamp(0, 1).movedim(1, -1).numpy())


@pytest.mark.situation("a cache of keys that a run's first step fills: each model's own, however often", "right")
def test_caches_of_keys():
    torch.manual_seed(0)
    teacher = CachingPipeline(Caching.from_config(make_unet(**ONE_BLOCK).config).eval(), DDIMScheduler())
    other, said = copy.deepcopy(teacher), []
    other.unet.conv_out.bias.data += 1
    for watched in (teacher, other):
        watched.unet.register_forward_hook(lambda model, _args, output: said.append((model, output[0])))
    make = call_arguments(teacher, None, 2, {})
    alone = {pipe: [step.output for step in rollout(pipe, make, 0, 1, 0)] for pipe in (teacher, other)}
    steps = rollout(teacher, make, 0, 1, 0)
    for _ in range(2):
        steps[0].run(other.unet)
        assert torch.equal(steps[1].run(teacher.unet)[0], alone[teacher][1])
    said.clear()
    result = compare_pipelines(teacher, other, num_samples=1, num_inference_steps=2)
    found = {pipe: [output for model, output in said if model is pipe.unet] for pipe in (teacher, other)}
    said.clear()
    compare_pipelines(teacher, teacher, num_samples=1, num_inference_steps=2)
    undisturbed = [output for _, output in said]
    assert torch.equal(found[teacher][0], undisturbed[0])
    assert torch.equal(found[teacher][1], undisturbed[2])  # after the student's own first step
    assert result.eps_mse == pytest.approx((4 + 1) / 2, rel=1e-4)  # its own keys, then those that it is called with


def test_caches_that_are_written_in_place():
    class Cache:
        def __init__(self):
            self.keys = [torch.zeros(2)]

    given, x = Cache(), torch.zeros(2)
    (copied, same), _ = fresh(((given, x), {}))
    copied.keys[0].add_(1)
    assert not given.keys[0].any()
    assert same is x


@pytest.mark.filterwarnings("ignore:The decode_latents method:FutureWarning")
@pytest.mark.situation("a T2I-Adapter's features while layers are measured: the float model keeps them", "right")
def test_layers_are_measured_on_the_pipelines_own_calls():
    teacher = make_t2i()
    teacher.set_progress_bar_config(disable=True)
    arguments = {"prompts": ["a hat"], "image": torch.rand(1, 3, 16, 16), **FAST, **SIZE}
    said = []
    teacher.unet.register_forward_hook(lambda _model, _args, output: said.append(model_output(output)))
    compare_pipelines(teacher, copy.deepcopy(teacher), **arguments)
    (alone, _), _ = said[:2], said.clear()
    layer_snr(teacher, teacher, **arguments)
    assert torch.equal(said[-2], alone)


@pytest.mark.situation("a picture to be edited stands beside the sample: what becomes of it counts nowhere", "right")
def test_parts_of_the_output_that_pipelines_throw_away():
    teacher = make_kontext()
    teacher.set_progress_bar_config(disable=True)
    arguments, given = {"prompts": ["a hat"], **FAST}, kontext_call()
    step = rollout(teacher, call_arguments(teacher, ["a hat"], 2, given), 0, 1, 0)[0]
    places = step.output.shape[1]
    assert model_output(step.run(teacher.transformer)).shape[1] > places

    def wrong(pipe):
        def distort(_model, _args, output):
            output[0][:, places:] += 1

        other = copy.deepcopy(pipe)
        other.transformer.register_forward_hook(distort)
        return other

    assert compare_pipelines(teacher, wrong(teacher), **arguments, **given).eps_mse == 0
    assert Samples.of(teacher, seed=0, **arguments, **given).error(wrong(teacher).transformer) == 0
    pipe = quantize_pipeline(copy.deepcopy(teacher), "w4a8", **arguments, **given)
    config = CorrectionConfig(num_samples=1, num_inference_steps=2)
    found = [correct_output(each, teacher, config, prompts=["a hat"], **given) for each in (pipe, wrong(pipe))]
    assert found[0] == found[1]
    finetuning = FinetuneConfig(train_steps=1, num_inference_steps=2, batch_size=1, placement="side", num_adapters=1)
    losses = [finetune(each, teacher, finetuning, prompts=["a hat"], **given).losses for each in (wrong(pipe), pipe)]
    assert losses[0] == losses[1]


def test_where_a_sample_stands():
    read, noise = torch.randn(4, 10, 6), torch.randn(2, 4, 6)
    for start, index in ((0, slice(None, 4)), (6, slice(-4, None))):
        beside = read.clone()
        beside[:2, start : start + 4] = 0.3 * noise
        assert place_of(noise, beside.bfloat16(), read) == (slice(None), index)
    assert place_of(noise, read, read) == place_of(read[:2], read, read) == ()
    wide = torch.cat([noise, torch.randn(2, 4, 3)], -1)
    assert place_of(noise, wide, wide) == (slice(None), slice(None), slice(None, 6))
    assert place_of(noise, noise, torch.cat([noise, noise], 1)) == ()  # a variance beside it


def rows(pipe, given: dict, num_samples: int, name: str) -> list:
    calls = batched_calls(call_arguments(pipe, given.pop("prompts", None), 1, given), [pipe.unet], num_samples, 0)
    return [row for call in calls for row in call.arguments[name]]


@pytest.mark.situation("embeddings instead of prompts: taken in turn, for as many pictures as asked for", "right")
def test_embeddings():
    pipe = make_small_pipe()
    pipe.set_progress_bar_config(disable=True)
    embeddings = torch.randn(2, 77, 16)
    given = {"prompt": None, "prompt_embeds": embeddings, "negative_prompt_embeds": embeddings.flip(0)}
    for name, order in (("prompt_embeds", [0, 1, 0, 1, 0]), ("negative_prompt_embeds", [1, 0, 1, 0, 1])):
        found = rows(pipe, dict(given), 5, name)
        assert all(torch.equal(row, embeddings[i]) for row, i in zip(found, order, strict=True))
    shown = []
    compare_pipelines(
        pipe,
        pipe,
        num_samples=5,
        num_inference_steps=1,
        on_pictures=lambda expected, *_: shown.extend(expected),
        **given,
    )
    assert len(shown) == 5
    assert len(draw_pictures(pipe, num_samples=5, num_inference_steps=1, **given)) == 5


@pytest.mark.situation("more or fewer pictures than samples, by labels or several of a prompt at once", "refused")
def test_other_numbers_of_pictures_than_samples():
    run = {"num_samples": 2, "num_inference_steps": 1}
    pipe, labelled = make_small_pipe(), make_dit_pipe()
    with pytest.raises(ConfigError, match="`num_images_per_prompt` must be 1, but got 2"):
        compare_pipelines(pipe, pipe, num_images_per_prompt=2, **run)
    with pytest.raises(ConfigError, match="made 1 where 2 were to come"):
        compare_pipelines(labelled, labelled, class_labels=[3], **run)


@pytest.mark.situation("one negative prompt for all, or a list of them, taken in turn as prompts are", "right")
def test_negative_prompts():
    pipe = make_small_pipe()
    pipe.set_progress_bar_config(disable=True)
    for negative, expected in (("blurry", ["blurry"] * 6), ("", [""] * 6), (["a", "b"], ["a", "b"] * 3)):
        given = {"negative_prompt": negative, "guidance_scale": 4.0}
        assert rows(pipe, {"prompts": ["a hat"], **given}, 6, "negative_prompt") == expected
        made = draw_pictures(pipe, num_samples=6, num_inference_steps=1, prompts=["a hat"], **given)
        assert len(made) == 6

"""Correction of the output by timestep: what it fits, where it applies, what happens to it in a checkpoint's life."""

import copy

import pytest
import torch
from conftest import ONE_BLOCK, make_dit_pipe, make_unet
from diffusers import DanceDiffusionPipeline, DDIMScheduler, DDPMPipeline, UNet2DModel
from pipelines import make_unet_1d

from diffusers_msfp import (
    CorrectionConfig,
    MSFPConfig,
    calibrate,
    correct_output,
    learn_rounding,
    quantize_pipeline,
    uncorrect_output,
)
from diffusers_msfp.checkpoint.describe import read_config
from diffusers_msfp.errors import CheckpointError, NothingToDoError, StateError
from diffusers_msfp.evaluation import compare_pipelines
from diffusers_msfp.methods.correction import CorrectionHook, CorrectionTable
from diffusers_msfp.methods.correction.attach import attach_correction, correction_of

SMALL = CorrectionConfig(num_samples=8, num_inference_steps=4)


@pytest.fixture(scope="module")
def made() -> tuple[DDPMPipeline, DDPMPipeline]:
    teacher = DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler())
    teacher.set_progress_bar_config(disable=True)
    return quantize_pipeline(copy.deepcopy(teacher), "w4a4", num_samples=2, num_inference_steps=3), teacher


@pytest.fixture
def pair(made) -> tuple[DDPMPipeline, DDPMPipeline]:
    """A quantized pipeline and its original, of one's own."""
    return copy.deepcopy(made)


def hooks(pipe) -> list[CorrectionHook]:
    return [hook for hook in pipe.unet._forward_hooks.values() if isinstance(hook, CorrectionHook)]


def table_of(model, a: float = 1.0, b: float = 0.0, c: float = 0.0) -> CorrectionTable:
    timesteps = torch.tensor([100.0, 500.0])
    return CorrectionTable(timesteps, *(torch.tensor([[x], [2 * x]]) for x in (a, b, c)))


def test_a_known_distortion_is_found_and_undone(made):
    teacher = made[1]
    wrong = copy.deepcopy(teacher)
    quantize_pipeline(wrong, "w8a8", num_samples=2, num_inference_steps=3)
    conv = wrong.unet.conv_out
    offset = torch.tensor([0.3, -0.2, 0.1])
    conv.weight_scale.mul_(0.8)
    conv.bias.data = conv.bias.data * 0.8 + offset
    conv.changed()
    before = compare_pipelines(teacher, wrong, num_samples=4, num_inference_steps=4, seed=9)
    result = correct_output(wrong, teacher, SMALL)
    after = compare_pipelines(teacher, wrong, num_samples=4, num_inference_steps=4, seed=9)
    assert after.eps_rel_l2 < 0.1 * before.eps_rel_l2
    assert all(a == pytest.approx(1.25, rel=0.02) for a in result.a)
    table = correction_of(wrong.unet)
    assert torch.allclose(table.c, (-offset / 0.8).expand_as(table.c), atol=0.02)
    assert all(x > y for x, y in zip(result.error_before, result.error_after, strict=True))


def test_between_its_timesteps_it_is_linear_and_beyond_them_constant():
    model = make_unet()
    table = table_of(model, a=1.0)
    assert table.coefficients(300)[0].item() == pytest.approx(1.5)
    assert table.coefficients(torch.tensor([0, 999]))[0].flatten().tolist() == [1.0, 2.0]
    single = CorrectionTable(torch.tensor([5.0]), *(torch.tensor([[x]]) for x in (3.0, 0.0, 1.0)))
    assert single.coefficients(700).flatten().tolist() == [3.0, 0.0, 1.0]


def test_it_is_applied_to_every_form_of_output_and_to_each_sample_at_its_timestep(pair):
    pipe, _ = pair
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        plain = pipe.unet(x, torch.tensor([100, 500])).sample
        attach_correction(pipe.unet, table_of(pipe.unet, a=1.0, b=0.5, c=0.25))
        expected = plain * torch.tensor([1.0, 2.0])[:, None, None, None]
        expected += x * torch.tensor([0.5, 1.0])[:, None, None, None]
        expected += torch.tensor([0.25, 0.5])[:, None, None, None]
        assert torch.allclose(pipe.unet(x, torch.tensor([100, 500])).sample, expected, atol=1e-5)
        (as_tuple,) = pipe.unet(x, torch.tensor([100, 500]), return_dict=False)
        assert torch.allclose(as_tuple, expected, atol=1e-5)
        assert torch.allclose(pipe.unet(sample=x, timestep=torch.tensor([100, 500])).sample, expected, atol=1e-5)


def test_learned_variances_are_left_alone():
    pipe = make_dit_pipe(out_channels=8)
    teacher = copy.deepcopy(pipe)
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
    x, t, labels = torch.randn(1, 4, 8, 8), torch.tensor([300]), torch.tensor([1])
    with torch.no_grad():
        plain = pipe.transformer(x, timestep=t, class_labels=labels).sample
        correct_output(pipe, teacher, CorrectionConfig(num_samples=2, num_inference_steps=2))
        corrected = pipe.transformer(x, timestep=t, class_labels=labels).sample
    half = correction_of(pipe.transformer).a.shape[1]
    assert half * 2 == plain.shape[1]
    assert torch.equal(corrected[:, half:], plain[:, half:])
    assert not torch.equal(corrected[:, :half], plain[:, :half])


def test_it_survives_saving_casting_and_copying_exactly(pair, tmp_path):
    pipe, teacher = pair
    correct_output(pipe, teacher, SMALL)
    x = torch.randn(2, 3, 8, 8)
    with torch.no_grad():
        expected = pipe.unet(x, 321).sample
        pipe.unet.save_pretrained(tmp_path)
        again = UNet2DModel.from_pretrained(tmp_path)
        half = UNet2DModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
        assert torch.equal(again(x, 321).sample, expected)
        assert torch.equal(copy.deepcopy(pipe.unet)(x, 321).sample, expected)
        assert torch.equal(half.output_correction.a, again.output_correction.a)
        assert half(x.bfloat16(), 321).sample.dtype == torch.bfloat16


def test_other_ranges_and_other_weights_take_it_off_or_are_refused(pair):
    pipe, teacher = pair
    correct_output(pipe, teacher, SMALL)
    with pytest.raises(StateError, match="corrected for the weights that it has"):
        learn_rounding(pipe, teacher)
    uncorrect_output(pipe)
    assert correction_of(pipe.unet) is None
    assert not hooks(pipe)
    correct_output(pipe, teacher, SMALL)
    calibrate(pipe, num_samples=2, num_inference_steps=3)
    assert correction_of(pipe.unet) is None


def test_a_second_fit_replaces_the_first_and_equals_it(pair):
    pipe, teacher = pair
    first = correct_output(pipe, teacher, SMALL)
    assert correct_output(pipe, teacher, SMALL) == first
    assert len(hooks(pipe)) == 1


def test_dequantized_models_have_none(pair):
    pipe, teacher = pair
    correct_output(pipe, teacher, SMALL)
    pipe.unet.dequantize()
    assert not hasattr(pipe.unet, "output_correction")


def test_version_1_becomes_version_2_and_cannot_claim_one(pair, tmp_path):
    pipe, teacher = pair
    pipe.unet.config.quantization_config.format_version = 1
    pipe.unet.save_pretrained(tmp_path / "plain")
    assert MSFPConfig.from_dict(read_config(tmp_path / "plain")["quantization_config"]).format_version == 1
    correct_output(pipe, teacher, SMALL)
    pipe.unet.save_pretrained(tmp_path / "corrected")
    assert MSFPConfig.from_dict(read_config(tmp_path / "corrected")["quantization_config"]).format_version == 2
    x = torch.randn(2, 3, 8, 8)
    again = UNet2DModel.from_pretrained(tmp_path / "corrected")
    with torch.no_grad():
        assert torch.equal(again(x, 321).sample, pipe.unet(x, 321).sample)
    record = {"quant_method": "msfp", "format_version": 1, "scheme": "w4a4", "layers": []}
    with pytest.raises(CheckpointError, match="belongs to format version 2"):
        MSFPConfig.from_dict(record | {"output_correction": {"entries": 2, "channels": 1}})


@pytest.mark.parametrize(
    "table",
    [
        lambda t: CorrectionTable(t.flip(0), *(torch.ones(2, 1),) * 3),
        lambda t: CorrectionTable(t, torch.ones(2, 1), torch.ones(2, 1), torch.full((2, 1), float("nan"))),
        lambda t: CorrectionTable(t, torch.ones(2, 1), torch.ones(2, 1), torch.ones(2, 3)),
    ],
)
def test_damaged_tables_are_refused(table):
    with pytest.raises(CheckpointError, match="damaged file"):
        table(torch.tensor([1.0, 2.0]))


def test_channels_elsewhere_are_refused():
    teacher = DanceDiffusionPipeline(make_unet_1d(), DDIMScheduler())
    pipe = copy.deepcopy(teacher)
    quantize_pipeline(pipe, "w4a16")
    config = CorrectionConfig(num_samples=1, num_inference_steps=2)
    with pytest.raises(NothingToDoError, match=r"has its channels \(2 or 2\) in axis 2.* Leave the correction out"):
        correct_output(pipe, teacher, config)
    assert correction_of(pipe.unet) is None

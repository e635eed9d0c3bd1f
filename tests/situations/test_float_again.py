"""Float models made of quantized ones by diffusers itself, and training what is packed."""

import copy

import diffusers
import pipelines
import pytest
import torch
from conftest import equal_state, make_condition_unet
from diffusers import (
    AnimateDiffPipeline,
    ControlNetModel,
    ModelMixin,
    MotionAdapter,
    UNet2DConditionModel,
    UNet2DModel,
    UNetControlNetXSModel,
    UNetMotionModel,
)
from diffusers.training_utils import EMAModel
from peft import LoraConfig
from torch.optim.swa_utils import AveragedModel

from diffusers_msfp import MSFPConfig, register
from diffusers_msfp.errors import UnsupportedError
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.plugin.quantize import quantize_model

COPYING = {
    "ControlNetModel.from_unet": lambda unet: ControlNetModel.from_unet(unet),
    "UNetMotionModel.from_unet2d": lambda unet: UNetMotionModel.from_unet2d(unet, make_adapter()),
    "UNetControlNetXSModel.from_unet": lambda unet: UNetControlNetXSModel.from_unet(
        unet, size_ratio=1.0, ctrl_optional_kwargs={"num_attention_heads": 2}
    ),
}


def make_adapter() -> MotionAdapter:
    return MotionAdapter(
        block_out_channels=(8, 16), motion_norm_num_groups=4, motion_num_attention_heads=2, motion_layers_per_block=1
    )


@pytest.fixture
def model() -> UNet2DConditionModel:
    unet = make_condition_unet(**pipelines.SMALL)
    quantize_model(unet, MSFPConfig("w4a16"))
    return unet


@pytest.mark.situation("`from_config` with a quantized model's config", "right")
def test_from_config_of_a_quantized_model(model, tmp_path):
    again = UNet2DConditionModel.from_config(model.config)
    assert not any(isinstance(module, QuantLayer) for module in again.modules())
    assert "quantization_config" not in again.config
    assert "_pre_quantization_dtype" not in again.config
    again.save_pretrained(tmp_path)
    loaded = UNet2DConditionModel.from_pretrained(tmp_path)
    assert equal_state(loaded, again)
    assert model.config.quantization_config.scheme == "w4a16"  # it was not touched


@pytest.mark.situation("`from_config` with the `config.json` of a packed checkpoint", "right")
def test_from_config_of_a_file(packed_dir):
    config = UNet2DModel.load_config(packed_dir, subfolder="unet")
    assert "quantization_config" in config
    assert "quantization_config" not in UNet2DModel.from_config(config).config


def test_every_model_of_diffusers_makes_floats_from_configs():
    names = [name for name in dir(diffusers) if name.endswith("Model") or name.endswith("ControlNet")]
    classes = [cls for name in names if isinstance(cls := getattr(diffusers, name, None), type)]
    models = [cls for cls in classes if issubclass(cls, ModelMixin) and cls is not ModelMixin]
    assert len(models) > 50
    for cls in models:
        owner = next(base for base in cls.__mro__ if "from_config" in vars(base))
        assert owner is ModelMixin, cls


@pytest.mark.situation("`ControlNetModel.from_unet` and other constructors that copy a quantized model", "refused")
@pytest.mark.parametrize("name", COPYING)
def test_constructors_that_copy_weights(name, model):
    before = copy.deepcopy(model)
    message = rf"`{name}` copies float weights, but `.*` of this UNet2DConditionModel is packed. Call `model.dequant"
    with pytest.raises(UnsupportedError, match=message):
        COPYING[name](model)
    assert equal_state(model, before)  # and its tensors can be read again


@pytest.mark.situation("`AnimateDiffPipeline` around a quantized UNet of Stable Diffusion", "refused")
def test_animate_diff_copies_the_unet(model):
    components = pipelines.make_small_pipe().components
    components = {name: components[name] for name in ("vae", "text_encoder", "tokenizer", "scheduler")}
    with pytest.raises(UnsupportedError, match=r"from_unet2d` copies float weights, .* `model.dequantize\(\)`"):
        AnimateDiffPipeline(**components, unet=model, motion_adapter=make_adapter())


@pytest.mark.situation("`ControlNetModel.from_unet` after `dequantize()`, or without the weights", "right")
def test_the_way_out_of_copying(model):
    assert ControlNetModel.from_unet(model, load_weights_from_unet=False).config.cross_attention_dim == 16
    float_again = copy.deepcopy(model).dequantize()
    made = ControlNetModel.from_unet(float_again)
    assert torch.equal(made.conv_in.weight, float_again.conv_in.weight)
    quantize_model(made, MSFPConfig("w4a16"))


def test_later_classes_are_guarded_too_and_once(model):
    class Copy(UNet2DConditionModel):
        @classmethod
        def from_other(cls, other):
            made = cls.from_config(other.config)
            made.load_state_dict(other.state_dict(), strict=False)
            return made

    for _ in range(2):
        register()
    with pytest.raises(UnsupportedError, match="`Copy.from_other` copies float weights"):
        Copy.from_other(model)
    assert not hasattr(Copy.from_other.__func__.__wrapped__, "__wrapped__")
    assert equal_state(Copy.from_other(make_condition_unet()), make_condition_unet())


@pytest.mark.situation("`EMAModel` over a quantized model's parameters, saved as a model", "refused")
def test_moving_average_saved_as_a_model(model, tmp_path):
    average = EMAModel(model.parameters(), model_cls=UNet2DConditionModel, model_config=model.config)
    average.step(model.parameters())
    before = copy.deepcopy(model)
    average.copy_to(model.parameters())
    assert equal_state(model, before)
    with pytest.raises(UnsupportedError, match=r"saves averages as a float UNet2DConditionModel, .* `model.dequan"):
        average.save_pretrained(tmp_path / "average")
    assert not (tmp_path / "average").exists()


@pytest.mark.situation("`AveragedModel` of `torch.optim.swa_utils` around a quantized model", "refused")
def test_averaged_model(model):
    before = copy.deepcopy(model)
    with pytest.raises(UnsupportedError, match=r"An `AveragedModel` averages all parameters, .* `EMAModel"):
        AveragedModel(model)
    assert equal_state(model, before)


PARTS = {
    "the model": lambda model: model,
    "a part of it": lambda model: model.mid_block,
    "a layer": lambda model: model.mid_block.resnets[0].conv1,
}


@pytest.mark.situation("`requires_grad_(True)` on a quantized model, a part of it, or one layer", "refused")
@pytest.mark.parametrize("part", PARTS)
def test_training_packed_weights(part, model):
    model.requires_grad_(False)
    with pytest.raises(
        UnsupportedError, match=r"packed, so it|packed, so they cannot be trained, .* [Tt]rain .*adapter"
    ):
        PARTS[part](model).requires_grad_(True)
    assert not any(parameter.requires_grad for parameter in model.parameters())  # no bias was changed before


@pytest.mark.situation("`train()`, `requires_grad_(False)`, and an optimizer over all parameters", "right")
def test_optimizers_leave_packed_weights_alone(model):
    before = {name: layer.weight.clone() for name, layer in model.named_modules() if isinstance(layer, QuantLayer)}
    assert model.train().training
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.1)
    trained = [
        parameter for group in optimizer.param_groups for parameter in group["params"] if parameter.requires_grad
    ]
    assert trained
    assert all(parameter.is_floating_point() for parameter in trained)
    inputs = {"timestep": 5, "encoder_hidden_states": torch.randn(1, 3, 16)}
    model(torch.randn(1, 4, 8, 8), **inputs).sample.square().mean().backward()
    bias = model.conv_in.bias.clone()
    optimizer.step()
    assert not torch.equal(model.conv_in.bias, bias)
    assert all(torch.equal(layer.weight, before[name]) for name, layer in model.named_modules() if name in before)
    assert not any(parameter.requires_grad for parameter in model.requires_grad_(False).parameters())


def test_floats_answer_like_any_others_after_dequantize(model):
    model.add_adapter(LoraConfig(r=2, target_modules=["to_q"]))
    model.delete_adapters("default")
    model.dequantize()
    assert all(parameter.requires_grad for parameter in model.requires_grad_(True).parameters())
    assert all(parameter.requires_grad for parameter in model.mid_block.requires_grad_(True).parameters())

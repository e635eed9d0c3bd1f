"""Layers that read residual sums are found in any architecture, and get the inputs that their scheme has for them."""

import copy
import logging

import pytest
import torch
from conftest import ONE_BLOCK, make_condition_unet, make_dit, make_unet, make_vae
from diffusers import DDIMScheduler, DDPMPipeline, UNet2DModel
from torch import nn
from torch.overrides import _get_current_function_mode_stack

from diffusers_msfp import MSFPConfig, calibrate, calibration_state, freeze, quantize_pipeline
from diffusers_msfp.layers.convert import layers_by_name
from diffusers_msfp.plugin.quantize import quantize_model


def readers(model: nn.Module) -> set[str]:
    """Names of the layers that try the formats for residual sums."""
    layers = layers_by_name(model).items()
    return {name for name, layer in layers if layer.observing and layer.input_candidates == layer.scheme.residual}


@torch.no_grad()
def observed(model: nn.Module, *args, **kwargs) -> nn.Module:
    quantize_model(model, MSFPConfig("w4a4"))
    model(*args, **kwargs)
    return model


def is_reader(name: str) -> bool:
    """What a UNet of diffusers calls them."""
    attention = name.startswith(("down_blocks", "mid_block", "up_blocks")) and name.endswith("proj_out")
    return attention or name.endswith(("conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"))


def test_shortcuts_and_resampling_layers_of_a_unet():
    model = observed(make_unet(), torch.randn(2, 3, 8, 8), 500)
    assert readers(model) == {name for name in layers_by_name(model) if is_reader(name)}
    assert len(readers(model)) > 3


def test_outgoing_projections_of_transformer_blocks_in_a_unet():
    model = observed(make_condition_unet(), torch.randn(2, 4, 8, 8), 500, torch.randn(2, 5, 16))
    assert readers(model) == {name for name in layers_by_name(model) if is_reader(name)}
    assert any(name.endswith("proj_out") for name in readers(model))


def test_a_transformer_whose_layers_all_read_norms_has_none():
    model = observed(make_dit(), torch.randn(1, 4, 8, 8), timestep=torch.tensor([5]), class_labels=torch.tensor([1]))
    assert readers(model) == set()


@torch.no_grad()
def test_an_autoencoder_whose_parts_are_called_by_its_methods():
    levels = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
    vae = make_vae(block_out_channels=(8, 16), norm_num_groups=4, sample_size=16, **levels)
    whole = observed(copy.deepcopy(vae), torch.randn(1, 3, 16, 16))
    wanted = readers(whole)
    assert any(name.endswith("conv_shortcut") or "samplers" in name for name in wanted)
    quantize_model(vae, MSFPConfig("w4a4"))
    vae.decode(vae.encode(torch.randn(1, 3, 16, 16)).latent_dist.mode())
    assert readers(vae) == wanted
    assert not any(layer.sum_unknown for layer in layers_by_name(vae).values())


class Foreign(nn.Module):
    """Names that nobody knows, a norm that is written out, and sums in place."""

    dtype, config, device = torch.float32, None, torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        for name in ("first", "behind_norm", "behind_sum", "behind_moved_sum", "behind_modulation"):
            setattr(self, name, nn.Linear(8, 8))
        self.rms_norm = Rms()

    def forward(self, sample: torch.Tensor, timestep: float) -> torch.Tensor:
        stream = self.first(sample)
        stream = stream + self.behind_norm(self.rms_norm(sample + stream))
        stream += self.behind_sum(stream)
        moved = torch.cat([stream, stream], -1)[..., 4:12].transpose(0, 1)
        table = sample.mean((0, 1), keepdim=True)
        shift = table + table
        return self.behind_moved_sum(moved) + self.behind_modulation(self.rms_norm(stream) + shift)


class Rms(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)


class RmsNorm(Rms):
    """The same, by a name that says so."""


def test_foreign_models_are_followed_by_what_they_compute():
    from diffusers_msfp.layers.convert import Conversion, convert
    from diffusers_msfp.sampling.observation import track

    model = Foreign()
    model.rms_norm = RmsNorm()
    convert(model, Conversion.plan(model, "w4a4"))
    track(model)
    model(torch.randn(2, 2, 8), 1.0)
    assert readers(model) == {"behind_sum", "behind_moved_sum"}


def test_they_get_one_byte_and_pure_schemes_do_not_ask():
    pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    pure = quantize_pipeline(copy.deepcopy(pipe), "w4a4-pure", num_samples=2, num_inference_steps=2)
    quantize_pipeline(pipe, "w4a4", num_samples=2, num_inference_steps=2)
    for name, layer in layers_by_name(pipe.unet).items():
        bits = 8 if is_reader(name) or layer.weight_format.bits == 8 else 4
        assert layer.input_format is None or layer.input_format.bits == bits, name
        if layer.input_format is not None and bits == 8:
            assert layer.input_format.lattice_max <= 255
    assert all(layer.input_format.bits == 4 for name, layer in layers_by_name(pure.unet).items() if is_reader(name))
    calibrate(pipe, num_samples=2, num_inference_steps=2)
    assert layers_by_name(pipe.unet)["up_blocks.0.resnets.0.conv_shortcut"].input_format.bits == 8


def test_what_was_found_is_saved_while_observing(tmp_path):
    model = observed(make_unet(), torch.randn(2, 3, 8, 8), 500)
    found = readers(model)
    model.save_pretrained(tmp_path)
    again = UNet2DModel.from_pretrained(tmp_path)
    assert calibration_state(again) == "observing"
    assert readers(again) == found
    copied = copy.deepcopy(again)
    assert readers(copied) == found
    freeze(again)
    layers = layers_by_name(again)
    assert all(layers[name].input_format.bits == 8 for name in found)


def test_a_call_that_fails_leaves_nothing_and_the_next_one_is_followed():
    model = make_unet()
    quantize_model(model, MSFPConfig("w4a4"))
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 8, 8), 500)
    assert readers(model) == set()
    assert not _get_current_function_mode_stack()
    with torch.no_grad():
        model(torch.randn(2, 3, 8, 8), 500)
    assert readers(model)
    assert not _get_current_function_mode_stack()


def test_a_model_compiled_too_early_says_so(caplog):
    model = make_unet(**ONE_BLOCK)  # as compiling takes its time
    quantize_model(model, MSFPConfig("w4a4"))
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(torch.randn(2, 3, 8, 8), 500)
    with caplog.at_level(logging.WARNING):
        freeze(model)
    assert "was compiled before its calibration" in caplog.text

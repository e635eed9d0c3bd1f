"""Weights with group scales learn as others do: rounding, and fine-tuning that is merged into them."""

import pytest
import torch
from torch import nn

from diffusers_msfp.layers import QUANT_LAYERS
from diffusers_msfp.layers.quant_layer import QuantLayer
from diffusers_msfp.methods.rounding.parts import RoundedLayer
from diffusers_msfp.methods.talora import FullUpdate, Gate, Trainee
from diffusers_msfp.numerics.rounding import local_step
from diffusers_msfp.schemes import SCHEMES

MODULES = {"whole groups": nn.Linear(32, 6), "a remainder": nn.Conv2d(4, 6, 3, padding=1)}
CASES = pytest.mark.parametrize("module", MODULES.values(), ids=MODULES)


def quantized(module: nn.Module) -> QuantLayer:
    return QUANT_LAYERS[type(module)].from_float(module, "place", SCHEMES["w4g16a16"].inner)


@CASES
def test_rounding_moves_by_a_local_step(module):
    layer = quantized(module)
    rounded = RoundedLayer(layer, module.weight.detach(), scale_aware=True)
    rounded.hardened = True
    nearest = layer.dequantize_weight()
    assert torch.allclose(rounded.rounded(), nearest, rtol=1e-5, atol=0)
    with torch.no_grad():
        rounded.soft.logit.neg_()  # the other neighbour everywhere
    other = rounded.rounded().detach()
    unit = layer.weight_qparams().unit
    y = (module.weight.detach().reshape(layer.rows_shape) / unit).clamp(
        -layer.weight_format.lattice_max, layer.weight_format.lattice_max
    )
    moved = (other.view(layer.rows_shape) / unit - y).abs()
    assert (moved <= local_step(y, layer.weight_format)[0] * (1 + 1e-4)).all()
    assert not torch.equal(other, nearest)
    layer.store_banks([other], module.weight)
    assert torch.allclose(layer.dequantize_weight(), other, rtol=1e-5, atol=0)


@CASES
def test_merged_training_begins_with_the_codes_and_keeps_the_multipliers(module):
    layer = quantized(module)
    begun, multipliers = layer.dequantize_weight(), layer.multipliers()
    update = FullUpdate(layer.logical_shape, 1, "cpu")
    trainee = Trainee(layer, module.weight.detach(), update, "merged", Gate(), 0)
    weight = trainee.merged(torch.ones(1))
    assert torch.allclose(weight, begun, rtol=1e-5, atol=0)
    weight.square().sum().backward()
    assert (trainee.log_weight_scale.grad != 0).all()
    with torch.no_grad():
        trainee.log_weight_scale.add_(0.1)
        for parameter in update.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    trained = trainee.merged(torch.ones(1)).detach()
    finished = trainee.finish(torch.float16)
    assert torch.allclose(finished.dequantize_weight(), trained, rtol=1e-5, atol=0)
    assert torch.equal(finished.multipliers(), multipliers)
    assert not torch.allclose(trained, begun, rtol=1e-2)

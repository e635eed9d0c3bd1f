"""Low-rank pairs at a layer, trained and deployed."""

import copy
from dataclasses import replace

import pytest
import torch
from torch import nn

from diffusers_msfp import export_adapter, import_adapter
from diffusers_msfp.errors import CheckpointError, NonFiniteError, ShapeError, StateError
from diffusers_msfp.formats import FORMATS
from diffusers_msfp.layers import QUANT_LAYERS
from diffusers_msfp.methods.talora import AdapterBank, FullUpdate, Gate, RoutingTable, Trainee, adapter_rank
from diffusers_msfp.methods.talora.trainee import rounding_to_codes
from diffusers_msfp.numerics import QParams, fake_quantize
from diffusers_msfp.schemes import SCHEMES

LAYERS = {
    "linear": (nn.Linear(8, 6), (4, 8)),
    "linear in attention": (nn.Linear(8, 6), (4, 5, 8)),
    "3x3": (nn.Conv2d(4, 6, 3, padding=1), (4, 4, 5, 5)),
    "strided": (nn.Conv2d(4, 6, 3, stride=2, dilation=2, padding=2), (4, 4, 9, 9)),
    "reflect": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), (4, 4, 6, 6)),
    "grouped": (nn.Conv2d(4, 6, 3, groups=2), (4, 4, 5, 5)),
    "1d": (nn.Conv1d(4, 6, 3), (4, 4, 9)),
    "8 samples in 4 routes": (nn.Linear(8, 6), (8, 8)),
}
CASES = pytest.mark.parametrize(("module", "shape"), LAYERS.values(), ids=LAYERS)
ADAPTERS = 3
TIMESTEPS = torch.tensor([2, 0, 2, 1])
TABLE = torch.arange(ADAPTERS, dtype=torch.uint8)[None]


KINDS = ("merged", "side", "codes")  # the second reads floats


def made(module: nn.Module, shape, kind: str, scheme: str = "w4a4") -> tuple[Trainee, torch.Tensor, nn.Module]:
    """A trainee with random adapters, an input, and the quantized layer without adapters."""
    placement, reads = ("side", "codes") if kind == "codes" else (kind, "float")
    x = nn.functional.silu(torch.randn(shape) * 2)
    layer = QUANT_LAYERS[type(module)].from_float(module, "place", SCHEMES[scheme].inner)
    layer(x)
    if layer.observing:
        layer.freeze()
    bank = AdapterBank(layer.logical_shape, ADAPTERS, adapter_rank(layer.logical_shape, 2), device="cpu", reads=reads)
    bank.initialise(torch.Generator().manual_seed(0))
    torch.nn.init.normal_(bank.up, std=0.2)
    base = copy.deepcopy(layer)
    trainee = Trainee(layer, module.weight.detach(), bank, placement, Gate(), 0)
    trainee.gate.set(nn.functional.one_hot(TIMESTEPS, ADAPTERS).float()[:, None].requires_grad_())
    return trainee, x, base


@CASES
@pytest.mark.parametrize("kind", KINDS)
def test_the_deployed_layer_computes_what_was_trained(module, shape, kind):
    trainee, x, base = made(module, shape, kind)
    with torch.no_grad():
        expected = trainee(x)
        layer = trainee.finish(torch.float32)
        routing = RoutingTable(TABLE, ADAPTERS)
        layer.route_by(routing)
        with routing.at(TIMESTEPS):
            mixed = layer(x)
        assert mixed.shape == base(x).shape
        assert torch.allclose(mixed, expected, atol=1e-5)
        repeats = x.shape[0] // len(TIMESTEPS)
        for row, timestep in enumerate(TIMESTEPS.tolist()):
            rows = slice(row * repeats, (row + 1) * repeats)
            with routing.at(timestep):
                assert torch.allclose(layer(x[rows]), mixed[rows], atol=1e-5)
    assert not torch.allclose(mixed, base(x), atol=1e-3)


@CASES
def test_merged_banks_are_the_quantized_sums(module, shape):
    trainee, _, base = made(module, shape, "merged")
    bank = trainee.adapters
    layer = trainee.finish(torch.float16)
    for k in range(ADAPTERS):
        update = (bank.up[k].detach() @ bank.down[k].detach().flatten(1)).view(layer.logical_shape)
        scale = base.weight_scale.view(-1, *[1] * (update.ndim - 1))
        expected = fake_quantize(rounding_to_codes(base, module.weight) + update, QParams(base.weight_format, scale))
        assert torch.equal(layer.dequantize_weight(k), expected)
    assert layer.num_banks == ADAPTERS
    assert layer.adapters is None
    assert torch.equal(layer.weight_scale, base.weight_scale)


@pytest.mark.parametrize("learned", [False, True], ids=["nearest", "learned rounding"])
def test_training_of_merged_weights_begins_with_the_codes_that_are_there(learned):
    """A value that learned rounding has put on the other side stays there, whatever the float weight says."""
    module, shape = LAYERS["3x3"]
    trainee, _, base = made(module, shape, "merged")
    layer = trainee.layer
    if learned:
        step = layer.weight_scale.view(-1, 1, 1, 1) * layer.weight_format.step
        moved = layer.dequantize_weight() + step * torch.randint(-1, 2, module.weight.shape)
        layer.store_banks([fake_quantize(moved, QParams(layer.weight_format, step / layer.weight_format.step))])
        base = copy.deepcopy(layer)
    for bank in (AdapterBank(layer.logical_shape, 1, 2, device="cpu"), FullUpdate(layer.logical_shape, 1, "cpu")):
        for parameter in bank.parameters():
            torch.nn.init.zeros_(parameter)
        fresh = Trainee(layer, module.weight.detach(), bank, "merged", trainee.gate, 0)
        begun = fresh.merged(torch.ones(1))
        assert torch.equal(begun, base.dequantize_weight())
        begun.square().sum().backward()
        assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in (fresh.log_weight_scale,))


@pytest.mark.parametrize("name", ["fp4_e1m2", "fp4_e2m1", "fp4_e3m0", "fp6_e2m3"])
def test_a_code_is_kept_from_wherever_between_its_neighbours_the_float_weight_lies(name):
    """Towards zero the next neighbour of a power of two is nearer than the other."""
    fmt = FORMATS[name]
    lattice = torch.tensor(sorted(value for value in fmt.lattice if value), dtype=torch.float32)
    towards = torch.linspace(0.05, 0.95, 19)[:, None]
    inner, between = lattice[1:-1], (lattice[:-2], lattice[2:])
    original = torch.cat([inner + towards * (side - inner) for side in between])
    codes = inner.expand_as(original)
    ends = lattice[[0, -1]].expand(len(original), 2)  # what the scale follows
    original, codes = (0.1 * torch.cat([part, ends], 1) for part in (original, codes))
    module = nn.Linear(original.shape[1], original.shape[0], bias=False)
    module.weight.data.copy_(original)
    layer = QUANT_LAYERS[nn.Linear].from_float(module, "place", replace(SCHEMES["w4a16"].inner, weight=(name,)))
    layer.weight_scale.fill_(0.1 / fmt.step)
    layer.store_banks([codes])
    assert torch.allclose(layer.dequantize_weight(), codes)
    trainee = Trainee(layer, original, FullUpdate(layer.logical_shape, 1, "cpu"), "merged", Gate(), 0)
    assert torch.equal(trainee.merged(torch.ones(1)), layer.dequantize_weight())


@CASES
def test_side_adapters_are_low_rank_convolutions_and_leave_the_base_alone(module, shape):
    trainee, x, base = made(module, shape, "side", scheme="w4a16")
    layer = trainee.finish(torch.float32)
    routing = RoutingTable(TABLE, ADAPTERS)
    layer.route_by(routing)
    twin = copy.deepcopy(module)
    with torch.no_grad(), routing.at(1):
        twin.weight.copy_((layer.adapters.up[1] @ layer.adapters.down[1].flatten(1)).view(layer.logical_shape))
        twin.bias.zero_()
        assert torch.allclose(layer(x) - base(x), twin(x), atol=1e-5)
        routing.scale = 0.5
        assert torch.allclose(layer(x) - base(x), twin(x) * 0.5, atol=1e-5)
        routing.enabled = False
        assert torch.equal(layer(x), base(x))
    assert torch.equal(layer.packed_weight, base.packed_weight)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_reach_adapters_ranges_and_router(kind):
    trainee, x, _ = made(*LAYERS["3x3"], kind)
    trainee(x).square().mean().backward()
    trained = [trainee.adapters.down, trainee.adapters.up, trainee.log_scale, trainee.relative_zero_point]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    assert trainee.gate.value.grad.abs().sum() > 0


@pytest.mark.parametrize("module", [LAYERS["3x3"][0], LAYERS["grouped"][0], LAYERS["linear"][0]], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_the_router_learns_from_each_samples_own_error(kind, module):
    """Samples of one choice share a weight, and in training a batch: neither may mix their gradients."""
    trainee, x, _ = made(module, (4, 4, 5, 5) if isinstance(module, nn.Conv2d) else (4, 8), kind)
    error = torch.tensor([1.0, 0.0, -3.0, 0.5])  # the first and third have the same adapter

    def gradient(rows: torch.Tensor) -> torch.Tensor:
        gate = nn.functional.one_hot(TIMESTEPS[rows], ADAPTERS).float()[:, None].requires_grad_()
        trainee.gate.set(gate)
        (trainee(x[rows]).flatten(1).sum(1) * error[rows]).sum().backward()
        return gate.grad

    together = gradient(torch.arange(4))
    apart = torch.cat([gradient(torch.tensor([row])) for row in range(4)])
    assert torch.allclose(together, apart, atol=1e-5)
    assert not together[1].any()
    assert together[0].abs().sum() > 0
    assert not torch.allclose(together[0], together[2])


def test_trained_ranges_stay_on_the_lattice_and_belong_to_the_adapters_beside_the_weight():
    routing = RoutingTable(TABLE, ADAPTERS)
    for placement in KINDS:
        trainee, x, base = made(*LAYERS["3x3"], placement)
        with torch.no_grad():
            trainee.log_scale += torch.tensor([0.1, 0.2, 0.3])
            trainee.relative_zero_point *= 1.07
        layer = trainee.finish(torch.float16)
        owner = layer if placement == "merged" else layer.adapters
        unit = owner.input_scale * layer.input_format.step
        k = -owner.input_zero_point / unit
        assert k.shape == (ADAPTERS,)
        assert torch.allclose(k, k.round(), atol=1e-3)
        assert {round(value) for value in k.tolist()} <= set(layer.input_format.lattice)
        layer.check_stored()
        assert (layer.input_scale.ndim == 0) == (placement != "merged")
        assert torch.equal(layer.input_error, base.input_error)
        scales = [layer.route_by(routing) or layer.input_qparams(i).scale.item() for i in range(ADAPTERS)]
        assert scales == pytest.approx([base.input_scale.item() * factor for factor in (1.1052, 1.2214, 1.3499)], 1e-3)


def test_switching_adapters_allocates_nothing():
    trainee, *_ = made(*LAYERS["3x3"], "side")
    layer = trainee.finish(torch.float32)
    down, up = layer.adapters.pair(2)
    assert down.data_ptr() == layer.adapters.down[2].data_ptr()
    assert up.data_ptr() == layer.adapters.up[2].data_ptr()
    trainee, *_ = made(*LAYERS["3x3"], "merged")
    layer = trainee.finish(torch.float32)
    banks = layer.packed_bank(1)
    assert banks.data_ptr() == layer.packed_weight.data_ptr() + banks.numel()


def test_rank_is_scaled_down_for_narrow_layers():
    assert adapter_rank((320, 320, 3, 3), 32) == 32
    assert adapter_rank((64, 16, 3, 3), 32) == 8
    assert adapter_rank((1, 32, 3, 3), 32) == 1


def test_bad_input_is_refused():
    module, shape = LAYERS["linear"]
    trainee, *_ = made(module, shape, "side")
    with pytest.raises(ShapeError, match=r"`place` must have shape \(6, 8\), but got \(5, 8\)"):
        Trainee(trainee.layer, torch.zeros(5, 8), trainee.adapters, "side", Gate(), 0)
    trainee.adapters.up.data[0, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match="`place.adapters.up` must be finite"):
        trainee.adapters.check_values("place")
    merged, *_ = made(module, shape, "merged")
    merged.adapters.up.data[0, 0, 0] = float("inf")
    with pytest.raises(NonFiniteError):
        merged.finish(torch.float16)


def test_there_is_nothing_to_exchange_with_a_model_without_adapters(packed_pipe, tmp_path):
    for exchange in (export_adapter, import_adapter):
        with pytest.raises(StateError, match="must have timestep-aware adapters, but it has none"):
            exchange(packed_pipe.unet, 0, tmp_path / "out")
    assert not (tmp_path / "out").exists()

"""Adapters on a quantized model: settings of PEFT, dtypes, and training through the quantized base."""

import copy
import os
import subprocess
import sys
import warnings
from pathlib import Path

import kinds
import pytest
import torch
from kinds import Net, fingerprint, output, randomise, same
from peft import IA3Config, LNTuningConfig, LoraConfig, get_peft_model, inject_adapter_in_model
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from diffusers_msfp import MSFPConfig
from diffusers_msfp.layers import QuantLayer
from diffusers_msfp.plugin.files.saving import tensors_to_save

TARGETS = ["linear", "conv", "grouped", "split_conv", "split_linear"]
PROCESS = Path(__file__).with_name("ddp_process.py")


@pytest.fixture(scope="module")
def quantized() -> Net:
    return kinds.make_net()


@pytest.fixture
def pair(quantized) -> tuple[Net, Net]:
    """The quantized network and its dequantized twin."""
    return copy.deepcopy(quantized), copy.deepcopy(quantized).dequantize()


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-4) -> bool:
    return bool((a.float() - b.float()).norm() <= limit * b.float().norm())


def attached(pair: tuple[Net, Net], **settings) -> tuple[Net, Net]:
    for each in pair:
        torch.manual_seed(0)
        each.add_adapter(LoraConfig(**{"r": 4, "target_modules": TARGETS} | settings))
        randomise(each)
    return pair


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"conv": 8}, "alpha_pattern": {"linear": 32}},
        {"exclude_modules": ["grouped", "linear"]},
        {"use_rslora": True, "lora_bias": False},
        {"use_dora": True, "rank_pattern": {"linear": 2}},
        {"target_modules": "all-linear"},
    ],
)
def test_settings_of_peft(pair, settings):
    net, twin = attached(pair, **settings)
    assert close(output(net), output(twin))
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        name for name, p in twin.named_parameters() if p.requires_grad
    }


@pytest.mark.parametrize("inject", [False, True])
@pytest.mark.parametrize("saved", ["conv_in", "split_linear", "norm"])
def test_modules_to_save_are_float_copies(pair, inject, saved):
    before = fingerprint(pair[0])
    config = LoraConfig(r=4, target_modules=["linear"], modules_to_save=[saved])
    for each in pair:
        torch.manual_seed(0)
        inject_adapter_in_model(copy.deepcopy(config), each) if inject else each.add_adapter(copy.deepcopy(config))
    net, twin = pair
    assert close(output(net), output(twin))
    for each in pair:
        randomise(each)
    assert close(output(net), output(twin))
    trained = net.get_submodule(saved).modules_to_save["default"]
    assert not any(isinstance(module, QuantLayer) for module in trained.modules())
    assert all(parameter.requires_grad for parameter in trained.parameters())
    net(kinds.inputs()).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())
    left, right = (tensors_to_save(each, MSFPConfig()) for each in (net.state_dict(), before["tensors"]))
    assert left.keys() == right.keys()
    again = inject_adapter_in_model(config, kinds.make_net())
    set_peft_model_state_dict(again, get_peft_model_state_dict(net))
    assert torch.equal(output(again), output(net))


def test_copies_by_others_stay_packed(quantized):
    assert isinstance(copy.deepcopy(quantized.linear), QuantLayer)
    assert all(type(m) is type(n) for m, n in zip(quantized.modules(), copy.deepcopy(quantized).modules(), strict=True))


def test_fresh_ia3_is_the_identity(pair):
    net, _ = pair
    before = output(net)
    net.add_adapter(IA3Config(target_modules=TARGETS, feedforward_modules=["linear"]))
    assert torch.equal(output(net), before)


def test_norms_are_tuned_beside_quantized_layers(pair):
    for each in pair:
        each.add_adapter(LNTuningConfig(target_modules=["norm"]))
        randomise(each)
    net, twin = pair
    assert {name for name, p in net.named_parameters() if p.requires_grad} == {
        "norm.ln_tuning_layers.default.weight",
        "norm.ln_tuning_layers.default.bias",
    }
    assert close(output(net), output(twin))


def test_error_in_the_middle_puts_everything_back(pair):
    net, _ = pair
    net.add_adapter(LoraConfig(r=4, target_modules=["linear"]), adapter_name="first")
    before, plain = fingerprint(net), output(net)
    with pytest.raises(ValueError, match="groups=4 and rank 3"):
        net.add_adapter(LoraConfig(r=3, target_modules=["linear", "conv", "grouped"]), adapter_name="second")
    assert same(fingerprint(net), before)
    assert torch.equal(output(net), plain)
    net.add_adapter(LoraConfig(r=4, target_modules=["linear", "conv", "grouped"]), adapter_name="second")


# ── dtypes ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dtypes_are_those_of_a_float_base(scheme, dtype):
    net = kinds.make_net(scheme, dtype)
    pair = attached((net, copy.deepcopy(net).dequantize()), modules_to_save=["conv_out"])
    ours, theirs = ({n: p.dtype for n, p in each.named_parameters() if p.requires_grad} for each in pair)
    assert ours == theirs
    assert all(output(each, dtype).dtype == dtype for each in pair)
    wrapped = get_peft_model(kinds.make_net(scheme, dtype), LoraConfig(target_modules=["linear"]))
    assert {p.dtype for p in wrapped.parameters() if p.requires_grad} == {torch.float32}
    assert output(wrapped, dtype).dtype == dtype


@pytest.mark.parametrize("scheme", ["w4a16", "w4a4"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_dtypes_under_autocast(scheme, cast):
    net = kinds.make_net(scheme)
    pair = attached((net, copy.deepcopy(net).dequantize()))
    seen: list[dict[str, torch.dtype]] = []
    for each in pair:
        seen.append({})
        for name in [*TARGETS, "conv_in", "norm"]:
            each.get_submodule(name).register_forward_hook(
                lambda _, __, result, name=name, found=seen[-1]: found.update({name: result.dtype})
            )
        with torch.autocast("cpu", cast):
            assert output(each).dtype == cast
            loss = each(kinds.inputs()).float().square().mean()
        loss.backward()
        assert all(p.grad.dtype == torch.float32 for p in each.parameters() if p.requires_grad)
    assert seen[0] == seen[1]


# ── training ─────────────────────────────────────────────────────────────────────────────────────────────────


def train(net: nn.Module, steps: int = 3) -> list[float]:
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=0.05)
    losses = []
    for _ in range(steps):
        loss = (net(kinds.inputs()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("kind", ["LORA", "DoRA", "LOHA", "LOKR", "IA3", "OFT", "BOFT", "HRA"])
def test_training_goes_as_on_the_float_model_and_moves_adapters_alone(pair, kind):
    net, twin = pair
    for each in pair:
        torch.manual_seed(0)
        each.add_adapter(kinds.config_of(kind, "linear", target_modules=["linear", "conv", "split_conv"]))
        randomise(each)
    before = tensors_to_save(fingerprint(net)["tensors"], MSFPConfig())
    losses = train(net)
    assert losses[-1] < losses[0]
    assert losses == pytest.approx(train(twin), rel=1e-3)
    after = tensors_to_save(net.state_dict(), MSFPConfig())
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_training_after_a_preview_in_inference_mode(pair):
    net, twin = attached(pair)
    with torch.inference_mode():
        preview = net(kinds.inputs())
    assert close(preview, output(net))
    assert train(net) == pytest.approx(train(twin), rel=1e-3)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(pair, reentrant):
    net, twin = attached(pair)
    forward = net.split_linear.forward
    checkpoint = torch.utils.checkpoint.checkpoint
    net.split_linear.forward = lambda x: checkpoint(forward, x, use_reentrant=reentrant)
    assert train(net) == pytest.approx(train(twin), rel=1e-3)


@pytest.mark.slow
def test_two_processes_train_the_same_adapter(tmp_path, pair):
    """Each with half of the batch; gradients are the mean."""
    port = str(29100 + os.getpid() % 2000)
    launch = "-m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no"
    command = [sys.executable, *launch.split(), "--dynamo_backend", "no", "--main_process_port", port, str(PROCESS)]
    paths = os.pathsep.join([*sys.path, str(PROCESS.parent)])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    subprocess.run([*command, str(tmp_path / "two.pt")], env=environment, check=True, timeout=240)
    found = torch.load(tmp_path / "two.pt")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        net, _ = attached(pair)
    assert found["processes"] == 2
    assert found["losses"] == pytest.approx(train(net), rel=1e-4)
    expected = get_peft_model_state_dict(net)
    assert all(torch.allclose(found["adapter"][key], expected[key], atol=1e-6) for key in expected)

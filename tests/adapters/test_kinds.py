"""Every kind of adapter that PEFT has, on every kind of layer, attached in every way.

It works as on the float model, or it is refused when it is attached, and nothing is changed. What comes out stands in
this folder's README.
"""

import copy
import os
import warnings
from pathlib import Path

import kinds
import peft
import pytest
import torch
from kinds import ALL_KINDS, LAYERS, WAYS, Net, fingerprint, output, randomise, same
from peft.utils import get_peft_model_state_dict, set_peft_model_state_dict

from diffusers_msfp import MSFPConfig
from diffusers_msfp.plugin.files.saving import tensors_to_save

README = Path(__file__).parent / "README.md"
LETTERS = dict(zip(WAYS, "awlip", strict=True))
COLUMNS = {"linear": "linear", "conv": "convolution", "grouped": "grouped", "split_linear": "split linear"}
COLUMNS |= {"split_conv": "split convolution"}
METHODS = ("add_adapter", "load_lora_weights", "load_lora_adapter")
ROWS: dict[str, str] = {}


@pytest.fixture(scope="module")
def quantized() -> Net:
    return kinds.make_net()


@pytest.fixture(scope="module")
def twin(quantized) -> Net:
    return copy.deepcopy(quantized).dequantize()


@pytest.fixture(scope="module")
def coarse() -> list[Net]:
    """With quantized inputs."""
    return [kinds.make_net("w4a4"), kinds.make_net("w4a8")]


@pytest.fixture(autouse=True)
def _strict():
    """Memory that nobody filled is NaN."""
    torch.use_deterministic_algorithms(True)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    torch.use_deterministic_algorithms(False)


def attach(net: Net, way: str, config, name: str, state: dict):
    """The model with the adapter, or the error."""
    torch.manual_seed(len(name))
    try:
        return WAYS[way](net, copy.deepcopy(config), name, state)
    except Exception as error:  # noqa: BLE001 - PEFT's errors have no class in common
        return error


def call(net):
    """What it computes, or the error."""
    try:
        return output(net)
    except Exception as error:  # noqa: BLE001
        return error


def close(a: torch.Tensor, b: torch.Tensor, limit: float = 1e-4) -> bool:
    return bool((a - b).norm() <= limit * b.norm() + 1e-6)


def gradients(net) -> dict[str, torch.Tensor]:
    net.zero_grad()
    torch.manual_seed(0)
    net(kinds.inputs()).square().mean().backward()
    return {name: parameter.grad for name, parameter in net.named_parameters() if parameter.grad is not None}


def check_gradients(adapted, expected) -> None:
    """In the adapter only, and equal to the float model's."""
    trained = {name for name, parameter in adapted.named_parameters() if parameter.requires_grad}
    ours, theirs = gradients(adapted), gradients(expected)
    assert ours.keys() <= trained
    assert ours.keys() == theirs.keys()
    assert all(close(ours[name], theirs[name], 1e-2) for name in ours)


def check_several(net: Net, other: Net, way: str, config, state: dict) -> None:
    """Two adapters with weights, where the float model can."""
    outcomes = []
    for each in (net, other):
        error = attach(each, way, config, "bb", state)
        try:
            randomise(each, ".bb")
            each.set_adapters(["a", "bb"], [0.7, 0.4])
            outcomes.append(error if isinstance(error, Exception) else call(each))
        except Exception as refused:  # noqa: BLE001
            outcomes.append(refused)
    ours, theirs = outcomes
    assert isinstance(ours, Exception) == isinstance(theirs, Exception), outcomes
    assert isinstance(ours, Exception) or close(ours, theirs), (way, ours, theirs)


def reloads(net: Net, adapted, config, way: str) -> bool:
    """Whether a file of the adapter makes another model compute the same."""
    state = {key: value.clone() for key, value in get_peft_model_state_dict(adapted, adapter_name="a").items()}
    again = attach(copy.deepcopy(net), way, config, "a", {})
    set_peft_model_state_dict(again, state, "a")
    return close(output(again), output(adapted), 1e-5)


def check_unloads(adapted, net: Net, before: dict, plain: torch.Tensor) -> None:
    adapted.unload() if adapted is not net else net.unload_lora()
    assert same(fingerprint(net), before, trained=False)
    assert torch.equal(output(net), plain)


def at_layer(net: Net, layer: str, config, way: str) -> tuple[torch.Tensor, torch.Tensor, bool]:
    """What a layer gives without an adapter, and with a random one that may give it another input to read."""
    net, plain = copy.deepcopy(net), net.get_submodule(layer)
    attach(net, way, config, "a", {})
    randomise(net)
    size = plain.weight.shape[1] * getattr(plain, "groups", 1)
    shape = (4, size) if "linear" in layer else (2, size, 4, 4)
    x = torch.nn.functional.silu(torch.randn(shape, generator=torch.Generator().manual_seed(3)))
    torch.manual_seed(0)
    adapted, seen = net.get_submodule(layer), [x]
    adapted.base_layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        return plain(x), adapted(x), not torch.equal(seen[-1], x)


def check_coarse(net: Net, twin: Net, layer: str, config, way: str) -> None:
    """With a quantized input: the adapter adds what it adds to the float layer, up to the layer's own error.

    Less is asked of kinds such as OFT that give the layer another input than its range was measured for.
    """
    plain, adapted, turned = at_layer(net, layer, config, way)
    plain_float, adapted_float, _ = at_layer(twin, layer, config, way)
    limit = 1.5 * (plain - plain_float).norm() + (0.4 if turned else 0.05) * adapted_float.norm()
    assert torch.isfinite(adapted).all()
    assert (adapted - adapted_float).norm() < limit


def examine(way: str, kind: str, layer: str, config, state: dict, quantized: Net, twin: Net) -> str:
    """One way of one cell: `works`, `refused` (though the float model takes it), or "" (as the float model)."""
    net, other = copy.deepcopy(quantized), copy.deepcopy(twin)
    before, plain = fingerprint(net), output(quantized)
    adapted, expected = (attach(each, way, config, "a", state) for each in (net, other))
    if isinstance(adapted, Exception):
        assert same(fingerprint(net), before, trained=way in METHODS), (way, adapted)
        return "" if isinstance(expected, Exception) else "refused"
    assert not isinstance(expected, Exception), (way, expected)
    fresh, fresh_float = call(adapted), call(expected)
    assert isinstance(fresh, Exception) == isinstance(fresh_float, Exception), (way, fresh)
    if isinstance(fresh, Exception) or fresh_float.isnan().any():
        return ""
    assert close(fresh, fresh_float), way
    for each in (adapted, expected):
        randomise(each)
    assert close(output(adapted), output(expected)), way
    if torch.equal(output(adapted), plain):
        return ""
    check_gradients(adapted, expected)
    if way in ("add_adapter", "inject_adapter_in_model"):
        left, right = (tensors_to_save(each, MSFPConfig()) for each in (net.state_dict(), before["tensors"]))
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    if way in ("add_adapter", "get_peft_model"):
        assert reloads(quantized, adapted, config, way) or not reloads(twin, expected, config, way), way
    if way in METHODS:
        check_several(net, other, way, config, state)
    check_unloads(adapted, net, before, plain)
    return "works"


def cell(kind: str, layer: str, quantized: Net, twin: Net, coarse: list[Net]) -> str:
    config = kinds.config_of(kind, layer)
    state = kinds.adapter_state(twin, config)
    ways = [way for way in WAYS if state or not way.startswith("load_")]
    verdicts = {way: examine(way, kind, layer, config, state, quantized, twin) for way in ways}
    way = next((way for way in ("add_adapter", "get_peft_model") if verdicts[way] == "works"), None)
    for net in coarse if way else ():
        check_coarse(net, twin, layer, config, way)
    works = "".join(LETTERS[way] for way, verdict in verdicts.items() if verdict == "works")
    refused = "".join(LETTERS[way] for way, verdict in verdicts.items() if verdict == "refused")
    return " ".join([works] * bool(works) + [f"refused: {refused}"] * bool(refused)) or "–"


@pytest.mark.parametrize("kind", ALL_KINDS)
def test_works_as_on_the_float_model_or_is_refused(kind, quantized, twin, coarse):
    try:
        cells = [cell(kind, layer, quantized, twin, coarse) for layer in LAYERS]
    except ImportError:
        cells = ["needs a package that PEFT does not bring"]
    except kinds.NoConfig:
        cells = ["not for models like these"]
    cells += [""] * (len(LAYERS) - len(cells))
    ROWS[kind] = "| " + " | ".join([kind, *cells]) + " |"
    if not os.environ.get("MSFP_UPDATE_LISTS"):
        check_written(kind)


def check_written(kind: str) -> None:
    """Its row is the one that is written, with the PEFT that it was written with and where the kind can be tried."""
    text = README.read_text(encoding="utf-8")
    row = next((line for line in text.splitlines() if line.startswith(f"| {kind} |")), "")
    if f"PEFT {peft.__version__}." in text and "needs a package" not in row + ROWS[kind]:
        assert row == ROWS[kind]


def test_readme_is_what_the_tests_show():
    if os.environ.get("MSFP_UPDATE_LISTS"):
        assert list(ROWS) == ALL_KINDS, "run the whole file"
        README.write_text(written(), encoding="utf-8")
    head = written().partition("\nMade with")[0]
    assert README.read_text(encoding="utf-8").startswith(head)


def written() -> str:
    """The README as it should be, with the rows of the kinds that ran."""
    lines = [
        "# Adapters of every kind",
        "",
        "Every kind of adapter in PEFT's registry, on every kind of quantized layer. Letters are ways of attaching",
        "that work: `a` `model.add_adapter`, `w` `pipe.load_lora_weights`, `l` `model.load_lora_adapter`,",
        "`i` `peft.inject_adapter_in_model`, `p` `peft.get_peft_model`. *Works* is tested: outputs and gradients are",
        "those of the dequantized model within float error (with quantized inputs: up to the layer's own error; OFT",
        "turns the input, whose range was measured without it),",
        "several adapters with weights where the float model can, saving and loading, bit-exact unloading.",
        "",
        "Ways without a letter are refused when the adapter is attached, model and flags unchanged, as PEFT and",
        "diffusers refuse them for the float model, or they fail or do nothing when the model is called, as on the",
        "float model. `refused:` are those that the float model would take: GLoRA asks for exactly `torch.nn.Linear`.",
        "",
        "Errors in the middle of `a`, `w` and `l` put everything back. PEFT's own functions `i` and `p` never ask the",
        "model: where they accept one target and refuse a later one, what they have done stays, as on a float model.",
        "Nor do they know that parts of a split layer are none of their own: use `a` for `all-linear` there.",
        "",
        f"Made with PEFT {peft.__version__}.",
        "",
        "| kind | " + " | ".join(COLUMNS.values()) + " |",
        "| --- | " + " | ".join("---" for _ in COLUMNS) + " |",
    ]
    return "\n".join([*lines, *ROWS.values()]) + "\n"

"""What is chosen by measurement: exact whatever it is, kept on disk for this machine, and not at all where told so."""

import json
import os
from pathlib import Path

import pytest
import torch
from conftest import make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline
from torch import nn
from torch.nn import functional as F
from typer.testing import CliRunner

from diffusers_msfp import quantize_pipeline, set_engine
from diffusers_msfp.checkpoint.describe import describe_checkpoint
from diffusers_msfp.cli.app import app
from diffusers_msfp.compat.processor import instruction_sets, processor
from diffusers_msfp.compat.torch import has_bf16_instructions
from diffusers_msfp.engines import kernels, tuning
from diffusers_msfp.engines.choose import engines_of
from diffusers_msfp.engines.fusion import attention as attention_module
from diffusers_msfp.engines.fusion.norms import norm
from diffusers_msfp.engines.int8 import Int8Engine
from diffusers_msfp.engines.integers.layer import Int8Layer
from diffusers_msfp.engines.tuning import cache, measure
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.layers import QUANT_LAYERS
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.sampling.calls import drawing_from
from diffusers_msfp.schemes import SCHEMES

QUESTION = "layer 4x8 here"
STEADY = {"first": 2.0, "second": 1.0}


@pytest.fixture
def tuned(monkeypatch, tmp_path):
    """Tuning as users have it, with an empty cache of its own."""
    monkeypatch.setenv("MSFP_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    tuning.forget()
    yield tmp_path
    tuning.forget()


@pytest.fixture
def timed(monkeypatch):
    """Measurements are not taken but given: `timed(seconds, steady)`; without seconds, whatever the ways are."""

    def give(seconds=STEADY, steady=True):
        asked = []

        def time_ways(ways):
            asked.append(list(ways))
            return dict(seconds or {way: float(place) for place, way in enumerate(ways, 1)}), steady

        monkeypatch.setattr(measure, "time_ways", time_ways)
        return asked

    return give


def ask() -> str:
    return tuning.fastest(QUESTION, dict.fromkeys(STEADY, lambda: None))


# ── the cache ────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_measurement_serves_the_process_and_the_next(tuned, timed):
    asked = timed()
    assert [ask(), ask()] == ["second", "second"]
    assert len(asked) == 1
    tuning.store()
    tuning.forget()  # as a new process
    assert ask() == "second"
    assert len(asked) == 1
    assert tuning.measured("layer 4x8") == {QUESTION: STEADY}
    content = json.loads(cache.path().read_text())
    assert content["machine"] == cache.machine()
    assert {"processor", "instruction_sets", "onednn_limit", "threads", "torch"} <= content["machine"].keys()
    assert [file.suffix for file in cache.path().parent.iterdir()] == [".json"]


def test_a_noisy_measurement_is_not_stored(tuned, timed):
    asked = timed(steady=False)
    assert [ask(), ask()] == ["first", "first"]
    tuning.store()
    assert not cache.path().exists()
    tuning.forget()
    ask()
    assert len(asked) == 2


def test_a_noisy_measurement_counts_for_nothing(tuned, timed):
    timed({"first": 1.0, "second": 0.1}, steady=False)
    assert ask() == "first"
    tuning.forget()
    timed({"first": 1.0, "second": 0.8})
    assert ask() == "second"


@pytest.mark.parametrize(
    "damage",
    [
        lambda _: "",
        lambda text: text[: len(text) // 2],
        lambda _: "[" * 100_000,
        lambda _: "[]",
        lambda text: json.dumps(json.loads(text) | {"seconds": [1]}),
        lambda text: json.dumps(json.loads(text) | {"seconds": {QUESTION: {"first": "fast", "second": None}}}),
        lambda text: json.dumps(json.loads(text) | {"seconds": {QUESTION: {"first": 1.0}}}),
        lambda text: text.replace("2.0", "NaN"),
        lambda text: text.replace("2.0", "-2.0"),
        lambda text: json.dumps(json.loads(text) | {"machine": {"processor": "another one"}}),
    ],
    ids=["empty", "cut", "deep", "list", "no-table", "no-numbers", "other-ways", "nan", "negative", "other-processor"],
)
def test_a_damaged_or_foreign_file_is_left_out_of_account_and_written_anew(tuned, timed, damage):
    asked = timed()
    ask()
    tuning.store()
    whole = cache.path().read_text()
    cache.path().write_text(damage(whole))
    tuning.forget()
    assert ask() == "second"
    assert len(asked) == 2
    tuning.store()
    assert json.loads(cache.path().read_text()) == json.loads(whole)


def test_a_file_that_is_no_text_is_written_anew(tuned, timed):
    timed()
    cache.path().parent.mkdir(parents=True)
    cache.path().write_bytes(b"\xff\xfe\x00")
    assert ask() == "second"
    tuning.store()
    assert json.loads(cache.path().read_text())["seconds"] == {QUESTION: STEADY}


@pytest.mark.parametrize("key", ["processor", "instruction_sets", "onednn_limit", "threads", "torch", "diffusers_msfp"])
def test_other_machines_have_other_files(tuned, monkeypatch, key):
    own, machine = cache.path(), cache.machine()
    monkeypatch.setattr(cache, "machine", lambda: machine | {key: "another"})
    assert cache.path() != own


def test_two_processes_keep_what_both_have_measured(tuned, timed):
    timed()
    ask()
    cache.add({"of another process": STEADY})
    tuning.store()
    assert cache.read() == {QUESTION: STEADY, "of another process": STEADY}


def test_a_cache_that_cannot_be_written_is_done_without(tuned, timed, monkeypatch):
    timed()
    Path(tuned / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tuned / "file"))
    assert ask() == "second"
    tuning.store()


# ── the measurement ──────────────────────────────────────────────────────────────────────────────────────────────


def test_the_default_stays_where_another_is_hardly_faster():
    assert measure.choose("a", {"a": 1.0, "b": 0.96}) == "a"
    assert measure.choose("a", {"a": 1.0, "b": 0.9}) == "b"


def clock(monkeypatch, seconds: dict[str, list[float]]):
    """Ways that take so long, call by call, the last for ever; the first call is not timed."""
    now = [0.0]
    left = {name: list(times) for name, times in seconds.items()}
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])

    def way(name):
        def call():
            now[0] += left[name].pop(0) if len(left[name]) > 1 else left[name][0]

        return call

    return {name: way(name) for name in seconds}


def test_spread_tells_a_noisy_measurement(monkeypatch):
    assert measure.time_ways(clock(monkeypatch, {"a": [9, 1.0], "b": [9, 2.0]})) == ({"a": 1, "b": 2}, True)
    seconds, steady = measure.time_ways(clock(monkeypatch, {"a": [9, 1, 2, 2], "b": [9, 1.5]}))
    assert seconds == {"a": 1, "b": 1.5}
    assert not steady
    seconds, steady = measure.time_ways(clock(monkeypatch, {"a": [9, 1.25, 1.0], "b": [9, 1.125, 0.875]}))
    assert seconds == {"a": 1.0, "b": 0.875}
    assert not steady, "the other way did not win in every round"


def test_what_is_far_slower_is_not_measured_again(monkeypatch):
    calls = []
    ways = clock(monkeypatch, {"a": [1.0], "b": [30.0]})
    measure.time_ways({"a": ways["a"], "b": lambda: calls.append(1) or ways["b"]()})
    assert len(calls) == 2  # once before


# ── what is chosen from ──────────────────────────────────────────────────────────────────────────────────────────

LAYERS = {
    "few": (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 7)),
    "many": (nn.Conv2d(8, 12, 3, padding=1), (1, 8, 40, 40)),
    "stride": (nn.Conv2d(15, 7, 3, stride=2, bias=False), (1, 15, 9, 8)),
    "groups": (nn.Conv2d(16, 32, 3, padding=2, dilation=2, groups=4), (3, 16, 9, 9)),
    "pointwise": (nn.Conv2d(12, 20, 1), (2, 12, 6, 5)),
    "strided-pointwise": (nn.Conv2d(12, 20, 1, stride=2), (2, 12, 6, 5)),
    "flat": (nn.Conv1d(8, 12, 3, padding=1), (2, 8, 15)),
    "linear": (nn.Linear(33, 17), (4, 5, 33)),
}


@pytest.mark.parametrize("scheme", ["w4a4", "w4a8", "w8a8-wide"])
@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_every_way_gives_the_same_sums(name, scheme, monkeypatch):
    module, shape = LAYERS[name]
    layer = QUANT_LAYERS[type(module)].from_float(module, "place", SCHEMES[scheme].inner)
    layer(F.silu(torch.randn(shape) * 2))
    layer.freeze()
    x, outputs = F.silu(torch.randn(shape) * 2), {}

    def all_ways(self, codes, dtype, compute):
        ways = self.ways(codes, dtype)
        for way in ways:
            outputs[dtype, way] = compute(way)
        return compute(ways[0])

    layer.use_engine(None)
    reference = layer(x)
    if Int8Engine().refusal(layer) is not None:
        assert scheme == "w8a8-wide"  # on processors that add pairs of products in 16 bits
        return
    monkeypatch.setattr(Int8Layer, "by_fastest", all_ways)
    layer.use_engine(Int8Engine())
    for dtype in (torch.float32, torch.bfloat16):
        default = layer(x.to(dtype))
        for way in [way for of, way in outputs if of == dtype]:
            y = outputs[dtype, way].view(default.shape)
            apart = ((y - default).float().norm() / default.float().norm()).item()
            if way == "bfloat16":  # its sums are the same, but rounded once more
                assert apart <= 4e-3
            elif "amx_int8" in instruction_sets():  # some of whose kernels add the bias unrounded
                assert apart <= (1e-3 if dtype == torch.bfloat16 else 2**-22), way
            else:
                assert torch.equal(y, default), way
    assert (layer(x) - reference).norm() <= 1e-5 * reference.norm()
    names = {way for _, way in outputs}
    few = name == "groups" or scheme == "w8a8-wide" or (name == "linear" and not has_bf16_instructions())
    assert len(names) > 1 or few


@torch.no_grad()
def test_sums_in_bfloat16_are_whole_numbers(monkeypatch):
    """The integers that are rounded to bfloat16 are those of 8-bit products, bit for bit."""
    layer = QUANT_LAYERS[nn.Linear].from_float(nn.Linear(512, 32, bias=False), "place", SCHEMES["w4a8"].inner)
    x = torch.randn(64, 512)
    layer(x)
    layer.freeze()
    layer.use_engine(Int8Engine())
    layer.prepare()
    made = layer.prepared
    (codes,) = made.codes(x, 0)
    zero = made.grid().planes[0][1]
    assert made.in_bfloat16([codes], torch.bfloat16) or not torch.ops.mkldnn._is_mkldnn_bf16_supported()
    exact = (codes.long() - zero) @ made.integers(0)[0].long().T
    products = F.linear(codes.to(torch.bfloat16).sub_(zero), made.expand(0, "bfloat16")[0])
    assert torch.equal(products, exact.to(torch.bfloat16))


@torch.no_grad()
def test_both_norms_give_the_same_codes(packed_pipe):
    layer = packed_pipe.unet.down_blocks[0].resnets[0].conv1
    set_engine(packed_pipe, "auto")
    grid = layer.prepared.grid()
    x = torch.randn(2, 32, 8, 8).contiguous(memory_format=torch.channels_last)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = x.to(dtype), 8, torch.rand(32), torch.randn(32), 1e-5, True, grid, torch.randn(2, 32)
        (one, _), (passes, _) = kernels.norm(*arguments), kernels.norm_in_passes(*arguments)
        assert one.stride() == passes.stride()
        assert (one != passes).float().mean() < 1e-3  # statistics in another order: a value on a border
        assert torch.equal(norm(*arguments)[0], one)


@torch.no_grad()
def test_both_attentions_agree():
    query, key, value = torch.randn(3, 2, 3, 200, 16).bfloat16()
    expected = F.scaled_dot_product_attention(query.double(), key.double(), value.double())
    for way in (attention_module.by_rows, F.scaled_dot_product_attention):
        assert (way(query, key, value) - expected).norm() < 0.02 * expected.norm()


# ── models ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_model_measures_once_and_stores_at_the_end_of_the_call(tuned, timed, packed_pipe, images):
    asked = timed(seconds=None)
    set_engine(packed_pipe, "auto")
    y = run(packed_pipe.unet, images)
    found = tuning.measured()
    assert {question.split()[0] for question in found} == {"layer", "norm"}
    assert all(len(ways) > 1 for ways in found.values())
    assert torch.equal(run(packed_pipe.unet, images), y)
    assert tuning.measured() == found
    assert len(asked) == len(found)
    assert cache.read() == found


def test_inspection_and_benchmarks_show_the_times(tuned, packed_dir):
    unet = DDPMPipeline.from_pretrained(packed_dir).unet
    run(unet, torch.randn(2, 3, 8, 8))
    name, layer = next((n, each) for n, each in quant_layers(unet) if n.endswith("resnets.0.conv1"))
    shown = {each.name: each.measured for each in describe_checkpoint(f"{packed_dir}/unet").components["."].layers}
    (question,) = shown[name]
    assert question.startswith("fast kernel 3x3 stride 1x1 padding 1x1 dilation 1x1 groups 1 2x")
    assert set(shown[name][question]) == {"convolution", "columns"}
    result = CliRunner().invoke(app, ["inspect", f"{packed_dir}/unet"])
    times = next(line for line in result.stdout.splitlines() if line.startswith(f"{name}, measured for {question}: "))
    assert {"columns", "convolution"} <= set(times.split())
    result = CliRunner().invoke(app, ["bench", "--model", packed_dir, "--repeats", "2"])
    assert result.exit_code == 0, result.output
    assert "convolution" in result.stdout
    assert processor() in result.stdout


def test_attention_of_bfloat16_models_is_measured(tuned):
    query = torch.randn(1, 2, 64, 8).bfloat16()
    attention_module.attention(query, query, query)
    (question,) = tuning.measured("attention")
    assert question == "attention 1x2x64x8 bfloat16 tokens 64"
    assert set(tuning.measured()[question]) == {"torch", "rows"}


def test_turned_off_the_choice_and_the_results_are_always_the_same(packed_pipe, images, monkeypatch):
    monkeypatch.setattr(measure, "time_ways", lambda _: pytest.fail("measured"))
    results = []
    for _ in range(2):
        set_engine(packed_pipe, "auto")
        results.append(run(packed_pipe.unet, images))
    assert torch.equal(*results)
    float_pipe = DDPMPipeline(make_unet(), DDIMScheduler())
    monkeypatch.setenv("MSFP_AUTOTUNE", "yes")
    before = engines_of(packed_pipe.unet)
    for change in (lambda: set_engine(packed_pipe, "bf16"), lambda: quantize_pipeline(float_pipe, "w4a16")):
        with pytest.raises(ConfigError, match="MSFP_AUTOTUNE must be 1 .* or 0, but got 'yes'"):
            change()
    assert engines_of(packed_pipe.unet) == before
    assert not list(quant_layers(float_pipe.unet))


def test_what_is_drawn_from_a_seed_takes_the_default(tuned, packed_pipe, images, monkeypatch):
    monkeypatch.setenv("MSFP_AUTOTUNE", "0")
    set_engine(packed_pipe, "auto")
    expected = run(packed_pipe.unet, images)
    monkeypatch.setenv("MSFP_AUTOTUNE", "1")
    set_engine(packed_pipe, "auto")
    monkeypatch.setattr(measure, "time_ways", lambda _: pytest.fail("measured"))
    with drawing_from(0):
        assert torch.equal(run(packed_pipe.unet, images), expected)
    assert not tuning.measured()


def test_weights_of_ways_that_lost_are_not_kept(tuned, timed):
    layer = QUANT_LAYERS[nn.Conv2d].from_float(nn.Conv2d(8, 8, 3, padding=1), "place", SCHEMES["w4a4"].inner)
    with torch.no_grad():
        layer(torch.randn(1, 8, 6, 6))
        layer.freeze()
        layer.use_engine(Int8Engine())
        timed({"columns": 2.0, "convolution": 1.0})
        layer(torch.randn(1, 8, 6, 6))
        layer(torch.randn(1, 8, 6, 6))
    assert {way for _, way in layer.prepared._weights} == {"convolution"}


def test_the_variable_is_set_for_all_tests():
    assert os.environ["MSFP_AUTOTUNE"] == "0"

"""Benchmarks: what they compare, in what order, and what they refuse."""

import copy
import json

import pytest
import torch
from conftest import make_condition_unet, make_dit, make_unet, make_vae
from typer.testing import CliRunner

from diffusers_msfp import FinetuneConfig, cli, finetune, quantize_pipeline
from diffusers_msfp.cli.app import app
from diffusers_msfp.compat.processor import instruction_sets, processor
from diffusers_msfp.errors import ConfigError, MSFPError, UnsupportedError
from diffusers_msfp.evaluation.timing import peers, providers, speed
from diffusers_msfp.evaluation.timing.floor import floor_of
from diffusers_msfp.evaluation.timing.providers import BASELINE, provide
from diffusers_msfp.evaluation.timing.shapes import SHAPES
from diffusers_msfp.evaluation.timing.speed import benchmark, example_inputs, step_of, take_turns
from diffusers_msfp.layers.convert import quant_layers
from diffusers_msfp.methods.talora import AdapterBank


def test_calls_take_turns_after_a_warm_up():
    order = []
    seconds = take_turns({name: lambda name=name: order.append(name) for name in "abc"}, repeats=3, warmup=1)
    assert order == list("abc" * 4)
    assert {name: len(times) for name, times in seconds.items()} == dict.fromkeys("abc", 3)


@pytest.mark.parametrize("build", [make_unet, make_condition_unet, make_dit], ids=["unet", "condition", "dit"])
def test_rows_of_a_benchmark(build):
    rows = {row.provider: row for row in benchmark(build().eval(), ["fp32", "w4a4", "w4a4:low"], repeats=2)}
    assert list(rows) == [BASELINE, "fp32", "w4a4", "w4a4:low"]
    assert rows[BASELINE].speedup == 1
    assert rows["fp32"].engines == {}
    assert rows["fp32"].floor_seconds is None
    assert "floor_seconds" not in rows["fp32"].to_dict()
    for name in ("w4a4", "w4a4:low"):
        row = rows[name]
        assert row.engines["int8"] > row.engines.get("bf16", 0)
        assert row.seconds_low <= row.seconds <= row.seconds_high
        assert row.floor_seconds == pytest.approx(sum(row.floor_parts.values()))
        assert all(part > 0 for part in row.floor_parts.values())


def test_providers_are_what_their_names_say():
    model = make_unet()
    call = lambda each: step_of(each, example_inputs(each, 1))()  # noqa: E731
    dtypes = {name: provide(name, model, call).dtype for name in ("fp32", "fp32:cl", "bf16", "w4a4", "w4a4:fp32")}
    assert list(dtypes.values()) == [torch.float32, torch.float32, torch.bfloat16, torch.bfloat16, torch.float32]
    assert provide("bf16:cl", model, call).conv_in.weight.is_contiguous(memory_format=torch.channels_last)
    assert model.dtype == torch.float32
    for name, message in (
        ("fp16", "A provider must be one of fp32, bf16, msfp, w4a4"),
        ("bf16:cll", "Options of `bf16:cll` may be cl, but got 'cll'"),
        ("w4a4:hot", "Options of `w4a4` may be .*low.*, but got 'hot'"),
    ):
        with pytest.raises(ConfigError, match=message):
            provide(name, model, call)


@pytest.mark.parametrize("placement", ["merged", "side"])
def test_a_model_with_adapters_is_compared_with_its_architecture(embedded, placement):
    pipe = copy.deepcopy(embedded)
    quantize_pipeline(pipe, "w4a4", num_samples=1, num_inference_steps=2)
    finetune(pipe, embedded, FinetuneConfig(train_steps=1, batch_size=2, num_inference_steps=2, placement=placement))
    rows = {row.provider: row for row in benchmark(pipe.unet, ["msfp"], repeats=2)}
    assert list(rows) == [BASELINE, "msfp"]
    made = provide("fp32", pipe.unet, step_of)
    assert {n: p.shape for n, p in made.named_parameters()} == {n: p.shape for n, p in embedded.unet.named_parameters()}
    assert "quantization_config" not in made.config


def test_the_floor_is_that_of_the_model_without_adapters(packed_pipe, tiny_pipe, monkeypatch):
    few = {"train_steps": 1, "batch_size": 2, "num_inference_steps": 2}
    finetune(packed_pipe, tiny_pipe, FinetuneConfig(rank=2, reads="float", **few))
    model, calls, forward = packed_pipe.unet, [], AdapterBank.forward
    monkeypatch.setattr(AdapterBank, "forward", lambda *args: calls.append(1) or forward(*args))
    step = step_of(model, example_inputs(model, 1))
    step()
    assert calls
    calls.clear()
    assert floor_of(model, step).total > 0
    assert not calls
    step()
    assert calls, "afterwards they are in use again"
    model.timestep_router.enabled = False
    floor_of(model, step)
    assert model.timestep_router.enabled is False


def test_a_scheme_s_name_means_that_scheme(packed_pipe):
    def bits(name: str) -> set[int]:
        made = provide(name, packed_pipe.unet, lambda each: step_of(each, example_inputs(each, 1))())
        return {layer.weight_format.bits for _, layer in quant_layers(made)}

    assert 4 in bits("msfp")
    assert bits("w8a8") == {8}
    with pytest.raises(ConfigError, match="quantized already and is timed as it is"):
        bits("msfp:fp32")


def test_several_steps_are_timed_as_one():
    seen = []

    class Model(torch.nn.Linear):
        def forward(self, sample, timestep):
            seen.append(timestep.tolist())

    step_of(Model(1, 1), {"sample": torch.zeros(2, 1), "timestep": torch.full((2,), 500)}, num_inference_steps=4)()
    assert seen == [[874, 874], [749, 749], [624, 624], [500, 500]]
    rows = benchmark(make_unet(), ["w4a4"], num_inference_steps=3, repeats=2, with_floor=False)
    assert [row.num_inference_steps for row in rows] == [3, 3]


def test_missing_peers_are_refused_or_left_out(monkeypatch):
    monkeypatch.setitem(providers.PEERS, "sdnq", "no_such_module")
    with pytest.raises(UnsupportedError, match="Provider 'sdnq' needs `no_such_module`, which is not installed"):
        benchmark(make_unet(), ["sdnq:int8"], repeats=2)
    rows = benchmark(make_unet(), ["sdnq:int8"], repeats=2, skip_missing=True)
    assert [row.provider for row in rows] == [BASELINE]


@pytest.mark.parametrize("provider", ["openvino:bf16", "openvino:int8", "onnxruntime:int8"])
def test_runtimes_that_are_not_installed_are_named(provider, monkeypatch, caplog):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda _: None)
    needed = provider.partition(":")[0]
    with pytest.raises(UnsupportedError, match=f"Provider .* needs `{needed}`, which is not installed: leave it out"):
        benchmark(make_unet(), [provider], repeats=2)
    rows = benchmark(make_unet(), [provider], repeats=2, skip_missing=True)
    assert [row.provider for row in rows] == [BASELINE]
    assert f"{provider} is left out: " in caplog.text


def test_options_of_runtimes_are_checked(monkeypatch):
    monkeypatch.setattr(peers.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(ConfigError, match="Options of `openvino` may be bf16, fp32, int8, but got 'int4'"):
        provide("openvino:int4", make_unet(), lambda _: None)


def test_a_graph_is_made_once_for_the_inputs_of_the_first_call():
    made = []

    class Doubled(peers.GraphPeer):
        def compiled(self, model, inputs):
            made.append(list(inputs))
            return lambda given: 2 * model(*given.values())

    class Model(torch.nn.Linear):
        def forward(self, sample, timestep, return_dict):
            return (sample + timestep,)

    peer = Doubled(Model(1, 1), "int8")
    step = step_of(peer, {"sample": torch.ones(2, 1), "timestep": torch.full((2, 1), 3)})
    assert [step().tolist(), step().tolist()] == [[[8.0], [8.0]]] * 2
    assert made == [["sample", "timestep"]]


def test_rows_say_where_and_how_they_were_timed(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "passive")
    monkeypatch.setattr(speed, "instruction_limit", lambda: "AVX2")
    row = benchmark(make_unet(), ["fp32"], repeats=2)[1].to_dict()
    assert row["processor"] == processor()
    assert row["instruction_sets"] == list(instruction_sets())
    assert row["openmp"]["OMP_WAIT_POLICY"] == "passive"
    assert row["onednn_limit"] == "AVX2"
    monkeypatch.setattr(speed, "instruction_limit", str)
    assert "onednn_limit" not in benchmark(make_unet(), ["fp32"], repeats=2)[1].to_dict()


def test_schemes_are_timed_with_the_formats_that_residual_sums_get():
    model = provide("w4a4", make_unet(), lambda each: step_of(each, example_inputs(each, 1))())
    bits = {layer.input_format.bits for _, layer in quant_layers(model) if layer.input_format is not None}
    assert bits == {4, 8}


def test_models_whose_inputs_are_unknown_are_refused():
    with pytest.raises(UnsupportedError, match="but got AutoencoderKL"):
        benchmark(make_vae(), ["fp32"], repeats=2)


def test_the_command_line(packed_dir):
    result = CliRunner().invoke(app, ["bench", "--model", packed_dir, "--repeats", "2", "--json"])
    assert result.exit_code == 0, result.output
    rows = json.loads(result.stdout)["rows"]
    assert [row["provider"] for row in rows] == [BASELINE, "msfp"]
    alone = cli.bench(f"{packed_dir}/unet", ["msfp:reference"], repeats=2)
    assert set(alone.rows[1].engines) == {"reference"}
    table = CliRunner().invoke(app, ["bench", "--model", packed_dir, "--repeats", "2"])
    assert "int8" in table.stdout
    with pytest.raises(MSFPError, match="no/such/place must be a folder, a file or a Hub id"):
        cli.bench("no/such/place")


def test_kernels_are_compiled_ahead():
    result = CliRunner().invoke(app, ["warmup", "--json"])
    assert result.exit_code == 0, result.output
    made = json.loads(result.stdout)
    assert made["kernels"] == "numba"
    compiled = {kernel.partition(",")[0] for kernel in made["seconds_by_kernel"]}
    assert {"quantize", "norm and quantize", "columns", "softmax", "expand to int8"} <= compiled
    assert made["seconds"] == pytest.approx(sum(made["seconds_by_kernel"].values()))
    again = CliRunner().invoke(app, ["warmup"])
    assert f"{len(made['seconds_by_kernel'])} kernels of numba are ready" in again.stdout


def test_shapes_are_what_people_use():
    with torch.device("meta"):
        parameters = {name: build().num_parameters() for name, build in SHAPES.items()}
    assert parameters == {"ddpm-cifar10": 35746307, "sd15": 859520964}


def test_sizes_that_are_no_single_number():
    assert example_inputs(make_unet(sample_size=[8, 16]), 1)["sample"].shape[2:] == (8, 16)
    assert example_inputs(make_unet(sample_size=None), 1, 8)["sample"].shape[2:] == (8, 8)
    with pytest.raises(UnsupportedError, match="`sample_size` of this UNet2DModel is None. Name one"):
        example_inputs(make_unet(sample_size=None), 1)
    model = make_condition_unet()
    model.register_to_config(cross_attention_dim=[16, 16])
    with pytest.raises(UnsupportedError, match="needs to know a model's inputs"):
        example_inputs(model, 1)

"""Plans for a small untrained UNet: budgets are kept, plans are reproducible, other files are refused."""

import copy
import json
import math
from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from conftest import ONE_BLOCK, make_unet, run
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel

from diffusers_msfp import MSFPConfig, quantize_pipeline
from diffusers_msfp.budget import BudgetPlan, plan_budget
from diffusers_msfp.budget.plan import CLOSE_DB, MAX_RUNS, for_psnr
from diffusers_msfp.budget.record import PLAN_FILE, _checksum, stored_plan
from diffusers_msfp.budget.table import Table
from diffusers_msfp.checkpoint.describe import file_bytes
from diffusers_msfp.errors import CheckpointError, ConfigError
from diffusers_msfp.layers.convert import layers_by_name

FEW = {"num_samples": 1, "num_inference_steps": 2, "num_calibration": 1, "num_pictures": 2, "choices": ("w4a8", "w8a8")}


def make_pipe() -> DDPMPipeline:
    return DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler())


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def least(work) -> int:
    """Bytes of the smallest choice, as the refusal of a smaller target says it."""
    with pytest.raises(ConfigError, match="must be at least") as refusal:
        plan_budget(make_pipe(), target_bytes=1, work_dir=work, **FEW)
    return int(str(refusal.value).split("at least ")[1].split(" bytes")[0].replace(",", ""))


@pytest.fixture(scope="module")
def plan(work, least) -> BudgetPlan:
    """Between 4 and 8 bits."""
    return plan_budget(make_pipe(), target_bytes=1.07 * least, work_dir=work, **FEW)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_what_is_saved_has_the_plans_schemes_and_never_more_bytes(plan, tmp_path, dtype):
    pipe = make_pipe()
    if dtype == torch.float16:
        pipe = pipe.to(dtype)
    quantize_pipeline(pipe, plan.config(pipe), num_samples=2, num_inference_steps=3)
    x = torch.randn(1, 3, 8, 8)
    expected = run(pipe.unet, x.to(dtype), 3)
    pipe.save_pretrained(tmp_path)
    assert file_bytes(tmp_path / "unet") <= plan.bytes <= plan.target_value
    if dtype == torch.float32:
        assert plan.bytes - file_bytes(tmp_path / "unet") < 0.02 * plan.bytes
    again = UNet2DModel.from_pretrained(tmp_path / "unet", torch_dtype=dtype)
    bits = {name: layer.weight_format.bits for name, layer in layers_by_name(again).items()}
    assert bits == {layer.name: int(layer.scheme[1]) for layer in plan.layers}
    assert len(set(bits.values())) > 1
    assert again.conv_in.input_format is None
    assert torch.equal(run(again, x.to(dtype), 3), expected)


def test_a_plan_is_reproducible_and_goes_on_where_it_was(plan, work, tmp_path):
    file = work / "sensitivities.jsonl"
    kept = file.read_text()
    seen = []
    again = plan_budget(
        make_pipe(),
        target_bytes=plan.target_value,
        work_dir=work,
        on_progress=lambda *_, **info: seen.append(info),
        **FEW,
    )
    assert replace(again, seconds=0) == replace(plan, seconds=0)
    assert file.read_text() == kept
    assert {"ranges", "errors"} <= {info["stage"] for info in seen}
    (tmp_path / "sensitivities.jsonl").write_text(kept[: len(kept) // 2])
    pipe = make_pipe()
    before = copy.deepcopy(pipe.unet.state_dict())
    resumed = plan_budget(pipe, target_bytes=plan.target_value, work_dir=tmp_path, **FEW)
    assert resumed.layers == plan.layers
    assert (tmp_path / "sensitivities.jsonl").read_text() == kept
    after = pipe.unet.state_dict()  # the pipeline is as it was
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not layers_by_name(pipe.unet)


def test_more_bytes_never_cost_more(plan):
    errors = [point.error for point in plan.front]
    sizes = [point.bytes for point in plan.front]
    assert sizes == sorted(sizes)
    assert errors == sorted(errors, reverse=True)
    assert plan.error_bound <= plan.error
    assert all(sum(point.bits.values()) == len(plan.layers) for point in plan.front)


def test_a_target_for_psnr_is_met_with_few_bytes_or_refused_with_the_nearest(work):
    with pytest.raises(ConfigError, match="can be at most .* dB") as refusal:
        plan_budget(make_pipe(), target_psnr=150, work_dir=work, **FEW)
    best = float(str(refusal.value).split("at most ")[1].split(" dB")[0])
    found = plan_budget(make_pipe(), target_psnr=best - 4, work_dir=work, **FEW)
    assert found.psnr_db >= best - 4.1
    assert found.bytes < max(point.bytes for point in found.front)
    assert len(found.runs) >= 3


def test_a_target_for_psnr_is_looked_for_until_a_run_is_near_it():
    """Pictures are chaotic: what has less error may look worse."""
    layers = [f"layer{i}" for i in range(40)]
    errors = {name: {"w4a8": 1e-4 * (1 + i), "w8a8": 1e-6} for i, name in enumerate(layers)}
    table = Table(errors, {name: {"w4a8": 50, "w8a8": 100} for name in layers}, 0)
    runs: list[tuple[float, float]] = []

    def psnr(choice: Mapping[str, str]) -> float:
        worse = {2: 4.0, 3: 6.0, 4: 8.0}.get(len(runs), 0.0)
        return -10 * math.log10(table.sums(choice)[1]) - worse

    found = table.choice(for_psnr(table, 20.0, psnr, runs).options)
    assert all(psnr < 20 - CLOSE_DB for _, psnr in runs[2:MAX_RUNS]), "none of the usual number of runs meets it"
    assert MAX_RUNS < len(runs) <= 2 * MAX_RUNS
    assert table.sums(found)[0] < 100 * len(layers), "not the largest"


@pytest.mark.parametrize("low", [40.1, 38.24])
def test_the_smallest_choice_is_taken_where_it_was_sampled_and_meets_the_target(low):
    """Also where more bytes looked worse, or it is below the target by less than counts."""
    table = Table({n: {"w4a8": 1e-4, "w8a8": 1e-6} for n in "ab"}, {n: {"w4a8": 50, "w8a8": 100} for n in "ab"}, 0)
    runs: list[tuple[float, float]] = []
    smallest = {"a": "w4a8", "b": "w4a8"}
    found = for_psnr(table, low + 0.5 * CLOSE_DB, lambda choice: low if choice == smallest else 40.0, runs)
    assert table.choice(found.options) == smallest
    assert len(runs) == 2


def test_a_target_for_a_step_is_kept_or_refused_with_the_nearest():
    few = FEW | {"choices": ("w4a4", "w4a8", "w8a16")}
    found = plan_budget(make_pipe(), target_step=10.0, **few)
    assert 0 < found.step_seconds <= 10
    assert all(option.seconds is not None for layer in found.layers for option in layer.options)
    read = {option.scheme for layer in found.layers for option in layer.options}
    assert read == {"w4a4", "w4a8", "w8a16", "w4a16"}  # the last is conv_in's
    table = Table({"a": {"w4a8": 0.1}}, {"a": {"w4a8": 9}}, 10, {"a": {"w4a8": 0.003}}, 0.001)
    with pytest.raises(ConfigError, match="must be at least 4 ms"):
        table.least_error("step", 0.002)


def test_a_stored_plan_is_the_same(plan, tmp_path):
    plan.write(tmp_path / "plan.json")
    assert BudgetPlan.read(tmp_path / "plan.json") == plan
    layer = plan.layers[0]
    assert all(other.scheme in layer.reason for other in layer.options if other.scheme != layer.scheme)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda _: "{", "cannot be read"),
        (lambda _: "[]", "something else"),
        (lambda content: json.dumps(content | {"version": 2}), "version 1, but it has 2"),
        (lambda content: json.dumps(content | {"bytes": 1}), "checksum"),
        (lambda _: json.dumps({"version": 1}), "something else"),
        (lambda content: forged({key: content[key] for key in content if key != "front"}), "malformed"),
        (lambda content: forged(content | {"layers": [3]}), "malformed"),
        (lambda content: forged(content | {"target": []}), "malformed|target"),
        (lambda _: "[" * 100_000, "cannot be read"),
    ],
)
def test_a_damaged_or_foreign_file_is_refused(plan, tmp_path, change, match):
    file = tmp_path / "plan.json"
    file.write_text(change(plan.to_dict()))
    with pytest.raises(CheckpointError, match=match):
        BudgetPlan.read(file)
    with pytest.raises(CheckpointError, match="cannot be read"):
        BudgetPlan.read(tmp_path / "none.json")


def forged(content: dict) -> str:
    """With a checksum that fits, as anybody can compute it."""
    content = {key: value for key, value in content.items() if key != "checksum"}
    return json.dumps(content | {"checksum": _checksum(content)})


def test_a_plan_beside_another_checkpoint_is_not_its_own(plan, tmp_path):
    for name, config in (("own", plan.config(make_unet(**ONE_BLOCK))), ("other", MSFPConfig("w8a8"))):
        pipe = DDPMPipeline(make_unet(**ONE_BLOCK), DDIMScheduler())
        quantize_pipeline(pipe, config, num_samples=1, num_inference_steps=2).save_pretrained(tmp_path / name)
        plan.write(tmp_path / name / PLAN_FILE)
        assert (stored_plan(tmp_path / name) is None) == (name == "other")
        plan.write(tmp_path / name / "unet" / PLAN_FILE)  # of a model on its own
        assert (stored_plan(tmp_path / name / "unet") is None) == (name == "other")


def test_a_plan_serves_its_architecture_alone(plan):
    with pytest.raises(ConfigError, match="architecture that it was made for"):
        plan.config(make_unet())
    assert plan.config(make_unet(**ONE_BLOCK)).scheme_overrides == plan.scheme_overrides


def test_a_plan_whose_names_are_parts_of_each_other_is_exact(plan):
    options = plan.layers[0].options
    layers = [
        replace(plan.layers[0], name=name, scheme=options[i % len(options)].scheme, options=options)
        for i, name in enumerate(("blocks.1.conv", "down.blocks.1.conv", "down.blocks.1.conv.0", "conv"))
    ]
    made = replace(plan, layers=tuple(layers))
    assert list(made.scheme_overrides) == ["conv", "blocks.1.conv", "down.blocks.1.conv", "down.blocks.1.conv.0"]


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({}, "one target"),
        ({"target_bytes": 1e6, "target_psnr": 30}, "one target"),
        ({"target_bytes": -1}, "above 0"),
        ({"target_psnr": float("nan")}, "above 0"),
        ({"target_bytes": 1e6, "choices": ("w4a8",)}, "at least two"),
        ({"target_bytes": 1e6, "choices": ("w4a8", "w5a8")}, "w5a8"),
        ({"target_bytes": 1e6, "num_samples": 0}, "num_samples"),
        ({"target_bytes": 1e6, "num_pictures": 0}, "num_pictures"),
    ],
)
def test_arguments_that_make_no_sense_are_refused(arguments, match):
    with pytest.raises(ConfigError, match=match) if "w5a8" not in match else pytest.raises(ValueError, match=match):
        plan_budget(make_pipe(), **arguments)


def test_other_pipelines_are_refused(packed_pipe):
    with pytest.raises(ConfigError, match="is quantized"):
        plan_budget(packed_pipe, target_bytes=1e6)
    with pytest.raises(ConfigError, match="alone"):
        plan_budget(make_unet(), target_bytes=1e6)


def test_a_planned_checkpoint_loads_with_its_pipeline(plan, tmp_path):
    pipe = make_pipe()
    quantize_pipeline(pipe, plan.config(pipe), num_samples=2, num_inference_steps=3)
    pipe.save_pretrained(tmp_path)
    again = DiffusionPipeline.from_pretrained(tmp_path)
    assert again.unet.config.quantization_config.scheme_overrides == plan.scheme_overrides

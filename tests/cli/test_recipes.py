"""Recipes: stages in order, resumed stage by stage, and refused where they make no sense."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import equal_state, make_unet
from diffusers import DDIMScheduler, DDPMPipeline, DiffusionPipeline
from typer.testing import CliRunner

from diffusers_msfp import cli
from diffusers_msfp.checkpoint.journal import Journal
from diffusers_msfp.checkpoint.record import ModelRecord
from diffusers_msfp.cli.app import app
from diffusers_msfp.errors import ConfigError, NonFiniteError
from diffusers_msfp.methods import METHODS
from diffusers_msfp.plugin import recipe as recipes
from diffusers_msfp.plugin.recipe import RecipeRun, plan_stages
from diffusers_msfp.recipes import RECIPES

FAST = {"num_samples": 2, "num_inference_steps": 2}
SETTINGS = {
    "temporal": {"iterations": 2},
    "rounding": {"iterations": 2, "num_samples": 4, "batch_size": 2},
    "talora": {"train_steps": 2, "batch_size": 2, "rank": 2},
}


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float") / "pipe"
    DDPMPipeline(
        make_unet(
            block_out_channels=(16,),
            down_block_types=("DownBlock2D",),
            up_block_types=("UpBlock2D",),
            add_attention=False,
        ),
        DDIMScheduler(),
    ).save_pretrained(folder)
    return folder


def test_every_recipe_has_stages_that_exist_with_settings_that_are_accepted():
    for name in RECIPES:
        plan = plan_stages(name, {}, num_inference_steps=3, seed=5)
        assert [stage for stage, _ in plan] == [stage.name for stage in RECIPES[name]]
        assert all((config.num_inference_steps, config.seed) == (3, 5) for _, config in plan)
    assert [len(RECIPES[name]) for name in ("ptq", "tfmq", "rounded", "full")] == [0, 1, 2, 3]


def test_full_recipe_stops_and_goes_on(source, tmp_path, monkeypatch):
    whole = cli.quantize(source, tmp_path / "whole", scheme="w4a4", recipe="full", settings=SETTINGS, **FAST)
    assert [stage["stage"] for stage in whole.stages] == ["temporal", "rounding", "talora", "correction"]
    assert not (tmp_path / ".whole.part").exists()

    def killed(*_args, **_named):
        raise KeyboardInterrupt

    kinds = dict(METHODS)
    monkeypatch.setattr(recipes, "METHODS", kinds | {"talora": replace(kinds["talora"], run=killed)})
    with pytest.raises(KeyboardInterrupt):
        cli.quantize(source, tmp_path / "again", scheme="w4a4", recipe="full", settings=SETTINGS, **FAST)
    assert not (tmp_path / "again").exists()
    part = tmp_path / ".again.part"
    assert cli.inspect(str(part / "2-rounding"))  # a checkpoint like any other
    ran = []

    def watched(name):
        kind = kinds[name]

        def run(*args, **named):
            ran.append(name)
            return kind.run(*args, **named)

        return replace(kind, run=run)

    monkeypatch.setattr(recipes, "METHODS", {name: watched(name) for name in kinds})
    again = cli.quantize(source, tmp_path / "again", scheme="w4a4", recipe="full", settings=SETTINGS, **FAST)
    assert ran == ["talora", "correction"]
    assert [stage["stage"] for stage in again.stages] == ["temporal", "rounding", "talora", "correction"]
    one, two = (DiffusionPipeline.from_pretrained(tmp_path / name).unet for name in ("whole", "again"))
    assert equal_state(one, two)
    temporal = ModelRecord.of(one).parts["temporal"].block
    assert not set(temporal) & {
        name for names in ModelRecord.of(one).parts["adapters"].ranks.values() for name in names
    }


def test_stages_of_other_settings_are_not_taken(source, tmp_path, monkeypatch):
    def killed(*_args, **_named):
        raise KeyboardInterrupt

    kinds, two = dict(METHODS), {name: SETTINGS[name] for name in ("temporal", "rounding")}
    broken = kinds | {"rounding": replace(kinds["rounding"], run=killed)}
    monkeypatch.setattr(recipes, "METHODS", broken)
    with pytest.raises(KeyboardInterrupt):
        cli.quantize(source, tmp_path / "out", scheme="w4a4", recipe="rounded", settings=two, **FAST)
    assert (tmp_path / ".out.part" / "1-temporal" / "model_index.json").is_file()
    monkeypatch.setattr(recipes, "METHODS", kinds)
    two["temporal"] = {"iterations": 3}
    for name in ("out", "fresh"):
        made = cli.quantize(source, tmp_path / name, scheme="w4a4", recipe="rounded", settings=two, **FAST)
        assert len(made.stages) == 3
    assert equal_state(*(DiffusionPipeline.from_pretrained(tmp_path / name).unet for name in ("out", "fresh")))


def test_stages_of_another_source_are_not_taken(source, tmp_path, monkeypatch):
    def killed(*_args, **_named):
        raise KeyboardInterrupt

    mine = Path(shutil.copytree(source, tmp_path / "mine"))
    kinds, two = dict(METHODS), {name: SETTINGS[name] for name in ("temporal", "rounding")}
    arguments = {"scheme": "w4a4", "recipe": "rounded", "settings": two, **FAST}
    monkeypatch.setattr(recipes, "METHODS", kinds | {"rounding": replace(kinds["rounding"], run=killed)})
    with pytest.raises(KeyboardInterrupt):
        cli.quantize(mine, tmp_path / "out", **arguments)
    config = mine / "scheduler" / "scheduler_config.json"
    config.write_text(config.read_text().replace('"beta_end": 0.02', '"beta_end": 0.01'))
    monkeypatch.setattr(recipes, "METHODS", kinds)
    cli.quantize(mine, tmp_path / "out", **arguments)
    assert DiffusionPipeline.from_pretrained(tmp_path / "out").scheduler.config.beta_end == 0.01


def test_an_option_left_out_is_another_run(tmp_path):
    """`--images`, say, of which the line of a run without them has no word."""
    begun = Journal(tmp_path / "stages.jsonl", {"source": 1, "images": ["a.png"], "prompts": None})
    begun.keep([])
    begun.add({"stage": "temporal"})
    assert Journal(begun.file, {"source": 1, "images": ["a.png"]}).entries == [{"stage": "temporal"}]
    again = Journal(begun.file, {"source": 1})
    assert (again.differs, again.entries) == (["images"], [])


def test_a_later_stage_with_other_settings_keeps_the_earlier_ones(source, tmp_path, monkeypatch):
    kinds, ran = dict(METHODS), []

    def watched(name, fails):
        def run(*args, **named):
            ran.append(name)
            if fails:
                raise NonFiniteError("The loss must be finite, but it is NaN.")
            return kinds[name].run(*args, **named)

        return replace(kinds[name], run=run)

    arguments = {"scheme": "w4a4", "recipe": "rounded", **FAST}
    settings = {name: SETTINGS[name] for name in ("temporal", "rounding")}
    monkeypatch.setattr(recipes, "METHODS", {name: watched(name, name == "rounding") for name in kinds})
    with pytest.raises(ConfigError, match="Stage `rounding` must have settings that keep numbers finite. The"):
        cli.quantize(source, tmp_path / "out", settings=settings, **arguments)
    monkeypatch.setattr(recipes, "METHODS", {name: watched(name, False) for name in kinds})
    settings["rounding"] = settings["rounding"] | {"learning_rate": 0.01}
    made = cli.quantize(source, tmp_path / "out", settings=settings, **arguments)
    assert ran == ["temporal", "rounding", "rounding", "correction"]
    assert [stage["stage"] for stage in made.stages] == ["temporal", "rounding", "correction"]


def test_work_of_an_interrupted_first_stage_stays(tmp_path):
    plan = plan_stages("q-diffusion", {}, seed=1)
    RecipeRun(tmp_path, plan, {"source": 1})
    kept = tmp_path / "1-rounding-0123abcd.work"
    kept.mkdir()
    RecipeRun(tmp_path, plan, {"source": 1})
    assert kept.is_dir()
    RecipeRun(tmp_path, plan, {"source": 2})
    assert not kept.exists()


@pytest.mark.parametrize("recipe", ["tfmq-dm", "efficientdm"])
def test_baselines_are_checkpoints_like_any_other(source, tmp_path, recipe):
    settings = {stage.name: SETTINGS[stage.name] for stage in RECIPES[recipe]}
    cli.quantize(source, tmp_path / "out", scheme="int-w4a4", recipe=recipe, settings=settings, **FAST)
    unet = DiffusionPipeline.from_pretrained(tmp_path / "out").unet
    x = torch.randn(2, 3, 8, 8)
    unet.save_pretrained(tmp_path / "again")
    again = type(unet).from_pretrained(tmp_path / "again")
    assert equal_state(unet, again)
    assert torch.equal(unet(x, 3).sample, again(x, 3).sample)


@pytest.mark.parametrize(
    ("recipe", "settings", "message"),
    [
        ("fullest", {}, "Unknown recipe 'fullest'. Known: ptq, tfmq"),
        (
            "tfmq",
            {"talora": {"rank": 4}},
            r"must belong to a stage of recipe `tfmq` \(temporal, correction\), but got 'talora'",
        ),
        ("full", {"talora": {"ranks": 4}}, "A setting of `talora` must be one of num_adapters, .*, but got 'ranks'"),
        (
            "full",
            {"talora": {"rank": "x"}},
            "`talora.rank` must be int or none, but got 'x'",
        ),
        ("tfmq", {"temporal": {"fsc": "some"}}, "`fsc` must be one of"),
    ],
)
def test_bad_settings_are_refused_before_anything_is_read(recipe, settings, message):
    with pytest.raises(ConfigError, match=message):
        cli.quantize("/nowhere", "/nowhere/out", recipe=recipe, settings=settings)


def test_a_model_alone_has_no_sampler_for_stages(source, tmp_path):
    with pytest.raises(ConfigError, match="Recipe `tfmq` samples with the whole pipeline, but .* is a single model"):
        cli.quantize(source / "unet", tmp_path / "out", recipe="tfmq", settings={}, **FAST)
    assert not (tmp_path / "out").exists()


def test_command(source, tmp_path):
    arguments = [
        "quantize",
        str(source),
        "--out",
        str(tmp_path / "out"),
        "--scheme",
        "int-w4a4",
        "--recipe",
        "q-diffusion",
    ]
    arguments += ["--num-samples", "2", "--num-inference-steps", "2", "--json"]
    for stage in ("rounding", "talora"):
        for key, value in SETTINGS[stage].items():
            arguments += ["--set", f"{stage}.{key}={value}"]
    result = CliRunner().invoke(app, arguments, catch_exceptions=False)
    made = json.loads(result.stdout.splitlines()[-1])
    assert made["recipe"] == "q-diffusion"
    assert [stage["stage"] for stage in made["stages"]] == ["split", "rounding", "talora", "correction"]
    assert made["stages"][1]["figures"]["parts"]
    assert torch.is_tensor(DiffusionPipeline.from_pretrained(tmp_path / "out").unet.conv_in.weight_scale)

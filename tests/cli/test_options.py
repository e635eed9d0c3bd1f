"""Options that are derived from configs, and the table of settings."""

import re
import sys
from dataclasses import dataclass, fields

import pytest
import typer
from command_line import program
from PIL import Image
from typer.testing import CliRunner

from diffusers_msfp import cli
from diffusers_msfp.cli.app import app
from diffusers_msfp.cli.shared.options import with_config
from diffusers_msfp.cli.shared.settings import settings_of
from diffusers_msfp.errors import ConfigError
from diffusers_msfp.methods import METHODS
from diffusers_msfp.methods.talora.config import FinetuneConfig


@dataclass(frozen=True)
class Toy:
    """A config.

    Args:
        count (`int`): of things, which
            may be many.
        names (`tuple[str, ...]`): that they have.
        kind (`str`, *optional*): `"soft"` or none.
        loud (`bool`): whether one hears it.
    """

    count: int = 3
    names: tuple[str, ...] = ()
    kind: str | None = None
    loud: bool = False


def test_settings_are_read_off_a_dataclass():
    count, names, kind, loud = settings_of(Toy)
    assert (count.name, count.type_name, count.default, count.meaning) == (
        "count",
        "int",
        3,
        "of things, which may be many.",
    )
    assert (names.type_name, names.default) == ("tuple[str, ...]", ())
    assert (kind.type_name, kind.meaning) == ("str | None", '`"soft"` or none.')
    assert loud.default is False


def test_options_are_derived_from_a_dataclass():
    app, actual = typer.Typer(), []

    @app.command()
    @with_config(Toy, names={"names": ("--name",)})
    def act(config: Toy, place: str = "here") -> None:
        actual.append((config, place))

    def run(*arguments: str) -> Toy:
        assert CliRunner().invoke(app, arguments).exit_code == 0
        return actual.pop()

    assert run() == (Toy(), "here")
    given = ("--count", "5", "--name", "a", "--name", "b", "--kind", "soft", "--loud", "--place", "there")
    assert run(*given) == (Toy(5, ("a", "b"), "soft", True), "there")
    assert run("--no-loud") == (Toy(), "here")
    shown = " ".join(CliRunner().invoke(app, ["--help"]).stdout.split())
    assert "Of things, which" in shown
    assert "Repeatable." in shown


@pytest.mark.parametrize("config", [method.config for method in METHODS.values()])
def test_every_setting_of_a_method_has_a_meaning(config):
    assert [setting.name for setting in settings_of(config)] == [field.name for field in fields(config)]
    assert all(setting.meaning for setting in settings_of(config))


def test_finetune_takes_every_setting_and_has_the_same_defaults(monkeypatch):
    actual = []
    monkeypatch.setattr(cli, "finetune", lambda *args, **_: actual.append(args[3]))
    place = ["finetune", "a", "--teacher", "b", "--out", "c"]
    assert program(*place).returncode == 0
    assert actual.pop() == FinetuneConfig()
    old = ["--steps", 5, "--dfa-exponent", 0, "--router-group", "mid*", "--router-group", "up*", "--minutes", 2]
    assert program(*place, *old, "--preview-every", 0, "--balance", 0.5, "--gradient-checkpointing").returncode == 0
    assert actual.pop() == FinetuneConfig(
        num_inference_steps=5,
        denoising_factor_exponent=0.0,
        router_groups=("mid*", "up*"),
        minutes=2.0,
        preview_every=0,
        balance=0.5,
        gradient_checkpointing=True,
    )
    new = ["--num-inference-steps", 5, "--denoising-factor-exponent", 0]
    assert program(*place, *new).returncode == 0
    assert actual.pop() == FinetuneConfig(num_inference_steps=5, denoising_factor_exponent=0.0)


def test_set_help_lists_every_setting(monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")
    done = program("quantize", "--set", "help")
    assert done.returncode == 0, done.stderr
    for name, method in METHODS.items():
        assert f"stage {name}" + (" of all recipes" if name == "correction" else ", of the recipes ") in done.stdout
        for setting in settings_of(method.config):
            assert f"{name}.{setting.name}" in done.stdout
    rows = [line for line in done.stdout.splitlines() if "talora.rank" in line]
    assert [cell.strip() for cell in rows[0].split("│")[2:4]] == ["int | None", "null"]
    assert "tuple[str, ...]" in done.stdout
    one = program("quantize", "somewhere", "--set", "split.help").stdout
    assert "split.num_samples" in one
    assert "talora" not in one.replace("talora.minutes=5", "")


def test_settings_of_the_correction(tiny_dir, tmp_path):
    run = {"num_samples": 2, "num_inference_steps": 2, "scheme": "w4a4"}
    result = cli.quantize(tiny_dir, tmp_path / "a", settings={"correction": {"num_samples": 1}}, **run)
    (stage,) = result.stages
    assert stage["stage"] == "correction"
    assert "correction: CorrectionConfig(num_samples=1, num_inference_steps=2, " in stage["settings"][0]
    with pytest.raises(ConfigError, match="but got 'correction'"):
        cli.quantize(tiny_dir, tmp_path / "b", settings={"correction": {"num_samples": 1}}, correction=False, **run)
    Image.new("L", (8, 8)).save(tmp_path / "picture.png")
    with pytest.raises(ConfigError, match="`images` set the ranges of quantized inputs, but `w4a16`"):
        cli.quantize(tiny_dir, tmp_path / "c", scheme="w4a16", images=tmp_path)


@pytest.mark.parametrize(
    ("given", "refused"),
    [
        ("correction.with_sample=False", None),
        ("correction.with_sample=no", "`correction.with_sample` must be bool, but got 'no'"),
        ("correction.num_samples=true", "`correction.num_samples` must be int, but got True"),
        ("correction.seed=x", "`correction.seed` must be int, but got 'x'"),
    ],
)
def test_settings_have_the_types_that_they_say(given, refused, tiny_dir, tmp_path, monkeypatch):
    taken = []

    def began(*_):
        raise ConfigError("It begins.")

    monkeypatch.setattr(sys.modules["diffusers_msfp.cli.quantize"], "fetch", began)
    inner = sys.modules["diffusers_msfp.cli.quantize"].plan_stages
    keep = lambda *args, **more: taken.append(inner(*args, **more))  # noqa: E731
    monkeypatch.setattr(sys.modules["diffusers_msfp.cli.quantize"], "plan_stages", keep)
    done = program("quantize", tiny_dir, "--out", tmp_path / "out", "--scheme", "w4a4", "--set", given)
    assert (refused or "It begins.") in " ".join(done.stderr.split())
    assert [config.with_sample for stages in taken for _, config in stages] == ([] if refused else [False])


def test_set_help_of_what_is_no_stage():
    done = program("quantize", "--set", "Talora.help")
    assert done.returncode == 2
    assert (
        "Unknown method 'Talora'. Known: split, temporal, rounding, talora, correction. Did you mean `talora`?"
        in " ".join(done.stderr.split())
    )
    assert "`--set help` lists all settings" in program("quantize", "a", "--out", "b", "--set", "x").stderr


@pytest.mark.parametrize(("given", "meant"), [("--scheme=W4A4", "w4a4"), ("--recipe=Full", "full")])
def test_near_names_are_named(given, meant, tiny_dir, tmp_path):
    done = program("quantize", tiny_dir, "--out", tmp_path / "out", given)
    assert done.returncode == 2
    assert f"Did you mean `{meant}`?" in done.stderr


OLD = {
    "quantize": (["a", "--out", "b"], {"--calibration-samples": "num_samples", "--steps": "num_inference_steps"}),
    "sample": (["a", "--out", "b"], {"--num": "num_samples", "--steps": "num_inference_steps"}),
    "compare": (["a", "b"], {"--num": "num_samples", "--steps": "num_inference_steps"}),
    "evaluate": (["a", "--reference", "b"], {"--num": "num_samples", "--steps": "num_inference_steps"}),
    "report": (["a", "--out", "b"], {"--num": "num_samples", "--steps": "num_inference_steps"}),
    "publish": (["a", "--repo", "b/c"], {"--num": "num_samples", "--steps": "num_inference_steps"}),
    "bench": ([], {"--steps": "num_inference_steps"}),
    "demo": ([], {"--steps": "num_inference_steps"}),
}
"""Verb → what it needs, and its old spellings with the arguments that they set."""


class Called(Exception):
    """The verb was reached."""


@pytest.mark.parametrize("verb", OLD)
def test_old_spellings_are_taken_and_say_what_they_are_called_now(verb, monkeypatch):
    given = {}

    def take(*_, **options):
        given.update(options)
        raise Called

    monkeypatch.setattr(cli, verb, take)
    needed, spellings = OLD[verb]
    for old, name in spellings.items():
        new = f"--{name.replace('_', '-')}"
        said = f"`{old}` is called `{new}` now; the old spelling goes with the next version."
        for words in ([old, 7], [f"{old}=7"], [new, 7]):
            given.clear()
            done = CliRunner().invoke(app, [verb, *needed, *map(str, words)])
            assert isinstance(done.exception, Called), done.output
            assert given[name] == 7
            assert (said in " ".join(done.stderr.split())) == (words[0] != new)
        assert old not in re.findall(r"--[\w-]+", program(verb, "--help").stdout)


def test_a_value_that_looks_like_an_old_spelling_stays(monkeypatch):
    given = {}
    monkeypatch.setattr(cli, "sample", lambda *_, **options: given.update(options) or exit(3))
    done = CliRunner().invoke(app, ["sample", "a", "--out", "b.png", "--prompt", "--num", "--keep=1"])
    assert "--keep" in done.output  # no option of this verb, old or new
    done = CliRunner().invoke(app, ["sample", "a", "--out", "b.png", "--prompt", "--num", "--num", "2"])
    assert done.exit_code == 3
    assert (given["prompts"], given["num_samples"]) == (["--num"], 2)


def test_patterns_of_float_modules_by_the_old_spelling(monkeypatch):
    given = {}
    monkeypatch.setattr(cli, "quantize", lambda *_, **options: given.update(options) or exit(3))
    CliRunner().invoke(app, ["quantize", "a", "--out", "b", "--keep", "conv*", "--modules-to-not-convert", "to_q"])
    assert given["modules_to_not_convert"] == ["conv*", "to_q"]

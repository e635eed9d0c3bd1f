"""Prompts and guidance on the command line: passed on, told, or refused."""

import inspect
import json

import pipelines
import pytest
from command_line import program
from diffusers import StableDiffusionPipeline

from diffusers_msfp.errors import ConfigError
from diffusers_msfp.sampling.calls import DEFAULT_PROMPTS, call_arguments


@pytest.fixture(scope="module")
def text_dir(tmp_path_factory) -> str:
    """A float pipeline that takes prompts and guidance."""
    path = tmp_path_factory.mktemp("text")
    pipelines.make_small_pipe().save_pretrained(path)
    return str(path)


@pytest.fixture
def scales(monkeypatch) -> list:
    """The guidance of every call of the pipeline."""
    actual, call = [], StableDiffusionPipeline.__call__

    def watched(self, **arguments):
        actual.append(arguments.get("guidance_scale"))
        return call(self, **arguments)

    watched.__signature__ = inspect.signature(call)
    monkeypatch.setattr(StableDiffusionPipeline, "__call__", watched)
    return actual


def test_guidance_reaches_every_call(text_dir, tmp_path, scales):
    out = tmp_path / "packed"
    given = ["--guidance-scale", 3, "--prompt", "a hat", "--json"]
    short = ["--num-samples", 1, "--num-inference-steps", 1]
    made = program("quantize", text_dir, "--out", out, "--scheme", "w4a8", *short, "--recipe", "split", *given)
    assert made.returncode == 0, made.stderr
    assert "built-in" not in made.stderr
    draw = ["--num-samples", 1, "--num-inference-steps", 1]
    compared = program("compare", text_dir, out, *draw, *given)
    assert json.loads(compared.stdout)["settings"]["guidance_scale"] == 3
    assert program("sample", out, "--out", tmp_path / "a.png", *draw, *given).returncode == 0
    reported = program(
        "report", out, "--reference", text_dir, "--out", tmp_path / "a.html", *draw, "--no-speed", *given
    )
    assert json.loads(reported.stdout)["settings"]["guidance_scale"] == 3
    teach = ["--teacher", text_dir, "--train-steps", 1, "--num-inference-steps", 1, "--batch-size", 1]
    tuned = program("finetune", out, *teach, "--preview-every", 0, "--out", tmp_path / "tuned", *given)
    assert tuned.returncode == 0, tuned.stderr
    assert len(scales) > 6
    assert set(scales) == {3}


def test_the_prompts_that_are_used_are_told(text_dir, tmp_path):
    done = program("sample", text_dir, "--out", tmp_path / "a.png", "--num-samples", 1, "--num-inference-steps", 1)
    said = " ".join(done.stderr.split())
    assert "No prompts were named (`--prompt`), so the 8 built-in ones are used in turn" in said
    assert all(prompt in said for prompt in DEFAULT_PROMPTS)


VERBS = {
    "quantize": ["quantize", "{tiny}", "--out", "{out}"],
    "compare": ["compare", "{tiny}", "{packed}"],
    "evaluate": ["evaluate", "{packed}", "--reference", "{tiny}", "--out", "{out}"],
    "finetune": ["finetune", "{packed}", "--teacher", "{tiny}", "--out", "{out}"],
    "sample": ["sample", "{tiny}", "--out", "{out}.png"],
    "report": ["report", "{packed}", "--out", "{out}.html"],
    "a model alone": ["quantize", "{tiny}/unet", "--out", "{out}"],
    "a report on one": ["report", "{packed}/unet", "--out", "{out}.html"],
}


@pytest.mark.parametrize("arguments", VERBS.values(), ids=VERBS)
@pytest.mark.parametrize("given", [("--prompt", "a hat", "prompts"), ("--guidance-scale", "3", "guidance")])
def test_what_a_pipeline_does_not_take_is_refused(arguments, given, tiny_dir, packed_dir, tmp_path):
    names = {"tiny": tiny_dir, "packed": packed_dir, "out": tmp_path / "out"}
    *option, what = given
    done = program(*[part.format(**names) for part in arguments], *option)
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert f"`{option[0]}` needs a pipeline that takes {what}, but " in said
    assert said.endswith("takes none. Leave it out.")
    assert [path.name for path in tmp_path.iterdir()] == []


def test_prompts_from_python(tiny_pipe):
    with pytest.raises(ConfigError, match="`prompts` need a pipeline that takes them, but DDPMPipeline takes none"):
        call_arguments(tiny_pipe, ["a hat"], 1, {})

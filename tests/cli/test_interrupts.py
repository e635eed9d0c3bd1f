"""Ctrl-C: one line on what is kept and how to go on, exit code 130, and a run that goes on."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from command_line import program
from processes import wait_until

from diffusers_msfp import cli
from diffusers_msfp.methods.runs import deferred_signals
from diffusers_msfp.methods.talora.finetuner import Finetuner

SHORT = ["--train-steps", 5, "--num-inference-steps", 2, "--batch-size", 2, "--checkpoint-every", 100]


def interrupting(monkeypatch, cls: type, name: str, at: int) -> None:
    """Have a method raise the signal of Ctrl-C when it is called for the so-many-th time."""
    inner, calls = getattr(cls, name), []

    def called(*args, **options):
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return inner(*args, **options)

    monkeypatch.setattr(cls, name, called)


def stop(*args, **options):
    raise KeyboardInterrupt


def said(done: subprocess.CompletedProcess) -> str:
    """The one line of an interrupted program."""
    assert done.returncode == 130
    assert done.stdout == ""
    line = done.stderr.strip().splitlines()[-1]
    assert line.startswith("interrupted: ")
    assert line.endswith(": diffusers-msfp " + " ".join(done.args[1:]))
    assert "Traceback" not in done.stderr
    return line


def test_finetune_saves_what_it_has_and_goes_on(tiny_dir, packed_dir, tmp_path):
    out = tmp_path / "tuned"
    command = ["finetune", packed_dir, "--teacher", tiny_dir, "--out", out, *SHORT, "--json"]
    with pytest.MonkeyPatch.context() as patch:
        interrupting(patch, Finetuner, "_backward", 3)
        line = said(program(*command))
    assert f"{tmp_path / 'tuned-training' / 'checkpoint-3'} is kept, and the same command goes on from there" in line
    assert not out.exists()
    done = program(*command)
    assert done.returncode == 0, done.stderr
    assert "going on after update 3, found in" in " ".join(done.stderr.split())
    assert json.loads(done.stdout)["updates"] == 5
    assert not list((tmp_path / "tuned-training").glob("checkpoint-*"))


def test_finetune_that_was_not_yet_at_work_says_so(tiny_dir, packed_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(Finetuner, "__init__", stop)
    command = ["finetune", packed_dir, "--teacher", tiny_dir, "--out", tmp_path / "out", *SHORT]
    assert "nothing is kept, and the same command begins anew" in said(program(*command))


def test_finetune_that_is_done_but_for_its_comparison_says_so(tiny_dir, packed_dir, tmp_path, monkeypatch):
    module, calls = sys.modules["diffusers_msfp.cli.finetune"], []
    inner = module.compare_pipelines

    def second(*args, **options):
        calls.append(1)
        return stop() if len(calls) == 2 else inner(*args, **options)

    monkeypatch.setattr(module, "compare_pipelines", second)
    out = tmp_path / "out"
    command = ["finetune", packed_dir, "--teacher", tiny_dir, "--out", out, *SHORT]
    assert f"{out} is complete, and `compare` makes what is missing" in said(program(*command))
    assert (out / "model_index.json").is_file()


def test_checkpoints_and_previews_come_by_time(tiny_dir, packed_dir, tmp_path, monkeypatch):
    saved = []
    folder = sys.modules["diffusers_msfp.methods.talora.folder"].TrainingFolder
    inner = folder.save
    monkeypatch.setattr(folder, "save", lambda self: (saved.append(self.progress.update), inner(self)))
    times = ["--checkpoint-seconds", 1e-6, "--preview-seconds", 1e-6]
    command = ["finetune", packed_dir, "--teacher", tiny_dir, "--out", tmp_path / "out", *SHORT, *times]
    assert program(*command).returncode == 0
    assert saved == [1, 2, 3, 4, 5]
    pictures = sorted(file.name for file in (tmp_path / "out-training").glob("preview-*.png"))
    assert pictures[0] == "preview-000001.png"
    assert pictures[-1] == "preview-000005.png"


@pytest.fixture
def stoppable():
    """A background shell lets its children ignore Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("stoppable")
def test_signals_wait_and_are_not_lost():
    reached = []
    with pytest.raises(KeyboardInterrupt), deferred_signals() as asked:  # noqa: PT012 – it comes where the block ends
        signal.raise_signal(signal.SIGINT)
        reached.append(asked.asked)
    assert reached == [signal.SIGINT]
    with pytest.raises(KeyboardInterrupt), deferred_signals():  # noqa: PT012 – the second one does not wait
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        reached.append("never")
    assert reached == [signal.SIGINT]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


VERBS = {
    "quantize": (["quantize", "{tiny}", "--out", "{out}"], "quantize.calibrate", "keeps what is finished"),
    "evaluate": (
        ["evaluate", "{packed}", "--reference", "{tiny}", "--out", "{out}"],
        "evaluate.evaluate_pipelines",
        "keeps the pictures that are drawn, and the same command goes on with them",
    ),
    "compare": (["compare", "{tiny}", "{packed}"], "compare.compare_pipelines", "begins anew"),
    "bench": (["bench", "--model", "{packed}"], "bench.benchmark", "begins anew"),
    "warmup": (["warmup"], "bench.compile_kernels", "begins anew"),
    "report": (["report", "{packed}", "--out", "{out}.html"], "report.collect_report", "begins anew"),
    "sample": (["sample", "{tiny}", "--out", "{out}.png"], "sample.sample_images", "begins anew"),
    "publish": (["publish", "{packed}", "--repo", "user/name"], "publish.hub.publish", "sends what is missing"),
    "space create": (["space", "create", "{packed}", "--out", "{out}"], "space.write_space", "begins anew"),
    "inspect": (["inspect", "{packed}"], "checkpoints.describe_checkpoint", "begins anew"),
    "demo": (["demo", "--out", "{out}"], "demo.sample_images", "begins anew"),
    "convert": (["convert-checkpoint", "{packed}"], "checkpoints.outdated_components", "begins anew"),
}


@pytest.mark.parametrize(("arguments", "inner", "kept"), VERBS.values(), ids=VERBS)
def test_every_verb_ends_with_one_line(arguments, inner, kept, tiny_dir, packed_dir, tmp_path, monkeypatch):
    module, _, name = inner.partition(".")
    place = sys.modules[f"diffusers_msfp.cli.{module}"]
    place, name = (place.hub, "publish") if name == "hub.publish" else (place, name)
    monkeypatch.setattr(place, name, stop)
    names = {"tiny": tiny_dir, "packed": packed_dir, "out": tmp_path / "out"}
    assert kept in said(program(*[part.format(**names) for part in arguments]))


def test_the_page_that_is_stopped_has_served(packed_dir, monkeypatch):
    space = sys.modules["diffusers_msfp.cli.space"]
    monkeypatch.setattr(space, "threading", SimpleNamespace(Event=lambda: SimpleNamespace(wait=stop)))
    monkeypatch.setattr(space, "launch", lambda *_: "http://here")
    done = program("space", "run", packed_dir)
    assert done.returncode == 0
    assert "The page is at http://here" in done.stderr


def test_the_page_of_a_space_ends_without_a_traceback(packed_dir, tmp_path):
    cli.space_create(packed_dir, tmp_path / "space")
    told = open(tmp_path / "stderr", "w+")  # noqa: SIM115 – it is read while it grows
    process = subprocess.Popen(
        [sys.executable, "app.py"],
        cwd=tmp_path / "space",
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "GRADIO_ANALYTICS_ENABLED": "False"},
        stdout=subprocess.DEVNULL,
        stderr=told,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # a background shell ignores it
    )
    try:
        wait_until(lambda: "The page is at" in Path(told.name).read_text(), process)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        told.close()
    assert "The page is at" in Path(told.name).read_text()
    assert "Traceback" not in Path(told.name).read_text()

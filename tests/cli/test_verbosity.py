"""`--quiet`, `--verbose`, and progress where there is no terminal."""

import pytest
from command_line import program

from diffusers_msfp.cli import app
from diffusers_msfp.cli.shared import terminal

FEW = ["--num-samples", 1, "--num-inference-steps", 2]


@pytest.fixture(autouse=True)
def _as_before():
    yield
    terminal.set_verbosity(quiet=False, verbose=False)


def test_quiet_says_nothing_but_errors(packed_dir, tmp_path):
    out = tmp_path / "grid.png"
    done = program("sample", packed_dir, "--out", out, *FEW, "--quiet")
    assert (done.returncode, done.stderr) == (0, "")
    assert out.is_file()
    done = program("sample", packed_dir, "--out", tmp_path / "grid.txt", *FEW, "--quiet")
    assert done.returncode == 2
    assert "must end in .png" in " ".join(done.stderr.split())


def test_verbose_gives_every_step_a_line(packed_dir, tiny_dir):
    done = program("compare", tiny_dir, packed_dir, *FEW, "--verbose", "--json")
    lines = [line for line in done.stderr.splitlines() if line.startswith("comparing")]
    assert done.returncode == 0
    assert len(lines) >= 2
    assert " of " in lines[0]
    assert done.stdout.count("\n") == 1
    assert not program("compare", tiny_dir, packed_dir, *FEW).stderr


def test_both_at_once_are_refused(packed_dir):
    done = program("inspect", packed_dir, "--quiet", "--verbose")
    assert done.returncode == 2
    assert "either `--quiet` or `--verbose`" in " ".join(done.stderr.split())


@pytest.mark.parametrize("verb", [command.__name__.replace("_", "-") for command in app.COMMANDS])
def test_every_verb_takes_them(verb):
    done = program(verb, "--help")
    assert done.returncode == 0
    assert "--quiet" in done.stdout
    assert "--verbose" in done.stdout


def test_a_log_gets_a_line_now_and_then_and_one_at_the_end(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.progress("working") as report:
        for done in range(1, 101):
            now[0] += 1.0
            report(done, 100, part=f"layer {done}")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "working layer 30: 30 of 100, about 70 s left"
    assert lines[-1] == "working layer 100: 100 of 100, 100 s"
    assert len(lines) == 4


def test_what_is_short_says_nothing_and_what_has_no_total_says_how_long(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    with terminal.progress("working") as report:
        now[0] = 4.0
        report(1, 1)
        assert capsys.readouterr().err == ""
        now[0] = 40.0
        report(0, 0, loss=0.5)
    assert capsys.readouterr().err == "working loss 0.50000: 0 of unknown, 40 s so far\n"


def test_an_interrupted_quiet_run_says_how_to_go_on(tiny_dir, tmp_path, monkeypatch):
    from diffusers_msfp.plugin.files.streaming import StreamedModel

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(StreamedModel, "_write_module", stop)
    done = program("quantize", tiny_dir, "--out", tmp_path / "out", "--quiet")
    assert done.returncode == 130
    assert done.stderr.startswith("interrupted: ")

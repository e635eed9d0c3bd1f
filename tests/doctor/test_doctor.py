"""The doctor: versions against the metadata, the processor, engines on one layer, caches, and what brings the rest."""

import json
from email.message import Message
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch
from command_line import program

from diffusers_msfp import set_engine
from diffusers_msfp.doctor import caches, diagnose, engines, machine, packages
from diffusers_msfp.engines import ENGINES
from diffusers_msfp.errors import SEE_DOCTOR, MSFPError

KNOWN = ["torch", "diffusers", "transformers", "peft", "numba"]


def declared(monkeypatch, *requirements: str, python: str = ">=3.10") -> None:
    """Metadata of this package that says something else."""
    said = Message()
    for requirement in requirements:
        said["Requires-Dist"] = requirement
    for extra in ("cpu", "test"):
        said["Provides-Extra"] = extra
    said["Requires-Python"] = python
    monkeypatch.setattr(packages, "metadata", lambda _: said)


def remedies(monkeypatch, *requirements: str, **more: str) -> list:
    declared(monkeypatch, *requirements, **more)
    return diagnose(timed=False).remedies


@pytest.fixture(scope="module")
def result():
    return diagnose()


def test_versions_are_held_against_the_installed_metadata(result):
    found = {package.name: package for package in result.packages}
    assert set(KNOWN) <= found.keys()
    assert result.packages[0].name == "python"
    assert found["torch"].installed == torch.__version__
    assert found["numba"].extras == ("cpu",)
    assert "pytest" not in found
    assert result.fits == all(package.fits for package in result.packages if package.required)


def test_every_engine_is_tried_beside_float_layers(result):
    rows = {row.engine: row for row in result.engines if row.device == "cpu"}
    assert list(rows) == [*ENGINES, "torch bfloat16", "torch float32"]
    assert rows["cuda"].refusal == "its weight is on cpu, not on an NVIDIA GPU"
    assert rows["cuda"].milliseconds is None
    assert all(row.refusal is not None or row.milliseconds > 0 for row in rows.values())
    assert all(row.milliseconds is None for row in diagnose(timed=False).engines)


def test_progress_counts_to_its_end():
    seen = []
    diagnose(timed=False, on_progress=lambda done, total, **info: seen.append((done, total, info["part"])))
    assert [done for done, _, _ in seen] == list(range(1, seen[0][1] + 1))


def test_the_same_random_numbers_come_before_and_after():
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    diagnose(timed=False)
    assert torch.equal(torch.rand(4), expected)


def test_json_is_the_result_and_nothing_else():
    done = program("doctor", "--json", "--no-timed")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said.keys() >= {"fits", "packages", "processor", "devices", "engines", "caches", "hub_token", "remedies"}
    again = json.loads(json.dumps(diagnose(timed=False).to_dict()))
    assert {**said, "caches": None} == {**again, "caches": None}  # which others may fill meanwhile


def test_people_read_the_same():
    text = program("doctor", "--no-timed").stdout
    for words in ("torch", "AVX2", "oneDNN's 8-bit products", "reference", "cache of", "token for the Hub"):
        assert words in text, words


def test_versions_out_of_range_come_with_a_command(monkeypatch):
    wrong, *_ = remedies(monkeypatch, "torch<2,>=1", 'numba<0.1; extra == "cpu"')
    assert wrong.serious
    assert wrong.what == f"torch must be <2,>=1, but is {torch.__version__}"
    assert wrong.command == 'pip install "torch<2,>=1"'
    done = program("doctor", "--no-timed")
    assert done.returncode == 1
    assert "must be put right: torch must be <2,>=1" in done.stdout
    assert "Something that the package needs is not here." in done.stdout


def test_what_an_extra_brings_is_a_note(monkeypatch):
    missing = next(r for r in remedies(monkeypatch, 'no-such-thing>=1; extra == "cpu"') if "no-such-thing" in r.what)
    assert not missing.serious
    assert missing.what == "no-such-thing not installed: Numba's kernels, without which integers are slow"
    assert missing.command == 'pip install "diffusers-msfp[cpu]"'


def test_what_is_required_and_missing_is_serious(monkeypatch):
    wrong, *_ = remedies(monkeypatch, "no-such-thing>=1")
    assert (wrong.serious, wrong.what) == (True, "no-such-thing must be >=1, but is missing or damaged")


def test_packages_of_the_tests_are_nobody_s_need(monkeypatch):
    assert not any("no-such" in r.what for r in remedies(monkeypatch, 'no-such-thing>=1; extra == "test"'))


def test_another_python(monkeypatch):
    wrong, *_ = remedies(monkeypatch, python="<3")
    assert wrong.serious
    assert wrong.what.startswith("Python must be <3, but is 3.")


@pytest.mark.parametrize("damage", ["", "not a version", None], ids=["empty", "no version", "none"])
def test_damaged_metadata_of_a_package_does_not_fit(monkeypatch, damage):
    declared(monkeypatch, "torch>=2")
    monkeypatch.setattr(packages, "version", lambda _: damage)
    assert not next(package for package in packages.packages() if package.name == "torch").fits


def test_sources_that_were_never_installed(monkeypatch):
    def missing(name):
        raise PackageNotFoundError(name)

    monkeypatch.setattr(packages, "metadata", missing)
    result = diagnose(timed=False)
    assert not result.fits
    assert "was never installed" in result.remedies[0].what


def test_a_peft_that_is_too_old_for_a_library(monkeypatch):
    monkeypatch.setattr("transformers.integrations.peft.MIN_PEFT_VERSION", "99.0")
    found = [remedy.what for remedy in diagnose(timed=False).remedies]
    assert any("need PEFT 99.0 or newer" in what and "doctor" not in what for what in found)


def test_what_limits_onednn_is_named(monkeypatch):
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    result = diagnose(timed=False)
    assert result.processor.limited_by == {"ONEDNN_MAX_CPU_ISA": "AVX2"}
    assert any(remedy.command == "unset ONEDNN_MAX_CPU_ISA" for remedy in result.remedies)


def test_processors_that_are_not_x86(monkeypatch):
    said = {"architecture": "aarch64", "cpu_name": "Some Arm", "neon": True, "sve": False, "num_physical_cores": 4}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: said)
    result = diagnose(timed=False)
    assert result.processor.features == {"neon": True, "sve": False}
    assert [device.measured for device in result.devices] == [False]
    assert any("a kind of device that was never measured" in remedy.what for remedy in result.remedies)


def test_inspect_says_so_too(monkeypatch, packed_dir):
    words = "this kind of processor was never measured"
    assert words not in program("inspect", packed_dir).stdout
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "aarch64"})
    assert words in program("inspect", packed_dir).stdout


def test_a_token_is_there_or_not_and_never_shown(monkeypatch):
    monkeypatch.setattr(caches, "get_token", lambda: "hf_secret")
    for words in (("--json",), ()):
        done = program("doctor", "--no-timed", *words)
        assert "hf_secret" not in done.stdout + done.stderr
    assert json.loads(program("doctor", "--no-timed", "--json").stdout)["hub_token"] is True


def test_caches_are_counted_without_following_links(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "diffusers_msfp" / "numba"
    folder.mkdir(parents=True)
    (folder / "kernel").write_bytes(bytes(100))
    (folder / "round").symlink_to(tmp_path)
    own = next(cache for cache in caches.caches() if cache.path == tmp_path / "diffusers_msfp")
    assert 100 <= own.bytes < 100 + 2 * len(str(tmp_path))
    assert own.writable


def test_a_cache_whose_place_is_a_file_is_a_note(tmp_path, monkeypatch):
    (tmp_path / "diffusers_msfp").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert any("cannot be written" in remedy.what for remedy in diagnose(timed=False).remedies)


def test_an_engine_that_breaks_is_named_and_the_others_go_on(monkeypatch):
    def broken(self, layer):
        raise OSError("libgomp.so.1: cannot open shared object file\nand more")

    monkeypatch.setattr(ENGINES["bf16"], "prepare", broken)
    result = diagnose(timed=False)
    row = next(row for row in result.engines if row.engine == "bf16")
    assert row.failed
    assert row.refusal == "fails: libgomp.so.1: cannot open shared object file"
    assert any("bf16 on cpu fails" in remedy.what for remedy in result.remedies)
    assert result.fits
    assert not next(row for row in result.engines if row.engine == "reference").failed


def test_devices_that_were_never_measured(monkeypatch):
    assert machine.measured(torch.device("cpu")) == (machine.processor().architecture == "x86_64")
    assert not machine.measured(torch.device("xpu"))
    assert not machine.measured(torch.device("privateuseone"))


def test_a_device_that_takes_no_layer_is_a_row():
    (row,) = engines.try_engines([torch.device("xpu")], timed=False)
    assert row.failed
    assert row.refusal.startswith("fails: ")


def test_what_cannot_run_names_the_doctor(packed_dir, packed_pipe, tiny_dir, monkeypatch):
    with pytest.raises(MSFPError, match="`diffusers-msfp doctor` shows"):
        set_engine(packed_pipe, "cuda")
    real = __import__

    def without_gradio(name, *rest):
        if name == "gradio":
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr("builtins.__import__", without_gradio)
    done = program("space", "run", packed_dir, "--reference", tiny_dir)
    assert done.returncode == 2
    assert " ".join(done.stderr.split()).endswith(SEE_DOCTOR)


def test_every_error_on_something_that_is_not_installed_names_the_doctor():
    package, raising = Path(packages.__file__).parents[1], []
    for file in package.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        if "raise" in text and "is not installed:" in text and "doctor" not in file.parts:
            raising.append(file)
            assert "SEE_DOCTOR" in text, file
    assert raising
    assert issubclass(MSFPError, ValueError)

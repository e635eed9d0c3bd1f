"""Where verbs write: what is read outlasts it, links are followed, and only what is ours is replaced."""

import shutil
from pathlib import Path

import pytest

from diffusers_msfp.cli import space_create
from diffusers_msfp.cli.shared.store import check_target, publish
from diffusers_msfp.errors import ConfigError


@pytest.fixture
def pipe(packed_dir, tmp_path) -> Path:
    return Path(shutil.copytree(packed_dir, tmp_path / "pipe"))


@pytest.mark.parametrize(("source", "out"), [(".", "."), ("unet", "."), (".", "unet")])
def test_what_is_read_is_not_replaced(pipe, source, out, monkeypatch):
    monkeypatch.chdir(pipe.parent)
    before = sorted(pipe.rglob("*"))
    with pytest.raises(ConfigError, match="What is read must outlast what is written"):
        check_target(pipe / out, True, read=["user/model", None, Path("pipe") / source])
    assert sorted(pipe.rglob("*")) == before
    assert check_target(pipe / "new", True, read=[pipe]) == pipe / "new"


def test_a_repository_keeps_its_history(pipe):
    (pipe / ".git").mkdir()
    with pytest.raises(ConfigError, match="is a git repository"):
        check_target(pipe, True, read=[])


@pytest.mark.parametrize("there", [True, False])
def test_links_are_followed(pipe, tmp_path, there):
    disk, link = tmp_path / "disk", tmp_path / "link"
    link.symlink_to("disk")
    if there:
        shutil.copytree(pipe, disk)
    out = check_target(link, True, read=[])
    assert out == disk
    (tmp_path / "work").mkdir()
    made = Path(shutil.copytree(pipe, tmp_path / "work" / "made"))
    (made / "new").touch()
    publish(made, out)
    assert link.is_symlink()
    assert (link / "new").is_file()
    assert not (tmp_path / "work" / "old").exists()


def test_only_spaces_are_replaced_by_spaces(pipe, tmp_path):
    out = tmp_path / "flask"
    out.mkdir()
    (out / "app.py").write_text("import flask\n")
    with pytest.raises(ConfigError, match="replaces Spaces only"):
        space_create(str(pipe), out, overwrite=True)
    space = tmp_path / "space"
    for _ in range(2):
        space_create(str(pipe), space, overwrite=True)
    assert (space / "app.py").is_file()

"""The list of situations in this folder's README is what its tests are marked with."""

import os
from pathlib import Path

import pytest
from marks import marked

HERE = Path(__file__).parent
VERDICTS = ("right", "refused")


def situations() -> list[tuple[str, str, str]]:
    """`(kind, situation, verdict)` of every test marked `situation(text, verdict)`, in the files' order."""
    files = sorted(HERE.glob("test_*.py"))
    return [(file.stem.removeprefix("test_"), *given) for file in files for given in marked(file, "situation")]


def written() -> str:
    """The README as it should be."""
    lines = [
        "# Other people's situations",
        "",
        "What people do with diffusion models around a quantizer, mostly from public bug reports, and what happens",
        "here: *right* (the result that the float model would have, within the formats' error) or *refused* (one error",
        "that says what to do, before anything is changed). Each line is a test of this folder; the list is written by",
        "`MSFP_UPDATE_LISTS=1 python -m pytest tests/situations/test_list.py`.",
        "",
        "| kind | situation | verdict |",
        "| --- | --- | --- |",
    ]
    return "\n".join(lines + [f"| {kind} | {text} | {verdict} |" for kind, text, verdict in situations()]) + "\n"


def test_list_is_what_the_tests_show():
    if os.environ.get("MSFP_UPDATE_LISTS"):
        (HERE / "README.md").write_text(written(), encoding="utf-8")
    assert (HERE / "README.md").read_text(encoding="utf-8") == written()


@pytest.mark.parametrize(("kind", "text", "verdict"), situations())
def test_verdicts_are_known(kind, text, verdict):
    assert verdict in VERDICTS, (kind, text)

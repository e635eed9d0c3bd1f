"""Every public name is documented, annotated, shown in an example, and in the generated reference."""

import inspect
import re
import sys
from pathlib import Path

import pytest

import diffusers_msfp

sys.path.insert(0, str(Path(__file__).parent / "benchmarks"))

import api  # noqa: E402

NAMES = diffusers_msfp.__all__


def test_the_reference_is_what_the_docstrings_say():
    assert api.PAGE.read_text(encoding="utf-8") == api.page(), "run `python tests/benchmarks/api.py`"


@pytest.mark.parametrize("name", NAMES)
def test_every_parameter_is_documented_and_annotated(name):
    arguments = dict(api.sections(api.docstring(name))).get("Args", "")
    for key, parameter in api.parameters(name).items():
        assert re.search(rf"(?m)^[\w, *]*\b{key}\b", arguments), f"`{key}` of `{name}` is not in its docstring"
        variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        assert variable or parameter.annotation is not inspect.Parameter.empty, f"`{key}` of `{name}` has no annotation"


@pytest.mark.parametrize("name", NAMES)
def test_every_name_has_an_example_that_uses_it(name):
    example = dict(api.sections(api.docstring(name))).get("Example", "")
    assert name in example or "FORMATS" in example


def test_it_is_typed():
    assert (Path(diffusers_msfp.__file__).parent / "py.typed").is_file()

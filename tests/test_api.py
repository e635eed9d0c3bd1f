"""Every public name is documented, annotated, shown in an example, and in the generated reference."""

import importlib
import inspect
import re
import sys
from collections.abc import Callable
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
    assert re.search(rf"\b{name}\b", example)


@pytest.mark.parametrize("name", NAMES)
def test_every_member_is_in_the_reference(name):
    described = api.described(name)
    for member in functions_of(getattr(diffusers_msfp, name)):
        key = member.rpartition(".")[2]
        assert "." not in member or key == "__init__" or f"- `{key}`: " in described


def test_it_is_typed():
    assert (Path(diffusers_msfp.__file__).parent / "py.typed").is_file()


PACKAGE = Path(diffusers_msfp.__file__).parent
FACES = [file for file in sorted(PACKAGE.rglob("*.py")) if "\n__all__ = " in file.read_text(encoding="utf-8")]
"""Modules that say what of them is public."""


def functions_of(item: object) -> dict[str, Callable]:
    """A public function, or the public methods, properties and constructor that a class of the package defines."""
    if not getattr(item, "__module__", "").startswith("diffusers_msfp"):
        return {}
    if inspect.isfunction(item):
        return {item.__name__: item}
    if not inspect.isclass(item):
        return {}
    members = {name: member for name, member in vars(item).items() if name == "__init__" or not name.startswith("_")}
    behind = ("fget", "func", "__func__")  # of a property, a cached one, a class's or static method
    members = {name: next((getattr(m, a) for a in behind if hasattr(m, a)), m) for name, m in members.items()}
    return {f"{item.__name__}.{name}": member for name, member in members.items() if inspect.isfunction(member)}


@pytest.mark.parametrize("file", FACES, ids=lambda file: str(file.relative_to(PACKAGE)))
def test_public_functions_and_methods_are_annotated_throughout(file):
    name = ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__")
    module = importlib.import_module(name)
    for item in (getattr(module, name) for name in module.__all__):
        for name, function in functions_of(item).items():
            signature = inspect.signature(function)
            own = [parameter for key, parameter in signature.parameters.items() if key not in ("self", "cls")]
            missing = [parameter.name for parameter in own if parameter.annotation is parameter.empty]
            assert not missing, f"{name} of {module.__name__} does not say the types of {missing}"
            said = signature.return_annotation is not signature.empty or name.endswith("__init__")
            assert said, f"{name} of {module.__name__} does not say what it returns"

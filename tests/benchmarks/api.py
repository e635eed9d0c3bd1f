"""Write the reference of all public names from their signatures and docstrings.

python tests/benchmarks/api.py
"""

import inspect
import re
from collections.abc import Iterator
from functools import cached_property
from textwrap import dedent
from types import FunctionType
from typing import get_args

from harness import ROOT

import diffusers_msfp
from diffusers_msfp.registry import Registry
from diffusers_msfp.results import Result

PAGE = ROOT / "diffusers_msfp" / "API.md"
HEAD = """# Reference

Every public name of `diffusers_msfp`, from signatures and docstrings (`python tests/benchmarks/api.py` writes it).
Shapes stand in parentheses, `(B, C, H, W)`; errors are all `MSFPError`s.
"""
MEMBERS = {"Properties": (property, cached_property), "Methods": (FunctionType, classmethod, staticmethod)}
SECTIONS = "Args|Attributes|Returns|Raises|Example|Source"


def docstring(name: str) -> str:
    """Of a public name; of a registry, what it is for."""
    return inspect.getdoc(getattr(diffusers_msfp, name)) or ""


def signature(name: str) -> inspect.Signature | None:
    """Of a function or a class; None of data."""
    member = getattr(diffusers_msfp, name)
    plain = inspect.isclass(member) and issubclass(member, Exception)
    return inspect.signature(member) if callable(member) and not plain else None


def parameters(name: str) -> dict[str, inspect.Parameter]:
    """What a caller passes."""
    found = signature(name)
    return {} if found is None else {key: each for key, each in found.parameters.items() if key != "self"}


def shown(name: str) -> str:
    """A name as it is called."""
    if signature(name) is None or not parameters(name):
        return name

    def default(parameter: inspect.Parameter) -> str:
        text = "" if parameter.default is parameter.empty else "=" + repr(parameter.default).replace("'", '"')
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        return f"{stars}{parameter.name}{text}"

    arguments, starred = [], False
    for each in parameters(name).values():
        if each.kind is each.KEYWORD_ONLY and not starred:
            arguments.append("*")
        starred |= each.kind in (each.KEYWORD_ONLY, each.VAR_POSITIONAL)
        arguments.append(default(each))
    line = f"{name}({', '.join(arguments)})"
    return line if len(line) <= 100 else f"{name}(\n" + "".join(f"    {each},\n" for each in arguments) + ")"


def sections(text: str) -> Iterator[tuple[str | None, str]]:
    """A docstring's parts: None first, then those with a title."""
    parts = re.split(rf"(?m)^({SECTIONS}):\n", text)
    yield None, parts[0].strip()
    for title, body in zip(parts[1::2], parts[2::2], strict=True):
        yield title, dedent(body).strip()


def entries(body: str) -> str:
    """Indented entries as a list."""
    lines = []
    for line in body.splitlines():
        text = re.sub(r"^(\*{0,2}[\w, *]+?)( \(|: )", r"`\1`\2", line) if line and not line.startswith(" ") else line
        lines.append(f"- {text}" if line and not line.startswith(" ") else f"  {text.strip()}" if line else "")
    return "\n".join(lines)


def results(name: str) -> list[type[Result]]:
    """The kinds of results that a function returns."""
    found = None if inspect.isclass(getattr(diffusers_msfp, name)) else signature(name)
    kinds = () if found is None else get_args(found.return_annotation) or (found.return_annotation,)
    return [kind for kind in kinds if isinstance(kind, type) and issubclass(kind, Result)]


def members(name: str, kinds: tuple[type, ...]) -> dict[str, str]:
    """What a class has of these kinds, beside what it inherits, and the first line on each."""
    member = getattr(diffusers_msfp, name)
    own = vars(member) if inspect.isclass(member) else {}
    found = {key: each for key, each in own.items() if isinstance(each, kinds) and not key.startswith("_")}
    return {key: (inspect.getdoc(each) or "").partition("\n")[0] for key, each in found.items()}


def described(name: str) -> str:
    """The page's section on a name."""
    member = getattr(diffusers_msfp, name)
    out = [f"## `{name}`", f"```py\n{shown(name)}\n```"]
    for title, body in sections(docstring(name)):
        if title is None:
            out.append(body)
        elif title == "Example":
            out.append(body if body.startswith("```") else f"```py\n{body}\n```")
        elif title in ("Args", "Attributes", "Raises"):
            out += [f"*{title}*", entries(body)]
        else:
            out += [f"*{title}*", body]
    for kind in results(name):
        fields = dict(sections(inspect.getdoc(kind) or ""))
        out += [f"*`{kind.__name__}`*", (fields[None] or "").strip(), entries(fields["Args"])]
    if isinstance(member, Registry):
        out.append("Names: " + ", ".join(f"`{key}`" for key in member) + ".")
    for title, kinds in MEMBERS.items():
        rows = [f"- `{key}`: {text}" for key, text in members(name, kinds).items()]
        out += [f"*{title}*", "\n".join(rows)] if rows else []
    return "\n\n".join(part for part in out if part)


def page() -> str:
    """The whole page."""
    names = sorted(diffusers_msfp.__all__, key=str.lower)
    index = " · ".join(f"[`{name}`](#{name.lower()})" for name in names)
    return "\n\n".join([HEAD.strip(), index, *map(described, names)]) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

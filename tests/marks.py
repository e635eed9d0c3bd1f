"""What tests are marked with, read from their source: lists and tables are made of it."""

import ast
from pathlib import Path


def marked(file: Path, mark: str) -> list[tuple]:
    """The arguments of every `pytest.mark.<mark>(…)` in a file, in its order."""
    calls = [node for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(node, ast.Call)]
    found = [call for call in calls if ast.unparse(call.func) == f"pytest.mark.{mark}"]
    return [tuple(map(ast.literal_eval, call.args)) for call in sorted(found, key=lambda call: call.lineno)]

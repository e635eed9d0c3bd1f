"""The architecture as the folder tree shows it: imports point downwards, files stay short."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_msfp"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {
    0: ("errors", "outputs", "registry", "formats", "schemes", "recipes", "assets", "compat"),
    1: ("numerics",),
    2: ("calibration",),
    3: ("engines", "nn", "talora", "temporal", "rounding", "losses"),
    4: ("workflow", "evaluation"),
    5: ("integration", "report", "space"),
    6: ("hub",),
    7: ("cli", "__init__", "__main__"),
}
SIDEWAYS = {("evaluation", "workflow"), ("__main__", "cli"), ("cli", "__init__")}
MAX_LINES = 300


def layer_of(part: str) -> int:
    return next(layer for layer, parts in LAYERS.items() if part in parts)


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path) -> set[str]:
    """Dotted names that a file imports, relative ones resolved."""
    package = ["diffusers_msfp", *file.relative_to(PACKAGE).parts[:-1]]
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            name = ".".join([*base, *([node.module] if node.module else [])])
            found |= {name} if node.module else {f"{name}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_downwards(file):
    own = part_of(file)
    if own == "__init__":
        return
    for name in imports(file):
        if not name.startswith("diffusers_msfp"):
            continue
        other = name.split(".")[1] if "." in name else "__init__"
        other = other if (PACKAGE / other).exists() or (PACKAGE / f"{other}.py").exists() else "__init__"
        allowed = own == other or (own, other) in SIDEWAYS or layer_of(other) < layer_of(own) or layer_of(own) == 0
        assert allowed, f"{own} must not import {other}"


def test_lower_layers_do_not_know_the_higher_libraries():
    for file in FILES:
        layer = layer_of(part_of(file))
        libraries = {name.split(".")[0] for name in imports(file)} | {
            "torch.nn" for name in imports(file) if name.startswith("torch.nn")
        }
        assert layer >= 1 or "torch" not in libraries, file
        assert layer >= 3 or "torch.nn" not in libraries, file
        assert layer >= 4 or "diffusers" not in libraries, file


def test_no_cycles_between_modules():
    graph = {}
    for file in FILES:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imports(file)
    graph = {name: {n for n in targets if n in graph and n != name} for name, targets in graph.items()}
    graph["diffusers_msfp"] = set()  # the face of the package imports everything and is imported for its version only
    done, path = set(), []

    def visit(name: str) -> None:
        assert name not in path, " → ".join([*path, name])
        if name in done:
            return
        path.append(name)
        for target in graph[name]:
            visit(target)
        path.pop()
        done.add(name)

    for name in graph:
        visit(name)


def test_files_stay_short():
    for file in FILES + sorted((ROOT / "tests").rglob("*.py")):
        limit = MAX_LINES if PACKAGE in file.parents else 2 * MAX_LINES
        assert len(file.read_text(encoding="utf-8").splitlines()) <= limit, file


def test_public_names_are_documented_and_sorted():
    import diffusers_msfp

    for name in diffusers_msfp.__all__:
        member = getattr(diffusers_msfp, name)
        assert (getattr(member, "__doc__", None) or "").strip(), name
    promised = "MSFPConfig MSFPQuantizer FORMATS FPFormat QParams encode decode fake_quantize search_qparams calibrate"
    assert set(f"{promised} freeze calibration_state quantize_pipeline".split()) <= set(diffusers_msfp.__all__)

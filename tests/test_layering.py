"""The architecture as the folder tree shows it: imports point downwards, files stay short."""

import ast
import re
from pathlib import Path

import pytest
import torch
from diffusers import ConfigMixin, DiffusionPipeline, ModelMixin, SchedulerMixin
from torch import nn
from transformers import PreTrainedModel

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_msfp"
FILES = sorted(PACKAGE.rglob("*.py"))
LAYERS = {
    0: ("errors", "registry", "outputs", "results", "compat", "formats", "schemes", "recipes", "assets"),
    1: ("numerics",),
    2: ("calibration",),
    3: ("layers",),
    4: ("sampling",),
    5: ("engines",),
    6: ("methods",),
    7: ("checkpoint",),
    8: ("plugin", "evaluation"),
    9: ("budget", "exports"),
    10: ("report", "space", "doctor"),
    11: ("hub",),
    12: ("cli", "__init__", "__main__"),
}
BASE = ("errors", "registry", "outputs", "results", "compat", "formats", "schemes", "recipes")
"""The lowest layer's own order: each may import those before it."""
SIDEWAYS = {("__main__", "cli"), ("cli", "__init__")}
MAX_LINES = 300
MAX_MODULES = 12


def layer_of(part: str) -> int:
    return next(layer for layer, parts in LAYERS.items() if part in parts)


def part_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(file: Path, *, for_types: bool = True) -> set[str]:
    """Dotted names that a file imports, relative ones resolved; with or without those for the type checker alone."""
    package = ["diffusers_msfp", *file.relative_to(PACKAGE).parts[:-1]]
    found, tree = set(), ast.parse(file.read_text(encoding="utf-8"))
    if not for_types:
        tree.body = [n for n in tree.body if getattr(getattr(n, "test", None), "id", None) != "TYPE_CHECKING"]
    for node in ast.walk(tree):
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
        base = own in BASE and other in BASE and BASE.index(other) < BASE.index(own)
        allowed = own == other or (own, other) in SIDEWAYS or layer_of(other) < layer_of(own) or base
        assert allowed, f"{own} must not import {other}"


def test_the_page_of_rooms_says_what_may_import_what():
    table = re.search(r"\| --- \| --- \|\n((?:\|.*\n)+)", (PACKAGE / "README.md").read_text(encoding="utf-8"))
    rows = [re.findall(r"`(\w+)`", line.split("|")[1]) for line in table[1].splitlines()]
    lowest = [room for row in rows for room in row if room in LAYERS[0]]
    assert tuple(room for room in lowest if room in BASE) == BASE
    above = [tuple(row) for row in rows if row[0] not in LAYERS[0]]
    modules = ("__init__", "__main__")
    assert above == [tuple(part for part in LAYERS[n] if part not in modules) for n in sorted(LAYERS) if n]
    assert sorted(lowest) == sorted(LAYERS[0])


def libraries(file: Path) -> set[str]:
    """Other packages that a file imports; `torch.nn` counts as one, however it is imported."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return {name.split(".")[0] for name in found} | {"torch.nn" for name in found if name.startswith("torch.nn")}


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_lower_layers_do_not_know_the_higher_libraries(file):
    if part_of(file) == "compat":  # which knows them for all others
        return
    layer, known = layer_of(part_of(file)), libraries(file)
    assert layer >= 1 or "torch" not in known
    assert layer >= 2 or "torch.nn" not in known
    assert layer >= 4 or not {"diffusers", "transformers", "peft"} & known


def private_names() -> set[str]:
    """Private names of torch, diffusers and transformers; those of the instances too."""
    owners = (nn.Module, torch.Tensor, torch, torch.ops, torch.ops.mkldnn, ModelMixin, DiffusionPipeline)
    owners += (PreTrainedModel, SchedulerMixin, ConfigMixin)
    names = {name for owner in owners for name in dir(owner)} | set(vars(nn.Module()))
    names |= {"_hf_hook", "_old_forward", "_is_hf_initialized", "_hf_peft_config_loaded", "_overwritten_params"}
    names |= {"_progress_bar_config", "_orig_mod", "_internal_dict", "_getframe", "_schema"}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


PRIVATE = private_names()


def private_uses(file: Path) -> list[str]:
    """Private names of other packages that a file uses, overrides or imports; names of its own are not counted."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    inherited = {name for name in dir(nn.Module) if name.startswith("_") and not name.startswith("__")}
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            found += [f"def {each.name}" for each in node.body if getattr(each, "name", None) in inherited]
        elif isinstance(node, ast.Attribute) and node.attr in PRIVATE - own:
            found.append(node.attr)
        elif isinstance(node, ast.Constant) and node.value in PRIVATE:
            found.append(repr(node.value))
        elif isinstance(node, ast.ImportFrom) and not node.level:
            path = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
            found += [f"import {part}" for part in path if part.startswith("_") and part != "__version__"]
    return found


def test_private_names_are_found(tmp_path):
    for code, name in (
        ("x._buffers['a']", "_buffers"),
        ("getattr(model, '_hf_hook')", "'_hf_hook'"),
        ("from torch.utils._pytree import tree_map", "import _pytree"),
        ("class A:\n    def _apply(self, fn): ...", "def _apply"),
    ):
        (tmp_path / "module.py").write_text(code)
        assert private_uses(tmp_path / "module.py") == [name]


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_internals_of_other_packages_are_used_in_compat_alone(file):
    if part_of(file) != "compat":
        assert not private_uses(file)


def config_uses(file: Path) -> list[str]:
    """Where a file asks a model for its config's record, by attribute or by name."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return [
        ast.unparse(node)
        for node in ast.walk(tree)
        if (isinstance(node, ast.Attribute) and node.attr == "quantization_config")
        or (
            isinstance(node, ast.Call)
            and getattr(node.func, "id", None) in ("getattr", "setattr", "hasattr", "delattr")
            and any(isinstance(arg, ast.Constant) and arg.value == "quantization_config" for arg in node.args)
        )
    ]


def test_uses_of_the_config_are_found(tmp_path):
    for code in ("model.config.quantization_config.scheme", "getattr(model.config, 'quantization_config')"):
        (tmp_path / "module.py").write_text(code)
        assert config_uses(tmp_path / "module.py")


@pytest.mark.parametrize("file", FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_nothing_below_the_plugin_reads_or_writes_the_config(file):
    if layer_of(part_of(file)) < layer_of("plugin"):
        assert not config_uses(file)


def test_folders_stay_small():
    for folder in {file.parent for file in FILES}:
        assert len(list(folder.glob("*.py"))) <= MAX_MODULES + 1, folder  # beside `__init__`


def test_no_cycles_between_modules():
    graph = {}
    for file in FILES:
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        graph[name] = imports(file, for_types=False)
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


TESTS = sorted((ROOT / "tests").rglob("*.py"))


def imported_tests(file: Path) -> set[str]:
    """Modules of tests that a file imports, by any name that it gives."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = f"{getattr(node, 'module', None) or ''}.{'.'.join(alias.name for alias in node.names)}".split(".")
            found |= {name for name in names if name.startswith("test_")}
    return found


def test_tests_do_not_import_tests(tmp_path):
    for code in ("from test_matrix import sample", "import plugin.test_matrix", "from . import test_matrix as matrix"):
        (tmp_path / "module.py").write_text(code)
        assert imported_tests(tmp_path / "module.py") == {"test_matrix"}
    for file in TESTS:
        assert not imported_tests(file), file


def test_tests_wait_for_what_they_can_observe():
    for file in TESTS:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            sleeps = isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "sleep"
            assert not sleeps or file.name == "processes.py", f"{file}: {ast.unparse(node)}; `wait_until` waits"


def test_public_names_are_documented_and_sorted():
    import diffusers_msfp

    for name in diffusers_msfp.__all__:
        member = getattr(diffusers_msfp, name)
        assert (getattr(member, "__doc__", None) or "").strip(), name
    promised = "MSFPConfig MSFPQuantizer FORMATS FPFormat QParams encode decode fake_quantize search_qparams calibrate"
    assert set(f"{promised} freeze calibration_state quantize_pipeline".split()) <= set(diffusers_msfp.__all__)

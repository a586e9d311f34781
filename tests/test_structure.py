"""The layout: every module belongs to one part, and imports only from its own part or those below."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

# From top to bottom. A part may import from itself and from the parts below it.
PARTS = [
    "__main__",
    "cli",
    "benchmarks",
    "doctor",
    "tune",
    "api",
    "report",
    "export",
    "launch",
    "show_batch",
    "predict",
    "exported",
    "train",
    "prepare",
    "checkpoints",
    "recipes",
    "models",
    "training",
    "evaluation",
    "pipelines",
    "data",
    "config",
    "losses",
    "distributed",
    "kernels",
    "utils",
    "",  # fasttrain itself: the version
]


def part_of_module(module: str) -> str:
    """`pipelines` for `fasttrain.pipelines.plan`, the empty string for `fasttrain`."""
    return [*module.split("."), ""][1]


def modules() -> dict[str, Path]:
    paths = {}
    for path in (ROOT / "fasttrain").rglob("*.py"):
        paths[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    for folder in ("pipelines", "kernels"):  # rglob does not follow symlinks
        for path in (ROOT / folder).glob("*.py"):
            paths[f"fasttrain.{folder}.{path.stem}"] = path
    return paths


def imports(path: Path, known: set[str], anywhere: bool) -> set[str]:
    """The fasttrain modules that a file imports at its top level, or anywhere."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imported = set()
    for node in ast.walk(tree) if anywhere else tree.body:
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            imported |= {name if name in known else node.module for name in names}
    return {name for name in imported if name.split(".")[0] == "fasttrain"}


def test_every_part_is_listed():
    assert sorted(PARTS) == sorted({part_of_module(module) for module in modules()})


@pytest.mark.parametrize("module", sorted(modules().keys() - {"fasttrain"}))  # that imports the API when it is used
def test_modules_import_only_from_parts_below(module):
    known = modules()
    for imported in imports(known[module], set(known), anywhere=True):
        below = PARTS.index(part_of_module(imported)) >= PARTS.index(part_of_module(module))
        assert below, f"{module} imports {imported}, which belongs to a part above"


def test_no_imports_are_circular():
    known = modules()
    graph = {module: imports(path, set(known), anywhere=False) & set(known) for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join([*trail, module])
        if module not in done:
            for imported in graph[module] - {module}:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_import_no_other_part():
    for path in (ROOT / "kernels").glob("*.py"):
        others = {name for name in imports(path, set(), anywhere=True) if part_of_module(name) != "kernels"}
        assert not others, f"{path.name} imports {others}"


@pytest.mark.parametrize("folder", ["pipelines", "kernels"])
def test_top_level_folders_are_linked_into_the_package(folder):
    link = ROOT / "fasttrain" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder
    assert not (ROOT / folder / "__init__.py").exists()

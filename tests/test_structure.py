"""The layout: one import name for each part, and imports that run downward only."""

import ast
from pathlib import Path

import pytest
from helpers import ROOT

# From the top: a room may import from the rooms below it, and from itself.
ROOMS = [
    "__main__",
    "cli",
    "benchmarks",
    "doctor",
    "show_batch",
    "predict",
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


def room_of(module: str) -> str:
    """`fasttrain.pipelines.plan` is in the room `pipelines`, `fasttrain` itself in ``."""
    return [*module.split("."), ""][1]


def modules() -> dict[str, Path]:
    found = {}
    for path in (ROOT / "fasttrain").rglob("*.py"):
        found[".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")] = path
    for folder in ("pipelines", "kernels"):  # rglob does not follow links
        for path in (ROOT / folder).glob("*.py"):
            found[f"fasttrain.{folder}.{path.stem}"] = path
    return found


def imports(path: Path, known: set[str], everywhere: bool) -> set[str]:
    """fasttrain modules that a file imports: at its top, or everywhere in it."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found = set()
    for node in ast.walk(tree) if everywhere else tree.body:
        if isinstance(node, ast.Import):
            found |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = {f"{node.module}.{each.name}" for each in node.names}
            found |= {name if name in known else node.module for name in names}
    return {each for each in found if each.split(".")[0] == "fasttrain"}


def test_the_rooms_are_those_that_there_are():
    assert sorted(ROOMS) == sorted({room_of(module) for module in modules()})


@pytest.mark.parametrize("module", sorted(modules()))
def test_imports_run_downward(module):
    known = modules()
    for imported in imports(known[module], set(known), everywhere=True):
        below = ROOMS.index(room_of(imported)) >= ROOMS.index(room_of(module))
        assert below, f"{module} imports {imported}, whose room is above its own"


def test_no_import_is_circular():
    known = modules()
    graph = {module: imports(path, set(known), everywhere=False) & set(known) for module, path in known.items()}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join([*trail, module])
        if module not in done:
            for imported in graph[module] - {module}:
                visit(imported, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_kernels_import_nothing_of_the_rest():
    for path in (ROOT / "kernels").glob("*.py"):
        above = {each for each in imports(path, set(), everywhere=True) if room_of(each) != "kernels"}
        assert not above, f"{path.name} imports {above}"


@pytest.mark.parametrize("folder", ["pipelines", "kernels"])
def test_top_level_folders_are_reached_through_links(folder):
    link = ROOT / "fasttrain" / folder
    assert link.is_symlink() and link.resolve() == ROOT / folder
    assert not (ROOT / folder / "__init__.py").exists()

"""The house as README draws it: imports go one way, every file has its test, recipes are as thin as they look."""

import ast
from pathlib import Path

import pytest
from tiny import RECIPES, ROOT

PACKAGE = ROOT / "h2s"
MODULES = sorted(f for f in PACKAGE.rglob("*.py") if f.name != "__init__.py")
# From the ground up; a folder may import from lower floors and from its own.
FLOORS = [
    {"errors"},
    {"models", "quantization", "hub", "data", "run"},
    {"prefix"},
    {"reward"},
    {"report"},
    {"ppo", "dpo"},
]
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_from_h2s(file: Path) -> list[tuple[str, str]]:
    """(module, name) of what a file imports from h2s."""
    nodes = [n for n in ast.walk(ast.parse(file.read_text(encoding="utf-8"))) if isinstance(n, ast.ImportFrom)]
    return [(n.module, alias.name) for n in nodes if (n.module or "").split(".")[0] == "h2s" for alias in n.names]


def room(module: str) -> str:
    return module.split(".")[1]


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_go_one_way(file):
    here = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    for module, name in imported_from_h2s(file):
        there = room(module)
        assert FLOOR[there] <= FLOOR[here], f"{file} imports {name} from a higher floor, {module}"
        if here == "run" and there != "run":
            assert there in ("errors", "hub"), f"{file} imports from {module}: run knows nothing of the other folders"
        assert not name.startswith("_"), f"{file} imports the private {name} of {module}"


def test_no_circle():
    waiting = {
        f"h2s.{'.'.join(f.relative_to(PACKAGE).with_suffix('').parts)}": {
            f"{m}.{n}" if (PACKAGE / Path(*m.split(".")[1:]) / f"{n}.py").is_file() else m
            for m, n in imported_from_h2s(f)
        }
        for f in MODULES
    }
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, f"these import one another: {waiting}"


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_every_module_has_its_test_file_and_its_line_in_readme(file):
    where = file.relative_to(PACKAGE)
    assert (ROOT / "tests" / where.parent / f"test_{where.name}").is_file()
    house = (ROOT / "README.md").read_text(encoding="utf-8").split("## The house")[1].split("\n## ")[0]
    assert where.name in house
    if len(where.parts) > 1:
        assert f"`{where.parent}/" in house


@pytest.mark.parametrize("name", (*RECIPES, "push"))
def test_recipes_are_thin(name):
    file = ROOT / "recipes" / f"{name}.py"
    names = imported_from_h2s(file)
    assert len(names) <= 12 and not [n for _, n in names if n.startswith("_")], names
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 100

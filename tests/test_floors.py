"""The floors of the design: a module imports only from floors strictly below its own, or from its own folder."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent / "lowmem_ft"
FLOORS = {
    "core": 0, "quant": 1, "data": 1, "report": 1, "adapters": 2, "runtime": 2, "assemble": 3, "step": 3, "generate": 3,
    "export": 4, "planner": 5, "trainer": 6, "cli": 7, "api": 7, "": 8, "__init__": 8, "__main__": 8,
}  # fmt: skip
MODULES = sorted(path for path in ROOT.rglob("*.py") if "assets" not in path.parts)


def room(path: Path) -> str:
    """The folder or top-level file that a module belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def imported_rooms(path: Path) -> list[tuple[int, str]]:
    """(line, room) of every import of this package, inside functions too."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative imports hide the floor"
            if node.module == "lowmem_ft":
                found += [(node.lineno, alias.name) for alias in node.names]
            elif node.module is not None and node.module.startswith("lowmem_ft."):
                found.append((node.lineno, node.module.split(".")[1]))
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lowmem_ft":
                    found.append((node.lineno, [*alias.name.split("."), ""][1]))
    return found


def violations(path: Path) -> list[str]:
    own = room(path)
    return [
        f"{path.relative_to(ROOT)}:{line} ({own}, floor {FLOORS[own]}) imports {other} (floor {FLOORS[other]})"
        for line, other in imported_rooms(path)
        if other != own and FLOORS[other] >= FLOORS[own]
    ]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    assert room(path) in FLOORS, "a new room needs a floor"
    assert violations(path) == []


def test_the_check_itself_sees_an_import_that_goes_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.test_floors.ROOT", tmp_path)
    bad = tmp_path / "quant" / "bad.py"
    bad.parent.mkdir()
    bad.write_text("def f():\n    from lowmem_ft.data import packing\n    import lowmem_ft.trainer.loop\n")
    assert len(violations(bad)) == 2

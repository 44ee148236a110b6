"""Who may import whom: the rooms' order, the light rooms without torch, the heavy libraries each in one place.

Read from the sources (``ast``), imports inside functions included, so nothing is imported to find out.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lab.config.known import options
from lab.vocab import Strategy

LAB = Path(__file__).resolve().parents[2] / "lab"

# A room may import rooms of earlier lines, and of its own set in its own line.
LEVELS: list[list[set[str]]] = [
    [{"vocab", "units"}],
    [{"config", "record", "curve", "history"}],
    [{"analytic"}, {"model", "transforms", "parallel", "optim", "data"}, {"measure"}],
    [{"build", "loop", "metrics", "progress"}],
    [{"compare", "block_diff"}],
    [{"track", "report"}],
    [{"launch", "run_state", "faults"}],
    [{"train", "cli"}, {"integrations"}],
]
PLACE = {
    room: (level, group) for level, sets in enumerate(LEVELS) for group, rooms in enumerate(sets) for room in rooms
}
WITHOUT_TORCH = {"vocab", "units", "config", "record", "curve", "history", "analytic"}
IN_ONE_PLACE = ("deepspeed", "accelerate", "bitsandbytes", "peft", "wandb")


@dataclass(frozen=True)
class Import:
    """One import statement (or ``import_module`` call with a name to read)."""

    file: str  # relative to the repository
    line: int
    module: str  # dotted name of what is imported
    in_function: bool

    @property
    def room(self) -> str:
        """First name below ``lab``: of the importing file."""
        return Path(self.file).with_suffix("").parts[1]

    def __str__(self) -> str:
        return f"{self.file}:{self.line} imports {self.module}"


def imports_of(path: Path, root: Path) -> Iterator[Import]:
    """Every import of a source file; relative ones resolved, ``from lab import x`` as ``lab.x``."""
    file = path.relative_to(root).as_posix()
    package = path.parent.relative_to(root).parts

    def walk(node: ast.AST, in_function: bool) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            inside = in_function or isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            for module in names(child):
                yield Import(file, getattr(child, "lineno", 0), module, in_function)
            yield from walk(child, inside)

    def names(node: ast.AST) -> Iterator[str]:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = list(package[: len(package) - node.level + 1]) if node.level else []
            base += [node.module] if node.module else []
            module = ".".join(base)
            yield from (f"{module}.{alias.name}" for alias in node.names) if module == "lab" else [module]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in (
            "import_module",
            "__import__",
        ):
            argument = node.args[0] if node.args else None
            if isinstance(argument, ast.JoinedStr) and argument.values:  # f"lab.cli.{name}": its constant beginning
                argument = argument.values[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value.rstrip(".")

    yield from walk(ast.parse(path.read_text(encoding="utf-8"), filename=file), False)


ALL = [found for path in sorted(LAB.rglob("*.py")) for found in imports_of(path, LAB.parent)]


def forbidden(found: Import) -> bool:
    """Whether a file of one room imports a room that is not below it."""
    parts = found.module.split(".")
    if parts[0] != "lab" or len(parts) == 1 or parts[1] == found.room:
        return False
    (level, group), (other_level, other_group) = PLACE[found.room], PLACE[parts[1]]
    return other_level > level or (other_level == level and other_group != group)


def test_every_room_has_its_place() -> None:
    rooms = {p.stem for p in LAB.iterdir() if p.suffix == ".py" or (p.is_dir() and any(p.rglob("*.py")))}
    assert rooms - {"__init__"} <= set(PLACE), "a new room needs a line in LEVELS, and a reason for that line"


def test_rooms_import_only_what_is_below_them() -> None:
    assert [str(i) for i in ALL if i.room != "__init__" and forbidden(i)] == []
    assert [str(i) for i in ALL if i.room == "__init__" and i.module.startswith("lab")] == []


def test_only_compare_and_what_is_above_see_prediction_and_measurement() -> None:
    """The analytic and the measuring side share words, never arithmetic."""
    for room, others in [("analytic", {"measure"}), ("measure", {"analytic"})]:
        seen = {i.module.split(".")[1] for i in ALL if i.room == room and i.module.startswith("lab.")}
        assert seen <= {room, "vocab", "units", "config", "record", "curve"}
        assert not seen & others


def test_light_rooms_never_name_torch() -> None:
    heavy = {"torch", "numpy", "deepspeed", "accelerate", "transformers", "bitsandbytes", "peft", "wandb"}
    assert [str(i) for i in ALL if i.room in WITHOUT_TORCH and i.module.split(".")[0] in heavy] == []


@pytest.mark.parametrize("library", IN_ONE_PLACE)
def test_heavy_libraries_are_imported_lazily_in_one_place(library: str) -> None:
    found = [i for i in ALL if i.module.split(".")[0] == library]
    assert len({i.file for i in found}) <= 1, [str(i) for i in found]
    assert [str(i) for i in found if not i.in_function] == []


def test_light_rooms_load_without_torch() -> None:
    modules = [f"lab.{room}" for room in sorted(WITHOUT_TORCH)] + ["lab.cli.main", "lab.cli.predict"]
    heavy = ("torch", "numpy", "hydra", "deepspeed", "wandb", "pynvml")
    code = f"import sys, {', '.join(modules)}; print([m for m in {heavy!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert out.stdout.strip() == "[]"


def test_one_set_of_strategy_names() -> None:
    """Adding a strategy: one enum member, one YAML file, one engine, one sharding rule."""
    from lab.analytic.sharding import RULES
    from lab.parallel import ENGINES

    assert set(options("parallel")) == {s.value for s in Strategy}
    assert set(ENGINES) == set(Strategy)
    assert set(RULES) == set(Strategy)
    for module, _ in ENGINES.values():
        assert (LAB / "parallel" / f"{module}.py").is_file()


@pytest.mark.parametrize(
    ("file", "source", "wrong"),
    [
        ("lab/analytic/x.py", "from lab.measure import y", True),
        ("lab/analytic/x.py", "def f():\n    import lab.model.decoder", True),
        ("lab/analytic/x.py", "from lab import loop", True),
        ("lab/analytic/x.py", "from lab.config import y", False),
        ("lab/measure/x.py", "from ..model import y", True),
        ("lab/measure/x.py", "from . import y", False),
        ("lab/parallel/x.py", "from lab.transforms import y", False),
        ("lab/parallel/x.py", "from importlib import import_module\nimport_module('lab.build')", True),
        ("lab/vocab.py", "from lab.config import y", True),
        ("lab/compare.py", "import lab.track", True),
        ("lab/cli/x.py", "import importlib\nimportlib.import_module(f'lab.cli.{1}')", False),
    ],
)
def test_the_rule_sees_what_it_should(file: str, source: str, wrong: bool, tmp_path: Path) -> None:
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source)
    assert any(forbidden(i) for i in imports_of(path, tmp_path)) is wrong

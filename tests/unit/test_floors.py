"""The house: imports go down only. Read from the source, nothing is imported.

A floor may use its own and those below. `amsf_dist` itself, the front door, may import anything
and is imported by nobody inside. torch.distributed and optional packages have their own rooms.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "amsf_dist"
FLOORS = (
    ("rules", "hyper", "roots"),
    ("names", "architecture", "patterns", "blocks", "storage"),
    ("shards",),
    (
        "kernels",
        "collective",
        "reduce",
        "exact",
        "peaks",
        "state",
        "clock",
        "lane",
        "plan",
        "audit",
        "groups",
        "owner",
        "loading",
        "portable",
        "stamp",
        "checks",
        "watch",
        "progress",
        "clipping",
        "samples",
        "stepping",
        "modes",
        "upstream",
    ),
    ("optimizer",),
    ("release", "checkpoint", "conversion", "diagnostics", "precision", "estimate"),
    ("integrations", "train", "doctor"),
    ("cli", "__main__"),
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
FRONT_DOOR = "amsf_dist"

HIGHEST_WITHOUT_OPTIONAL_PACKAGES = 5
OPTIONAL = frozenset(
    "transformers deepspeed accelerate triton wandb tensorboard datasets matplotlib pydantic yaml "
    "typer tqdm safetensors tokenizers prometheus_client".split()
)
ROOMS_OF_THEIR_OWN = {"triton": ("kernels", "triton")}
"""Folder that may import an optional package on a floor that otherwise imports none."""
DISTRIBUTED = "torch.distributed"
MAY_BE_DISTRIBUTED = frozenset(
    "shards reduce exact peaks release diagnostics checkpoint integrations train doctor".split()
)


def modules(package: Path) -> Iterator[tuple[str, Path]]:
    """(room, file): the first name below the package; "" for the front door."""
    for path in sorted(package.rglob("*.py")):
        room = path.relative_to(package).with_suffix("").parts[0]
        yield ("" if room == "__init__" else room), path


def imported(path: Path, package: Path) -> Iterator[tuple[int, str]]:
    """(line, dotted name) of every import, wherever it stands, `if TYPE_CHECKING` included."""
    where = (package.name, *path.relative_to(package).parent.parts)
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = where[: len(where) - node.level + 1] if node.level else ()
            base = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args:
            name = getattr(node.func, "attr", getattr(node.func, "id", ""))
            argument = node.args[0]
            if name in ("import_module", "__import__") and isinstance(argument, ast.Constant):
                yield node.lineno, str(argument.value)


def mistakes(package: Path) -> Iterator[str]:
    """One line per import, or module, that breaks a rule."""
    rooms = {room for room, _ in modules(package)} - {""}
    for room in sorted(rooms - FLOOR.keys()):
        yield f"{room} has no floor: give it one in FLOORS"
    for room, path in modules(package):
        here = FLOOR.get(room, len(FLOORS))
        for line, name in imported(path, package):
            at = f"{path.relative_to(package.parent)}:{line}"
            parts = name.split(".")
            if parts[0] == package.name and room:
                there = parts[1] if len(parts) > 1 else ""
                if there not in rooms:
                    yield f"{at} imports the front door ({name}); import the module that has it"
                elif FLOOR.get(there, 0) > here:
                    yield f"{at} ({room}, floor {here}) climbs to {there} (floor {FLOOR[there]})"
            if f"{name}.".startswith(f"{DISTRIBUTED}.") and room not in MAY_BE_DISTRIBUTED:
                yield f"{at} ({room}) imports {DISTRIBUTED}"
            folder = path.relative_to(package).parent.parts
            own = folder == ROOMS_OF_THEIR_OWN.get(parts[0])
            if parts[0] in OPTIONAL and here <= HIGHEST_WITHOUT_OPTIONAL_PACKAGES and not own:
                yield f"{at} ({room}, floor {here}) imports the optional package {parts[0]}"


def test_every_module_has_a_floor_and_no_import_breaks_a_rule() -> None:
    assert list(mistakes(PACKAGE)) == []


def test_the_front_door_names_what_it_shows() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    assigned = {
        target.id: node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    assert {"AMSF", "explain"} <= set(ast.literal_eval(assigned["__all__"]))


@pytest.mark.parametrize(
    ("file", "source", "says"),
    [
        ("reduce.py", "from amsf_dist.optimizer import AMSF", "(reduce, floor 3) climbs to optim"),
        ("reduce.py", "from amsf_dist import optimizer", "climbs to optimizer (floor 4)"),
        ("reduce.py", "import amsf_dist.cli as c", "climbs to cli (floor 7)"),
        (
            "rules/lion.py",
            "from amsf_dist.blocks import Blocks",
            "(rules, floor 0) climbs to block",
        ),
        ("rules/lion.py", "from ..blocks import Blocks", "(rules, floor 0) climbs to blocks"),
        ("rules/lion.py", "from .. import blocks", "(rules, floor 0) climbs to blocks"),
        ("plan.py", "def f():\n    from amsf_dist.release import g", "plan.py:2 (plan, floor 3)"),
        ("plan.py", "import importlib\nimportlib.import_module('amsf_dist.cli')", "climbs to cli"),
        ("optimizer.py", "from amsf_dist import AMSF", "imports the front door"),
        ("optimizer.py", "import amsf_dist", "imports the front door"),
        ("cli.py", "from amsf_dist import __version__", "imports the front door"),
        ("optimizer.py", "import torch.distributed as dist", "imports torch.distributed"),
        ("optimizer.py", "from torch import distributed", "imports torch.distributed"),
        ("state.py", "from torch.distributed.tensor import DTensor", "imports torch.distributed"),
        ("kernels/fast.py", "import triton.language as tl", "the optional package triton"),
        ("kernels/triton/move.py", "import typer", "the optional package typer"),
        ("checkpoint.py", "from safetensors.torch import save_file", "package safetensors"),
        ("attic.py", "", "attic has no floor"),
        ("attic/box.py", "", "attic has no floor"),
    ],
)
def test_a_climber_is_caught(tmp_path: Path, file: str, source: str, says: str) -> None:
    package = toy_house(tmp_path)
    path = package / file
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(source)
    (mistake,) = mistakes(package)
    assert says in mistake


def test_a_tidy_house_is_let_be(tmp_path: Path) -> None:
    package = toy_house(tmp_path)
    (package / "optimizer.py").write_text(
        "import torch\nfrom amsf_dist import kernels, plan\nfrom amsf_dist.hyper import Hyper\n"
    )
    (package / "release.py").write_text("import torch.distributed as dist\n")
    (package / "train" / "loop.py").write_text("import yaml\nfrom amsf_dist.optimizer import A\n")
    (package / "rules" / "lion.py").write_text("from amsf_dist.rules.protocol import Rule\n")
    (package / "kernels" / "triton").mkdir()
    (package / "kernels" / "triton" / "move.py").write_text("import triton.language as tl\n")
    assert list(mistakes(package)) == []


def toy_house(folder: Path) -> Path:
    package = folder / "amsf_dist"
    for room in FLOOR:
        if room in ("rules", "storage", "shards", "kernels", "integrations", "train"):
            (package / room).mkdir(parents=True, exist_ok=True)
            (package / room / "__init__.py").write_text("")
    for room in FLOOR:
        if not (package / room).is_dir():
            (package / f"{room}.py").write_text("")
    (package / "__init__.py").write_text("from amsf_dist.optimizer import AMSF\n")
    return package


def test_nothing_is_printed_by_the_library() -> None:
    """Floors 0 to 5 log; only the job on top talks to a terminal."""
    printing = [
        f"{path.name}:{node.lineno}"
        for room, path in modules(PACKAGE)
        if FLOOR.get(room, 0) <= HIGHEST_WITHOUT_OPTIONAL_PACKAGES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
    ]
    assert printing == []


def test_the_standard_library_is_no_optional_package() -> None:
    assert not OPTIONAL & set(sys.stdlib_module_names)

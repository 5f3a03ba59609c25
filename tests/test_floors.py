"""The house's floors: a module imports only from its own floor or lower ones; heavy libraries stay in their place."""

import ast
import graphlib
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

FLOORS = {
    0: "config digests paths records",
    1: "ladder study",
    2: "scaling",
    3: "sharding data tokenizer schedules parametrization devices processes provenance signals",
    4: "models objectives",
    5: "checkpoint lease optim denoiser decoding likelihood tensorboard progress",
    6: "program upcycle member trained evaluate sample mirror",
    7: "train check bench",
    8: "cli launchers environment __main__",
}
FLOOR = {room: floor for floor, rooms in FLOORS.items() for room in rooms.split()}
NEVER_MEET = ({"models", "objectives"},)
ONLY_IN = {"flax.linen": "models", "orbax": "checkpoint"}  # library → the room that may import it
NO_JAX = (0, 1, 2)


def imports(source: str, inside_functions: bool = True) -> set[str]:
    """Dotted names of everything a module imports, at its top and perhaps inside functions."""
    names, tree = set(), ast.parse(source)
    for node in ast.walk(tree) if inside_functions else tree.body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {f"{node.module}.{alias.name}" for alias in node.names} | {node.module}
    return names


def rooms(names: set[str]) -> set[str]:
    return {name.split(".")[1] for name in names if name.startswith("slmjax.")}


def faults(room: str, source: str, highest: int | None = None) -> list[str]:
    """What a module of `room` imports and must not; `highest` replaces the room's floor (experiments are no room)."""
    names, floor = imports(source), FLOOR[room] if highest is None else highest
    found = [f"{room} (floor {floor}) imports {r} (floor {FLOOR[r]})" for r in rooms(names) if FLOOR[r] > floor]
    for pair in NEVER_MEET:
        found += [f"{room} imports {other}" for other in (pair - {room}) & rooms(names) if room in pair]
    for library, home in ONLY_IN.items():
        inside = {n for n in names if n == library or n.startswith(library + ".")}
        found += [f"{room} imports {name}" for name in inside if room != home]
    if floor in NO_JAX:
        found += [f"{room} imports {name}" for name in names if name.split(".")[0] in ("jax", "flax", "optax", "orbax")]
    return found


def modules() -> dict[str, list[pathlib.Path]]:
    """Room → its files."""
    found = {}
    for path in sorted((ROOT / "slmjax").rglob("*.py")):
        parts = path.relative_to(ROOT / "slmjax").with_suffix("").parts
        if parts != ("__init__",):
            found.setdefault(parts[0], []).append(path)
    return found


def test_every_module_is_on_a_floor():
    assert set(modules()) <= set(FLOOR), "name the floor of a new module in FLOORS"
    assert (ROOT / "slmjax" / "__init__.py").read_text() == ""


@pytest.mark.parametrize("room", sorted(modules()))
def test_a_room_imports_only_what_its_floor_allows(room):
    assert [(path.name, fault) for path in modules()[room] for fault in faults(room, path.read_text())] == []


def test_rooms_do_not_load_each_other_in_circles():
    """Rooms of one floor may import each other one way."""
    graph = {
        room: set().union(*(rooms(imports(p.read_text(), inside_functions=False)) for p in paths)) - {room}
        for room, paths in modules().items()
    }
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


def test_experiments_import_only_the_floors_that_need_no_jax():
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        assert faults("experiments", path.read_text(), highest=1) == [], path


@pytest.mark.parametrize(
    "room, source, fault",
    [
        ("config", "import jax", "imports jax"),
        ("ladder", "def f():\n    import jax.numpy as jnp", "imports jax.numpy"),
        ("study", "from slmjax import optim", "imports optim (floor 5)"),
        ("data", "from slmjax.program import build", "imports program (floor 6)"),
        ("models", "from slmjax.objectives import View", "imports objectives"),
        ("objectives", "from slmjax import models", "imports models"),
        ("train", "from flax import linen as nn", "imports flax.linen"),
        ("train", "import flax.linen as nn", "imports flax.linen"),
        ("evaluate", "from orbax import checkpoint", "imports orbax"),
        ("scaling", "from optax import adam", "imports optax"),
    ],
)
def test_the_check_sees_what_it_should(room, source, fault):
    assert any(fault in found for found in faults(room, source))
    assert faults("cli", "from slmjax import train, models, config") == []


def test_planning_and_fitting_do_not_load_jax():
    """Imports through other modules too: what a name in the source does not show."""
    names = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for room, paths in modules().items()
        for path in paths
        if FLOOR[room] in NO_JAX
    ]
    code = f"import sys, importlib\n[importlib.import_module(n) for n in {names}]\nprint('jax' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.strip() == "False", result.stderr

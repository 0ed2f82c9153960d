"""The blueprint's second section, over the syntax tree: floors, owners, no circles, no long modules, lazy exports.

An import counts wherever it stands, inside of functions too; only those under TYPE_CHECKING do not, since they never run.
"""

import ast
import graphlib
from collections.abc import Iterator
from pathlib import Path

import pytest

import hpcckpt

PACKAGE = Path(hpcckpt.__file__).parent

# A package stands for all of its modules.
FLOORS = {
    "submit": 7, "cli": 7, "after": 7, "exits": 7,
    "launch": 6, "task": 6,
    "run": 5,
    "attempt": 4, "checkpoint": 4, "manager": 4, "weights": 4,
    "background": 3, "content": 3, "crew": 3, "curves": 3, "exactness": 3, "origin": 3, "reading": 3, "recorder": 3, "requeue": 3,
    "sharing": 3,
    "watch": 3,
    "state": 2, "store": 2, "data": 2, "progress": 2,
    "archive": 1, "companion": 1, "distributed": 1, "signals": 1, "scheduler": 1,
    "errors": 0, "layout": 0, "config": 0, "environment": 0, "policy": 0,
    "lead_time": 0,
}  # fmt: skip

# Sideways imports, each with what it is for; a new one has to be argued for here.
SIDEWAYS = {
    ("config.loader", "errors"): "what it raises; errors imports nothing",
    ("lead_time", "policy"): "how early Slurm may be, and what is kept in reserve",
    ("environment", "errors"): "what it raises; errors imports nothing",
    ("config.checks", "environment"): "a range of nodes is read in one place",
    ("config.checks", "errors"): "what that raises",
    ("cli.main", "submit"): "`hpcckpt submit` is `python -m hpcckpt.submit`",
    ("after", "exits"): "errors become exit codes in one place",
    ("submit", "exits"): "errors become exit codes in one place",
    ("cli.status", "exits"): "errors become exit codes in one place",
    ("cli.ckpt", "exits"): "errors become exit codes in one place",
    ("launch.local", "task"): "the callable that submitit pickles",
    ("launch.slurm", "task"): "the callable that submitit pickles",
    ("data.cursor", "state.rng"): "derive_seed, so that orders and generators are seeded alike",
    ("data.order", "state.rng"): "what a sampler draws leaves no trace",
    ("data.samples", "state.rng"): "draws for a sample are seeded, and leave no trace",
    ("data.stream", "state.rng"): "derive_seed, as above",
    ("companion", "signals"): "what it may be sent while it starts, and passes it later",
    ("crew", "background"): "where a rank saves, which the crew is a part of",
    ("manager", "checkpoint"): "the state of all ranks is gathered in one way",
    ("origin", "reading"): "the one place where a file becomes content",
    ("origin", "exactness"): "what is said of a restart goes with what was restored",
    ("recorder", "curves"): "what metrics.jsonl is the truth of",
}

OWNERS = {
    "torch.distributed": ("distributed",),
    "signal": ("signals",),
    "subprocess": ("scheduler", "companion"),
    "multiprocessing": (),
    "submitit": ("launch", "task"),
}


def name_of(path: Path) -> str:
    """Return the module's name below hpcckpt; "" for hpcckpt itself."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in MODULES.items()}


def unit_of(module: str) -> str:
    """Return the first part of a name: what has a floor."""
    return module.partition(".")[0]


def running(node: ast.AST) -> Iterator[ast.AST]:
    """Yield every node that can run: not what is under TYPE_CHECKING."""
    yield node
    skipped = node.body if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING") else []
    for child in ast.iter_child_nodes(node):
        if child not in skipped:
            yield from running(child)


def imported(tree: ast.AST) -> set[str]:
    """Return the dotted names that are imported; of `from a import b` both a and a.b, since b may be a module."""
    names: set[str] = set()
    for node in running(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names |= {str(node.module)} | {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(module: str) -> set[str]:
    """Return the modules of hpcckpt that a module imports."""
    names = {name.removeprefix("hpcckpt.") for name in imported(TREES[module]) if name.startswith("hpcckpt.")}
    return names & MODULES.keys() - {module}


def reaches(module: str, name: str) -> bool:
    """Return whether a module imports `name` or anything in it, or goes there by attributes from what it imports."""
    attributes = {ast.unparse(node) for node in running(TREES[module]) if isinstance(node, ast.Attribute)}
    return any(other == name or other.startswith(f"{name}.") for other in imported(TREES[module]) | attributes)


def test_every_module_has_a_floor() -> None:
    assert {unit_of(module) for module in MODULES} - {""} == FLOORS.keys()


@pytest.mark.parametrize("module", [module for module in MODULES if module])
def test_imports_go_downwards(module: str) -> None:
    floor = FLOORS[unit_of(module)]
    upwards = {
        other
        for other in own_imports(module)
        if unit_of(other) != unit_of(module) and FLOORS[unit_of(other)] >= floor and (module, other) not in SIDEWAYS
    }
    assert not upwards


def test_every_sideways_import_is_still_there_and_really_sideways() -> None:
    for module, other in SIDEWAYS:
        assert other in own_imports(module), (module, other)
        assert FLOORS[unit_of(module)] == FLOORS[unit_of(other)]


def test_there_are_no_circles() -> None:
    # A package's own __init__ gathers its parts; what stands beside them is what could close a circle.
    graph = {module: own_imports(module) for module in MODULES if module}
    assert len(list(graphlib.TopologicalSorter(graph).static_order())) == len(graph)


@pytest.mark.parametrize("module", MODULES)
def test_each_dangerous_thing_has_one_owner(module: str) -> None:
    taken = {name for name, owners in OWNERS.items() if reaches(module, name) and unit_of(module) not in owners}
    assert not taken


def test_every_owner_owns_something() -> None:
    for name, owners in OWNERS.items():
        for owner in owners:
            used = [module for module in MODULES if unit_of(module) == owner and reaches(module, name)]
            assert used or owner == "task", (name, owner)


@pytest.mark.parametrize("module", [module for module in MODULES if FLOORS.get(unit_of(module)) == 0])
@pytest.mark.parametrize("name", ["torch", "time", "datetime", "subprocess", "random"])
def test_the_ground_floor_knows_no_torch_no_clock_and_no_chance(module: str, name: str) -> None:
    assert not reaches(module, name)


@pytest.mark.parametrize("module", [module for module in MODULES if FLOORS.get(unit_of(module)) == 0])
def test_the_ground_floor_opens_no_file_but_in_the_one_loader(module: str) -> None:
    names = {"open", "read_text", "write_text", "read_bytes", "write_bytes", "unlink", "mkdir", "rename"}
    opening = [
        function.name
        for function in ast.walk(TREES[module])
        if isinstance(function, ast.FunctionDef)
        for call in ast.walk(function)
        if isinstance(call, ast.Call) and ast.unparse(call.func).rpartition(".")[2] in names
    ]
    assert opening == (["load"] if module == "config.loader" else [])


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_long(module: str) -> None:
    assert len(MODULES[module].read_text(encoding="utf-8").splitlines()) <= 400


def test_no_module_is_a_drawer() -> None:
    assert not {module.rpartition(".")[2] for module in MODULES} & {"utils", "util", "helpers", "helper", "misc", "common"}


@pytest.mark.parametrize("module", MODULES)
def test_every_module_says_what_it_is_for(module: str) -> None:
    assert ast.get_docstring(TREES[module])


def test_all_public_names_resolve_and_are_the_lazily_exported_ones() -> None:
    assert sorted(hpcckpt.__all__) == sorted(set(hpcckpt.__all__))
    for name in hpcckpt.__all__:
        assert getattr(hpcckpt, name) is not None
    assert set(hpcckpt.__all__) == {*hpcckpt._HOME, "errors"}
    assert dir(hpcckpt) == sorted(hpcckpt.__all__)


def test_names_for_type_checkers_are_the_lazily_exported_ones() -> None:
    block = next(node for node in TREES[""].body if isinstance(node, ast.If))
    declared = {alias.name: str(node.module) for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    assert declared == hpcckpt._HOME | {"errors": "hpcckpt"}


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'hpcckpt' has no attribute 'Runn'"):
        _ = hpcckpt.Runn

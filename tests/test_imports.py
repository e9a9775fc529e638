"""Imports go one way, from room to room: docs/architecture.md has the picture."""

import ast
import importlib
from functools import cache
from graphlib import TopologicalSorter

import pytest
from support import ROOT

PACKAGE = ROOT / "moejax"
MODULES = {}  # dotted name -> its file; models/ is moejax.models
for path in [*PACKAGE.rglob("*.py"), *(ROOT / "models").rglob("*.py")]:
    place = path.relative_to(ROOT)
    if place.parts[:2] != ("moejax", "models"):
        parts = [*(("moejax",) if place.parts[0] == "models" else ()), *place.with_suffix("").parts]
        MODULES[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path

# A room may import those on lower floors and itself. Of one floor, none imports another: the leaves know nothing of each other.
FLOORS = (
    ("models.config", "models.ops"),
    ("models",),
    ("base",),
    ("data", "hub", "profiling", "estimator"),
    ("runs",),
    ("tuner",),
    ("evaluation",),
    ("training",),
    ("selftest",),
    ("commands", "api"),
    ("cli",),
    ("study",),
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
WITHOUT_JAX = ("models.config", "data", "estimator")  # modules; a function of theirs may import it


def room(module):
    """The room of a dotted name below moejax; what lies in no folder is `base`, but for the door."""
    _, *parts = module.split(".")
    if parts[:1] == ["models"]:
        part = "".join(parts[1:2])
        return "models.ops" if part == "ops" else "models.config" if part in ("config", "families", "foreign_settings") else "models"
    if parts and parts[0] in FLOOR:
        return parts[0]
    return "cli" if parts in (["cli"], ["__main__"]) else "base"


@cache
def tree(path):
    return ast.parse(path.read_text())


@cache
def imported(module, inside=True):
    """Dotted names of everything that a module imports, in functions too (where `inside`). What only a type checker sees does not count."""
    package = module if MODULES[module].name == "__init__.py" else module.rpartition(".")[0]

    def walk(node):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            return
        if not inside and isinstance(node, ast.FunctionDef | ast.Lambda):
            return
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package.split(".")[: len(package.split(".")) - node.level + 1], *filter(None, [node.module])]) \
                if node.level else node.module  # fmt: skip
            yield from (full if (full := f"{base}.{alias.name}") in MODULES else base for alias in node.names)
        for child in ast.iter_child_nodes(node):
            yield from walk(child)

    return set(walk(tree(MODULES[module])))


def ours(module, inside=True):
    return {name for name in imported(module, inside) if name in MODULES and name != "moejax"}


def test_arrows():
    wrong = {
        f"{module} -> {name}"
        for module in MODULES
        for name in ours(module)
        if room(name) != room(module) and FLOOR[room(name)] >= FLOOR[room(module)]
    }
    assert not wrong


def folder(module):
    """The folder that a module lies in; those at the top stand for themselves, and what an architecture is (models/config with the
    registry, models/families with its entries) is one."""
    parent = MODULES[module].parent
    return room(module) if room(module) == "models.config" else module if parent == PACKAGE else str(parent.relative_to(ROOT))


@pytest.mark.parametrize("part", [folder, str])
def test_nothing_imports_in_a_circle(part):
    """No folder and no module: what is imported inside functions counts."""
    graph = {}
    for module in MODULES:
        graph.setdefault(part(module), set()).update({part(name) for name in ours(module)} - {part(module)})
    TopologicalSorter(graph).prepare()


def test_what_needs_no_jax_imports_none():
    wrong = {module for module in MODULES if room(module) in WITHOUT_JAX or module in ("moejax", "moejax.cli", "moejax.config")
             if {name.split(".")[0] for name in imported(module, inside=False)} & {"jax", "flax"}}  # fmt: skip
    assert not wrong


def test_the_models_import_nothing_else_of_ours():
    assert not {(module, name) for module in MODULES if module.startswith("moejax.models")
                for name in imported(module) if name.split(".")[0] == "moejax" and not name.startswith("moejax.models")}  # fmt: skip


def test_rooms_print_nothing():
    """What they tell goes through moejax/progress.py: a command shows it. That one imports nothing that shows anything."""
    rooms = [m for m in MODULES if FLOOR[room(m)] < FLOOR["commands"] and room(m) != "base"] + ["moejax.progress"]
    shows = {m for m in rooms if {name.split(".")[0] for name in imported(m)} & {"rich"} or "moejax.terminal" in imported(m)}
    prints = {
        module
        for module in rooms
        for node in ast.walk(tree(MODULES[module]))
        if (isinstance(node, ast.Name) and node.id == "print") or (isinstance(node, ast.Attribute) and node.attr in ("stdout", "stderr"))
    }
    assert not shows and not prints


def test_nothing_of_the_tool_names_the_study_but_its_door():
    """As text, for `import_module`: the table of commands in cli.py, and nobody else."""
    naming = {
        module
        for module in MODULES
        if room(module) != "study"
        for node in ast.walk(tree(MODULES[module]))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("moejax.study")
    }
    assert naming == {"moejax.cli"}


def test_the_models_have_one_name():
    """`models` next to `moejax.models` would be every class twice."""
    files = [p for folder in ("moejax", "models", "tests", "benchmarks", "docs") for p in (ROOT / folder).rglob("*.py")]
    assert not [
        (file, name)
        for file in [*files, *ROOT.glob("*.py")]
        for node in ast.walk(tree(file))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""])
        if name.split(".")[0] == "models" and not (isinstance(node, ast.ImportFrom) and node.level)
    ]
    with pytest.raises(ImportError, match=r"import it as moejax\.models"):
        importlib.import_module("models")


FAMILY_IS_ASKED = {
    "moejax/commands/breakdown.py": "which of the study's two models stands beside a run",
    "moejax/estimator/fitting.py": "which of the study's two constants its equation has",
    "benchmarks/pytorch/contract.py": "which model the hand-written PyTorch stack is",
}


def asks_a_family(path):
    """Whether a file looks at which family an architecture is: its class, or its name or mixer in a comparison."""
    from moejax.models.config import FAMILIES

    classes, names = {family.__name__ for family in FAMILIES.values()}, {*FAMILIES, "mamba"}
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Compare):
            said = {n.value for n in ast.walk(node) if isinstance(n, ast.Constant)} & names
        elif isinstance(node, ast.MatchClass) or (isinstance(node, ast.Call) and getattr(node.func, "id", "") == "isinstance"):
            said = {getattr(n, "id", getattr(n, "attr", "")) for n in ast.walk(node)} & classes
        else:
            continue
        if said:
            return True
    return False


def test_only_a_familys_own_file_asks_which_family_it_is():
    """Whatever follows from an architecture is computed from its specs."""
    files = [*MODULES.values(), *(ROOT / "benchmarks").rglob("*.py")]
    asking = {str(p.relative_to(ROOT)) for p in files if asks_a_family(p)}
    assert {name for name in asking if not name.startswith("models/families/")} == set(FAMILY_IS_ASKED) and len(FAMILY_IS_ASKED) <= 3

"""Imports go one way: moejax.models.ops → moejax.models → the rest of moejax → train.py."""

import ast
import importlib

import pytest
from support import ROOT

FILES = sorted([*(ROOT / "models").rglob("*.py"), *(ROOT / "moejax").rglob("*.py")])


def imported(path):
    """Dotted names of everything a file imports."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def inside(folder, *but):
    """Dotted names of the modules and packages of a folder of the checkout."""
    package = "moejax" if folder == "moejax" else f"moejax.{folder}"
    return [f"{package}.{p.stem}" for p in (ROOT / folder).iterdir() if not p.stem.startswith("_") and p.stem not in but]


def forbidden_for(path):
    """Prefixes that a file may not import."""
    parts = path.relative_to(ROOT).parts
    if parts[:2] == ("models", "ops"):
        return [name for name in inside("models") if name != "moejax.models.ops"] + inside("moejax", "models")
    if parts[0] == "models" and parts[1] in ("config", "families", "foreign_settings.py"):
        rest = inside("models", "config", "families", "foreign_settings")
        return ["jax", "flax", *rest, *inside("moejax", "models")]
    if parts[0] == "models":
        return inside("moejax", "models")
    rules = {
        "data": ["jax", "flax", "moejax.training", "moejax.hub", "moejax.evaluation"],
        "hub": ["moejax.training", "moejax.evaluation"],
        "config.py": ["jax", "flax", "moejax.training", "moejax.hub", "moejax.data"],
        "profiling": ["moejax.training"],
        "estimator": ["jax", "flax", "moejax.training", "moejax.profiling"],
    }
    return [*rules.get(parts[1], []), *([] if parts[1] == "study" else ["moejax.study"]), "train"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    forbidden = forbidden_for(path)
    wrong = [name for name in imported(path) if any(name == f or name.startswith(f"{f}.") for f in forbidden)]
    assert not wrong


def test_the_door_alone_names_the_study():
    """As text for `import_module`: the table of commands in cli.py, and nobody else."""
    naming = [str(p.relative_to(ROOT / "moejax")) for p in FILES if any(
        isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith("moejax.study")
        for node in ast.walk(ast.parse(p.read_text()))
    ) and not p.is_relative_to(ROOT / "moejax/study")]  # fmt: skip
    assert naming == ["cli.py"]


def test_the_models_have_one_name():
    """`models` beside `moejax.models` would be every class twice."""
    tops = [p for p in sorted(ROOT.iterdir()) if not p.name.startswith(".")]
    ours = [p for top in tops for p in (sorted(top.rglob("*.py")) if top.is_dir() else [top] * (top.suffix == ".py"))]
    assert not [(str(p), name) for p in ours for name in imported(p) if name.split(".")[0] == "models"]
    with pytest.raises(ImportError, match=r"import it as moejax\.models"):
        importlib.import_module("models")


FAMILY_IS_ASKED = {
    "moejax/profiling/bars.py": "which of the study's two models stands beside a run",
    "moejax/estimator/fitting.py": "which of the study's two constants its equation has",
    "benchmarks/pytorch/contract.py": "which model the hand-written PyTorch stack is",
}


def asks_a_family(path):
    """Whether a file looks at which family an architecture is: its class, or its name or mixer in a comparison."""
    from moejax.models.config import FAMILIES

    classes, names = {family.__name__ for family in FAMILIES.values()}, {*FAMILIES, "mamba"}
    for node in ast.walk(ast.parse(path.read_text())):
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
    files = [*FILES, *(ROOT / "benchmarks").rglob("*.py")]
    asking = {str(p.relative_to(ROOT)) for p in files if asks_a_family(p)}
    assert {name for name in asking if not name.startswith("models/families/")} == set(FAMILY_IS_ASKED) and len(FAMILY_IS_ASKED) <= 3

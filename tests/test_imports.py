"""Imports go one way: models.ops → models → moejax → train.py."""

import ast

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


def forbidden_for(path):
    """Prefixes that a file may not import."""
    parts = path.relative_to(ROOT).parts
    if parts[:2] == ("models", "ops"):
        return [f"models.{p.stem}" for p in (ROOT / "models").glob("*.py") if p.stem != "__init__"] + ["moejax"]
    if parts[0] == "models":
        return ["moejax"]
    rules = {
        "data": ["jax", "flax", "moejax.training", "moejax.hub", "moejax.evaluation"],
        "hub": ["moejax.training", "moejax.evaluation"],
        "config.py": ["jax", "flax", "moejax.training", "moejax.hub", "moejax.data"],
        "profiling": ["moejax.training"],
        "reference": ["jax", "flax", "models", *(f"moejax.{part}" for part in ("config", "data", "hub", "training", "estimator"))],
        "estimator": ["jax", "flax", "moejax.training", "moejax.profiling"],
        "report": ["jax", "flax", "moejax.training", "moejax.profiling"],
    }
    return [*rules.get(parts[1], []), "train"]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_arrows(path):
    forbidden = forbidden_for(path)
    wrong = [name for name in imported(path) if any(name == f or name.startswith(f"{f}.") for f in forbidden)]
    assert not wrong

"""Which versions `make versions` installs, and what it says of a Python that is not there."""

import sys
import tomllib

import pytest
from packaging.requirements import Requirement
from support import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import versions

NEEDED = [Requirement(line) for line in tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]]


@pytest.mark.parametrize(("python", "count"), [("3.11", len(NEEDED)), ("3.13", 3)])
def test_the_lowest_are_what_the_project_allows(python, count):
    lowest = [Requirement(pin) for pin in versions.pins("lowest", python)]
    assert {"jax", "flax", "transformers"} <= {r.name for r in lowest} and len(lowest) == count and versions.pins("newest", python) == []
    for pin in lowest:
        (number,) = (s.version for s in pin.specifier)
        assert all(number in r.specifier for r in NEEDED if r.name == pin.name)


@pytest.mark.parametrize("stand_in", [None, "#!/bin/sh\nexit 127\n"])
def test_a_python_that_is_not_there_is_skipped(stand_in, tmp_path, monkeypatch):
    if stand_in is not None:
        (tmp_path / "python3.12").write_text(stand_in)
        (tmp_path / "python3.12").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert versions.tested("3.12", "lowest", tmp_path / "environments", []) == ("skipped: there is no python3.12", True)
    assert not (tmp_path / "environments").exists()

"""moejax as a wheel."""

import tomllib

import pytest
from support import ROOT

from moejax import installation
from moejax.errors import UserError
from moejax.study.characterize import environment, study


def test_the_wheel_holds_every_file_of_the_package():
    """By the patterns of pyproject.toml; models/ and configs/ are in it by links."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for name in ("models", "configs"):
        assert (ROOT / "moejax" / name).samefile(ROOT / name) and (ROOT / "moejax" / name).is_symlink()
    files = [path for folder in ("moejax", "models", "configs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    held = {".py", ".pyc", *(pattern.removeprefix("*") for pattern in patterns)}
    assert len(files) > 150 and not [str(path) for path in files if path.suffix not in held]


def test_what_needs_a_checkout_says_so(monkeypatch, tmp_path):
    """A pyproject.toml above the package may be another project's."""
    monkeypatch.chdir(tmp_path)
    asked = {"files": [], "overrides": [], "memory_limit": None, "pretrained": False}
    assert len(study.resolve("cpu-smoke", **asked).settings) == 2 and environment.git_commit()
    monkeypatch.setattr(installation, "PROJECT", tmp_path / "pyproject.toml")
    installation.PROJECT.write_text('[project]\nname = "another"\n')
    with pytest.raises(UserError, match=r"needs assets/tiny-mixtral, which is in a checkout of moejax and no wheel"):
        study.resolve("cpu-smoke", **asked)
    assert len(study.resolve("study-mixtral", **asked).settings) == 4 and environment.git_commit() is None
    assert installation.requirements() != [] and installation.requirements("profile")[0].startswith("xprof")

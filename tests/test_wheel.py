"""moejax as a wheel."""

import tomllib

from support import ROOT


def test_the_wheel_holds_every_file_of_the_package():
    """By the patterns of pyproject.toml; models/ and configs/ are in it by links."""
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["*"]
    for name in ("models", "configs"):
        assert (ROOT / "moejax" / name).samefile(ROOT / name) and (ROOT / "moejax" / name).is_symlink()
    files = [path for folder in ("moejax", "models", "configs") for path in (ROOT / folder).rglob("*") if path.is_file()]
    held = {".py", ".pyc", *(pattern.removeprefix("*") for pattern in patterns)}
    assert len(files) > 150 and not [str(path) for path in files if path.suffix not in held]

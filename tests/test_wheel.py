"""moejax as a wheel."""

import json
import math
import os
import shutil
import subprocess
import tomllib
import venv
import zipfile

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
    monkeypatch.setattr(installation, "PROJECT", tmp_path / "pyproject.toml")
    installation.PROJECT.write_text('[project]\nname = "another"\n')
    with pytest.raises(UserError, match=r"needs assets/tiny-mixtral, which is in a checkout of moejax and no wheel"):
        study.resolve("cpu-smoke", **asked)
    assert len(study.resolve("study-mixtral", **asked).settings) == 4 and environment.git_commit() is None
    assert installation.requirements() != [] and installation.requirements("profile")[0].startswith("xprof")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """As BUILD.md makes it: the source distribution, and the wheel of that."""
    folder = tmp_path_factory.mktemp("wheel")
    for name in ("moejax", "models", "configs"):
        shutil.copytree(ROOT / name, folder / "tree" / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy2(ROOT / name, folder / "tree" / name)
    _venv(folder / "builder", "build")
    _done([folder / "builder/bin/python", "-m", "build", "--outdir", folder, folder / "tree"])
    return next(folder.glob("*.whl"))


def _done(command, **options):
    """Standard output; a command that failed is shown. It sees nothing of the environment that the tests run in."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "XLA", "JAX", "MOEJAX"))}
    environment |= options.pop("env", {})
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, env=environment, **options)
    assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _venv(folder, *wanted):
    venv.create(folder, with_pip=True)
    _done([folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *wanted])


@pytest.mark.long
def test_the_wheel_holds_moejax_and_nothing_else(wheel):
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    there = {str(path.relative_to(ROOT)) for path in (ROOT / "moejax").rglob("*") if path.is_file() and path.suffix != ".pyc"}
    for name in ("models", "configs"):  # rglob follows no link
        there |= {f"moejax/{path.relative_to(ROOT)}" for path in (ROOT / name).rglob("*") if path.is_file() and path.suffix != ".pyc"}
    assert held == there


@pytest.mark.long
def test_the_wheel_outside_a_checkout(wheel, tmp_path):
    """An empty environment, an empty folder, no network: a config is written, a small model is trained whole, and tuned by QLoRA."""
    _venv(tmp_path / "env", wheel, "-c", ROOT / "constraints.txt")
    here = tmp_path / "here"
    here.mkdir()
    environment = {"HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "JAX_PLATFORMS": "cpu"}

    def moejax(*arguments):
        return _done([tmp_path / "env/bin/moejax", *arguments], cwd=here, env=environment)

    python = [tmp_path / "env/bin/python", "-c", "import moejax.models, importlib.util as u; print(moejax.__path__, u.find_spec('models'))"]
    told = _done(python, cwd=here, env=environment)
    assert str(tmp_path / "env") in told and told.endswith("None\n")
    records = ({"instruction": f"What is {i} plus {i}?", "output": f"It is {2 * i}."} for i in range(40))
    (here / "mine.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    short = ["data.max_length=64", "data.row_tokens=64", "data.holdout=8", "training.warmup_steps=0", "training.steps=2"]
    assert "moejax train tiny.yaml" in moejax("init", "tiny.yaml", "--model", "mixtral_tiny", "--data", "mine.jsonl")
    moejax("train", "tiny.yaml", *short)
    moejax("init", "tuned.yaml", "--model", "runs/tiny/model", "--data", "mine.jsonl")
    moejax("train", "tuned.yaml", *short, "training.compute_dtype=float32")
    lines = (here / "runs/tuned/metrics.jsonl").read_text().splitlines()
    assert all(math.isfinite(json.loads(line).get("loss", 0.0)) for line in lines) and (here / "runs/tuned/adapter").is_dir()
    moejax("generate", "runs/tuned", "--instruction", "What is 2 plus 2?", "--max-new-tokens", "2")
    moejax("export", "runs/tuned", "--out", "exported")
    assert "closed form" in moejax("estimate", "memory", "--config", "tuned.yaml", "--closed-form", "--gpu", "L4")
    assert "A100-80" in moejax("estimate", "memory", "--study", "--closed-form")
    assert "USD" in moejax("estimate", "predict", "--dataset", "math_14k", "--gpu", "H100")
    shutil.copytree(ROOT / "tests/study/report/fixtures/cpu_demo", here / "study")
    moejax("report", "study")
    assert "<html" in (here / "study/report.html").read_text()
    moejax("doctor")

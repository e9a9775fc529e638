"""What stands between a command and its user: any text, any standard output, any failure of the machine's."""

import ast
import io
import os
import subprocess
import sys

import jax
import pytest
from rich.table import Table
from support import ROOT

from moejax import cli, config, installation, streams
from moejax.commands import doctor
from moejax.errors import UserError
from moejax.terminal import Console

MARKED = "a [/b] of [red]:apple:[/]"


def test_marks_in_a_text_are_shown_as_they_stand(capsys):
    table = Table(MARKED, title=MARKED)
    table.add_row(MARKED)
    Console(width=80).print(MARKED, table)
    assert capsys.readouterr().out.count(MARKED) == 4


@pytest.mark.parametrize("path", sorted((ROOT / "moejax").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT)))
def test_nothing_prints_around_the_console(path):
    """rich's own console and print() take square brackets for markup."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module in ("rich", "rich.console"):
            assert path.name == "terminal.py"


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
def test_an_output_that_lacks_characters(encoding, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding=encoding))
    monkeypatch.setattr(sys, "stderr", None)  # closed, as by `2>&-`
    streams.prepare()
    table = Table("…")
    table.add_row("\udcff é")
    Console(width=40).print("compiling …", table)
    print("…", file=sys.stderr)
    sys.stdout.flush()
    assert b"compiling" in raw.getvalue() and b"? " in raw.getvalue()


def test_a_reader_that_goes_away_ends_nothing():
    """As in `| head -1`: what is left is done, and nobody sees a traceback."""
    script = (
        "import sys; from moejax import streams; from moejax.terminal import Console; streams.prepare(); c = Console()\n"
        "for i in range(9): c.print('x' * 99999, soft_wrap=True)\n"
        "print('done', file=sys.stderr)"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)}
    )
    child.stdout.close()
    assert child.stderr.read() == b"done\n" and child.wait() == 0


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        (OSError(28, "No space left on device", "runs/a/config.yaml"), "error: runs/a/config.yaml: No space left on device"),
        (OSError(36, "File name too long", "x" * 3), "error: xxx: File name too long"),
        (MemoryError("Unable to allocate 93 GiB"), "memory is full (Unable to allocate 93 GiB)"),
        ("\udcff".encode, r"'\udcff' holds bytes that are not UTF-8"),
        (
            jax.errors.JaxRuntimeError("INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot\nmore"),
            "error: XLA, in `moejax doctor`: INTERNAL: Couldn't find output tile sizes that satisfy hlo: %dot. Try rows of a multiple of",
        ),
        (lambda: jax.devices("no-such-device"), "error: no device for jax (JAX_PLATFORMS=cpu): Unknown backend no-such-device"),
    ],
)
def test_what_the_machine_refuses_is_one_message(failure, told, monkeypatch, capsys):
    def fail(_):
        if isinstance(failure, Exception):
            raise failure
        failure()

    monkeypatch.setattr(doctor, "run", fail)
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert cli.main(["doctor"]) == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"name: caf\xe9\n", "not UTF-8 text"),
        (b"name: a\ndata:\n\tsource: x\n", r"line 3: not valid YAML.*\(a tab"),
        (b"name: " + b"[" * 5000, "nested too deeply"),
        (b"", "got nothing: it is empty"),
        (b"<html>", "got '<html>'"),
        (b"name: a\ndata: {source: x}\ndata: {batch_rows: 2}\n", "line 3: not valid YAML: 'data' stands in it twice"),
        (b"name: 2026-13-45\n", "a value that YAML cannot read"),
        (b"seed: " + b"9" * 5000, "a value that YAML cannot read"),
    ],
)
def test_configs_that_are_no_configs(content, told, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=told):
        config.load(path)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_config_with_a_byte_order_mark(encoding, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text((ROOT / "configs/demo.yaml").read_text(), encoding=encoding)
    assert config.load(path) == config.load(ROOT / "configs/demo.yaml")


@pytest.mark.parametrize("checkout", [True, False])
def test_what_the_doctor_advises_works_as_installed(checkout, monkeypatch, tmp_path):
    """No path into a checkout: pip installs the very requirements, in a wheel's environment too."""
    if not checkout:
        monkeypatch.setattr(installation, "PROJECT", tmp_path / "pyproject.toml")
        listed = ["jax<0.13,>=0.10", "xprof<3,>=2.22 ; extra == 'profile'", 'jax[cuda12]<0.13,>=0.10; extra == "cuda12"']
        monkeypatch.setattr(installation.importlib.metadata, "requires", lambda _: listed)
    monkeypatch.setattr(doctor, "version", lambda name: None)
    (finding,) = doctor.plugin()
    assert finding.advice.startswith(f"{sys.executable} -m pip install 'xprof") and "-e" not in finding.advice
    assert "'jax[cuda12]==0." in doctor.gpu_install()
    assert f"{sys.executable} -m pip install 'jax" in installation.for_packages(["jax"])

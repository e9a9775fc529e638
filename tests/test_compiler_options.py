"""Loops in CUDA graphs are tried by a process of its own: right, wrong, dead or hanging, and the answer is remembered."""

import sys

import pytest

from moejax import compiler_options

RIGHT = "import sys; from moejax import compiler_options; sys.exit(compiler_options.main())"
WRONG = f"from moejax import compiler_options; compiler_options.difference = lambda options: 0.5; {RIGHT}"


@pytest.mark.parametrize(
    ("code", "fine", "why"),
    [(RIGHT, True, ""), (WRONG, False, "was wrong: by 0.5 of 1"), ("import os; os.kill(os.getpid(), 9)", False, "ended the process (-9)"),
     ("import time; time.sleep(60)", False, "did not end in 1 s")],
)  # fmt: skip
def test_a_verdict_is_found_and_kept(code, fine, why, tmp_path, monkeypatch):
    file = tmp_path / "cache" / "verdict.json"
    command, seconds = [sys.executable, "-c", code], 1.0 if "sleep" in code else 120.0
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    found = compiler_options.answer("driver 1", file, command, seconds)
    assert found[0] == fine and (fine or found[1] == why)
    assert compiler_options.answer("driver 1", file, ["nothing that could be run"])[0] == fine
    with pytest.raises(FileNotFoundError):
        compiler_options.answer("driver 2", file, ["nothing that could be run"])


def test_a_verdict_that_cannot_be_kept_is_reported(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert compiler_options.answer("driver 1", tmp_path / "file/verdict.json", [sys.executable, "-c", ""])[0]
    assert "file/verdict.json cannot be written (" in capsys.readouterr().err


def test_a_wrong_loop_would_be_seen(monkeypatch):
    """The program is one in which a tile that is left out shows."""
    import jax

    compiled = jax.jit

    def half(function, compiler_options=None):
        found = compiled(function)
        return found if compiler_options is None else lambda x, sizes: found(x, sizes // 16 * 8)

    assert compiler_options.difference({}) == 0
    monkeypatch.setattr(jax, "jit", half)
    assert compiler_options.difference({}) > 0.05


def test_a_run_keeps_its_loops_on_the_host_where_they_failed(monkeypatch):
    monkeypatch.setenv(compiler_options.VARIABLE, "0")
    kinds = str(compiler_options.gpu_options()["xla_gpu_enable_command_buffer"])
    assert "WHILE" not in kinds and kinds.endswith("CONDITIONAL")
    monkeypatch.setenv(compiler_options.VARIABLE, "1")
    assert compiler_options.gpu_options() == compiler_options.GPU_OPTIONS


def test_nothing_is_tried_without_a_gpu(monkeypatch, tmp_path):
    monkeypatch.delenv(compiler_options.VARIABLE, raising=False)
    monkeypatch.setattr(compiler_options, "answer", lambda *given: pytest.fail("tried"))
    for driver, platforms in ((False, ""), (True, "cpu")):
        monkeypatch.setattr(compiler_options, "_DRIVER", tmp_path if not driver else tmp_path / "version")
        (tmp_path / "version").write_text("NVRM version: 1\n")
        monkeypatch.setenv("JAX_PLATFORMS", platforms)
        compiler_options.settle()


def test_a_run_on_a_gpu_has_its_answer(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv(compiler_options.VARIABLE, raising=False)
    monkeypatch.setenv("JAX_PLATFORMS", "")
    monkeypatch.setattr(compiler_options, "_DRIVER", tmp_path / "version")
    (tmp_path / "version").write_text("NVRM version: 580\nmore\n")
    asked = []
    monkeypatch.setattr(compiler_options, "answer", lambda key, *rest: asked.append(key) or (False, "was wrong: by 0.5 of 1"))
    compiler_options.settle()
    compiler_options.settle()  # known to this process
    assert len(asked) == 1 and asked[0].startswith("NVRM version: 580, jaxlib ") and "loops stay on the host" in capsys.readouterr().err
    monkeypatch.setenv(compiler_options.VARIABLE, "0")  # so that it is taken back

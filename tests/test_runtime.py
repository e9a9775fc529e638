"""The folder of compiled programs: what is cut off, or of another version, is compiled again."""

import os
import subprocess
import sys
import warnings

from support import ROOT

from moejax import runtime

CHILD = """
import sys
from moejax import config, runtime
runtime.prepare_jax(config.DeviceConfig(compilation_cache=sys.argv[1]))
import jax._src.cache_key
assert jax._src.cache_key.jaxlib_version_str
jax._src.cache_key.jaxlib_version_str = sys.argv[2]
import jax, jax.numpy as jnp
print(float(jax.jit(lambda x: (jnp.sin(x) @ x).sum())(jnp.ones((64, 64)))))
"""


def start(folder, version="0.0.1"):
    """(what it computed, what it said) of a process with the folder of compiled programs."""
    clean = {k: v for k, v in os.environ.items() if k != "JAX_COMPILATION_CACHE_DIR"}
    environment = clean | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    done = subprocess.run([sys.executable, "-c", CHILD, str(folder), version], env=environment, capture_output=True, text=True, check=True)
    return done.stdout, done.stderr


def entries(folder):
    return {path.name: path.stat().st_size for path in folder.glob("*-cache")}


def test_an_entry_that_was_cut_off_is_compiled_anew_and_replaced(tmp_path):
    computed, said = start(tmp_path)
    whole = entries(tmp_path)
    assert said == "" and any(name.startswith("jit__lambda") for name in whole)
    for name in whole:
        os.truncate(tmp_path / name, 50)
    again, said = start(tmp_path)
    assert again == computed and entries(tmp_path).keys() == whole.keys() and min(entries(tmp_path).values()) > 50
    assert f"{tmp_path}: a compiled program of jit__lambda cannot be read (cut off?): compiled anew" in said and "Warning" not in said
    assert start(tmp_path) == (computed, "")


def test_what_another_version_left_is_not_found(tmp_path):
    computed, _ = start(tmp_path, "0.0.1")
    before = entries(tmp_path)
    assert start(tmp_path, "0.0.2") == (computed, "")
    after = entries(tmp_path)
    assert len(after) == 2 * len(before) and {name: after[name] for name in before} == before


def test_a_folder_that_is_full_is_told_once(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    runtime.replace_unreadable(tmp_path)
    for name, what in (("jit_a", "writing"), ("jit_b", "writing"), ("jit_c", "reading")):
        text = f"Error {what} persistent compilation cache entry for '{name}': OSError: [Errno 28] No space left on device"
        warnings.showwarning(UserWarning(text), UserWarning, "file", 1)
    assert capsys.readouterr().err == (
        f"warning: {tmp_path}: compiled programs are not kept for the next start: OSError: [Errno 28] No space left on device\n"
    )

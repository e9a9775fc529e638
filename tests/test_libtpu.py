"""A TPU's machine without one: its bus is a folder, its packages are what the metadata say."""

import importlib.metadata

import pytest

from moejax import installation, libtpu
from moejax.commands import doctor
from moejax.errors import UserError


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with eight chips of a v5e and Google's network card; `installed` is its libtpu."""
    for number in range(9):
        folder = tmp_path / f"0000:00:{number:02}.0"
        folder.mkdir()
        (folder / "vendor").write_text("0x1ae0\n")
        (folder / "device").write_text("0x0042\n" if number == 8 else "0x0063\n")
    monkeypatch.setattr(libtpu, "PCI", tmp_path)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    asked = ["jaxlib==0.10.2", 'libtpu==0.0.42.*; extra == "tpu"', 'libtpu==9.9; extra == "other"']
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: asked if name == "jax" else [])

    def installed(found):
        versions = {"jax": "0.10.2", "jaxlib": "0.10.2", "libtpu": found}
        monkeypatch.setattr(installation, "version", versions.get)
        monkeypatch.setattr(doctor, "version", versions.get)

    return installed


@pytest.mark.parametrize(
    ("installed", "wrong"),
    [(None, "no libtpu, without which jax 0.10.2 computes on the CPU"),
     ("0.0.41.1", "libtpu 0.0.41.1, and jax 0.10.2 asks for libtpu==0.0.42.*")],
)  # fmt: skip
def test_a_tpu_that_jax_cannot_use(machine, monkeypatch, installed, wrong):
    machine(installed)
    (found,) = doctor.tpu()
    assert (found.what, found.status, found.found) == ("TPU", "error", f"8 x v5e; {wrong}")
    assert "pip install 'jax[tpu]==0.10.2'" in found.advice
    with pytest.raises(UserError, match=r"this machine has a TPU \(8 x v5e\), but .*libtpu.*jax\[tpu\]==0.10.2.*JAX_PLATFORMS=cpu"):
        libtpu.check()
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    libtpu.check()


def test_a_tpu_that_jax_can_use(machine):
    machine("0.0.42.1")
    libtpu.check()
    assert [f[:3] for f in doctor.tpu()] == [("TPU", "ok", "8 x v5e, libtpu 0.0.42.1")]


def test_a_machine_without_a_tpu(machine, monkeypatch, tmp_path):
    """Nothing is told of a library that nobody needs; of one that compiles for TPUs, its version."""
    monkeypatch.setattr(libtpu, "PCI", tmp_path / "none")
    for installed, told in ((None, []), ("0.0.42.1", []), ("0.0.41.1", ["note"])):
        machine(installed)
        libtpu.check()
        assert [f.status for f in doctor.tpu()] == told

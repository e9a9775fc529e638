"""The TPU of this machine, and whether `libtpu`, which jax drives it with, is there in the version that jax asks for. No jax here."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from packaging.requirements import Requirement

from moejax import installation, tpus
from moejax.errors import UserError

PCI = Path("/sys/bus/pci/devices")
_VENDOR = "0x1ae0"  # Google; its network cards have it too


def here() -> str | None:
    """The chips of this machine by name, "8 x v5e"; None without a TPU of the table."""
    found = []
    for folder in sorted(PCI.glob("*")):
        try:
            vendor, device = ((folder / name).read_text(encoding="ascii").strip() for name in ("vendor", "device"))
        except (OSError, UnicodeDecodeError):
            continue
        found += [name for name, of_chip in tpus.PCI_DEVICES.items() if (vendor, device) == (_VENDOR, of_chip)]
    return f"{len(found)} x {found[0]}" if found else None


def asked() -> Requirement | None:
    """The libtpu that the installed jax asks for, as its extra `tpu` has it ("libtpu==0.0.42.*"); None where it says none."""
    try:
        listed = map(Requirement, importlib.metadata.requires("jax") or [])
    except importlib.metadata.PackageNotFoundError:
        return None
    return next((r for r in listed if r.name == "libtpu" and r.marker is not None and r.marker.evaluate({"extra": "tpu"})), None)


def problem() -> str | None:
    """What is wrong with libtpu: not there, or of another version than jax asks for, both named; None where nothing is."""
    installed, wanted = installation.version("libtpu"), asked()
    jax = f"jax {installation.version('jax')}"
    if installed is None:
        return f"no libtpu, without which {jax} computes on the CPU"
    if wanted is not None and not wanted.specifier.contains(installed, prereleases=True):
        return f"libtpu {installed}, and {jax} asks for libtpu{wanted.specifier}"
    return None


def check() -> None:
    """Before jax is imported. Raises UserError for a machine whose TPU jax could not use, unless JAX_PLATFORMS wants none."""
    platforms = os.environ.get("JAX_PLATFORMS", "")
    if (platforms and "tpu" not in platforms.split(",")) or (chips := here()) is None or (wrong := problem()) is None:
        return
    raise UserError(f"this machine has a TPU ({chips}), but {wrong}: {installation.for_extra('tpu')}; JAX_PLATFORMS=cpu does without it")

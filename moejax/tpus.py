"""TPU slices by name, "v5e-8": eight chips of a v5e. The chips' figures are their data sheets' (tpus.json); what `libtpu` calls a slice is
its topology. The number in a name is of cores, as Google Cloud has it: a v5p's chip has two (and is one device), so "v5p-8" is four chips.

A slice is a chip (a `GPU` of platform "tpu": one device of the estimator and of the compiler) and a number of them. No kernel, time or
price of a GPU is taken for it.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from pathlib import Path

from moejax.errors import UserError
from moejax.gpus import GPU

_TABLE = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
CHIPS: dict[str, GPU] = {
    name: GPU(
        name, c["memory_gb"], c["bandwidth_gb_per_second"] * 1e9, c["bf16_tflops"] * 1e12, name, cuda_name=c["device_kind"],
        device_bytes=c["device_bytes"], source=c["source"], platform="tpu",
    )
    for name, c in _TABLE.items()
}  # fmt: skip
PCI_DEVICES: dict[str, str] = {name: c["pci_device"] for name, c in _TABLE.items()}
"""Chip -> what the system calls it on the bus (jax's own table, jax/_src/hardware_utils.py)."""


@dataclass(frozen=True)
class Slice:
    """`count` chips; topology: libtpu's name of the smallest that holds them (a host has four chips: one chip is one of those)."""

    name: str
    chip: GPU
    count: int
    topology: str


SLICES: dict[str, Slice] = {
    s.name: s
    for name, c in _TABLE.items()
    for count, topology in c["topologies"].items()
    for s in (Slice(f"{name}-{c['cores'] * int(count)}", CHIPS[name], int(count), topology),)
}


def find(name: str) -> Slice | None:
    """The slice of this name, case and punctuation aside; None for what names no TPU. Raises UserError for an unknown slice."""
    plain = re.sub(r"[^a-z0-9]", "", name.lower().removeprefix("tpu"))
    match = re.fullmatch(r"(v\d+[a-z]*)(\d+)", plain)
    if match is None or not (match[1] in CHIPS or name.lower().startswith("tpu")):
        return None
    if (found := SLICES.get(f"{match[1]}-{match[2]}")) is not None:
        return found
    near = difflib.get_close_matches(f"{match[1]}-{match[2]}", SLICES, n=1, cutoff=0.4)
    raise UserError(f"unknown TPU {name!r}: {f'did you mean {near[0]}? ' if near else ''}expected one of {', '.join(SLICES)}")


def of(chip: GPU, count: int) -> Slice:
    """The slice of this many of a chip. Raises UserError where there is none."""
    there = [s for s in SLICES.values() if s.chip.name == chip.name]
    if (found := next((s for s in there if s.count == count), None)) is not None:
        return found
    names = ", ".join(f"{s.name} ({s.count})" for s in there)
    raise UserError(f"{count} TPU chips of {chip.name}: expected one of {names}")


def of_device_kind(device_kind: str) -> GPU | None:
    """The chip that jax names so ("TPU v5 lite"), or None."""
    return next((chip for chip in CHIPS.values() if chip.cuda_name == device_kind), None)

"""TPU slices by name, "v5e-8": eight chips of a v5e. The chips' figures are their data sheets' (tpus.json); what `libtpu` calls a slice is
its topology.

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
        device_bytes=c["device_bytes"], platform="tpu",
    )
    for name, c in _TABLE.items()
}  # fmt: skip


@dataclass(frozen=True)
class Slice:
    """`count` chips; topology: libtpu's name of the smallest that holds them (a host has four chips: one chip is one of those)."""

    chip: GPU
    count: int
    topology: str
    free_hours_per_week: float | None = None
    lender: str | None = None

    @property
    def name(self) -> str:
        return f"{self.chip.name}-{self.count}"


SLICES: dict[str, Slice] = {
    s.name: s
    for name, c in _TABLE.items()
    for count, topology in c["topologies"].items()
    for free in (c.get("free", {}).get(count, {}),)
    for s in (Slice(CHIPS[name], int(count), topology, free.get("hours_per_week"), free.get("lender")),)
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
    """The slice of so many of a chip. Raises UserError where there is none."""
    if (found := SLICES.get(f"{chip.name}-{count}")) is not None:
        return found
    there = [s.name for s in SLICES.values() if s.chip.name == chip.name]
    raise UserError(f"{count} TPU chips of {chip.name}: expected one of {', '.join(there)}")

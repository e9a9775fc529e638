"""Collectives of a compiled program: which instructions they are, what a device receives by them, and which of them data decide about.

Bytes are those of a ring: what is gathered, all other devices' parts; what is reduced and scattered, this device's part once from each
other; an all-reduce is both. The program is one device's, and every group is all devices (one mesh axis).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from moejax.profiling.program import CONTAINERS, Program, Trips, size

KINDS = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


@dataclass(frozen=True)
class Collective:
    """One kind's, of one device and step. bytes: received. seconds: from start to end; exposed: of these, without any other work."""

    count: float = 0.0
    bytes: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0

    def __add__(self, other: Collective) -> Collective:
        return Collective(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def _begun(program: Program, i: Any) -> Any:
    """The instruction itself; of one that only starts another, that one."""
    if i.opcode == "async-start":
        body = program.computations[i.called_computation_ids[0]]
        return next(inside for inside in body.instructions if inside.id == body.root_id)
    return i


def kind(program: Program, i: Any) -> str | None:
    """Of what instruction this is, where it is a collective or the start of one; what awaits it does nothing."""
    name = _begun(program, i).opcode.removesuffix("-start")
    return name if name in KINDS else None


def received(program: Program, i: Any, devices: int) -> float:
    """Bytes of one execution."""
    begun = _begun(program, i)
    given = sum(size(operand.shape) for operand in program.operands(begun))
    match begun.opcode.removesuffix("-start"):
        case "all-gather":
            return given * (devices - 1)
        case "all-reduce":
            return 2 * given * (devices - 1) / devices
        case "collective-permute":
            return given
        case _:
            return given * (devices - 1) / devices


def of_program(program: Program, devices: int, trips: Trips | None = None) -> dict[str, Collective]:
    """By kind, of one run of the program; trips: as of `Program.executions`."""
    found: dict[str, Collective] = defaultdict(Collective)
    for computation, count in program.executions({}, trips).items():
        for i in program.computations[computation].instructions:
            if i.opcode not in CONTAINERS and (name := kind(program, i)) is not None:  # what an async-start begins is counted in its body
                found[name] += Collective(count, count * received(program, i, devices))
    return dict(found)


def under_data(program: Program) -> list[str]:
    """Names of the collectives that a device runs or not as its own data say: in a branch, or in a loop whose trip count is data. There a
    device may meet another's other collective, and numbers are wrong without a word."""
    branches = {c for i in program.instructions.values() if i.opcode == "conditional" for c in _called(program, i)}
    return [
        i.name
        for computation in program.loops_of_data() | branches
        for i in program.computations[computation].instructions
        if i.opcode not in CONTAINERS and kind(program, i) is not None
    ]


def _called(program: Program, i: Any) -> Iterator[int]:
    """The computations that an instruction runs, and those that these run."""
    for called in i.called_computation_ids:
        yield called
        for inside in program.computations[called].instructions:
            if inside.opcode in CONTAINERS:
                yield from _called(program, inside)

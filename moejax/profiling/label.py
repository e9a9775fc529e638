"""Our scopes in TensorBoard's trace viewer: a CPU's trace names its events after XLA's instructions, e.g. dynamic-slice_bitcast_fusion.52.

The viewer shows an event's display name where there is one. It is added to the file: "moe/w1_dequant backward: dynamic-slice_…";
names, times and programs stay as they were. Above the threads stand two lines more: the step's phases, and its kinds of layer. A GPU's
trace carries scopes with its kernels, and the viewer draws lines of them.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from moejax.files import replacing
from moejax.profiling.program import CONTAINERS, Program
from moejax.profiling.scopes import OUTSIDE, Place
from moejax.profiling.xplane import MESSAGES, Trace

PLANE = "/device:CUSTOM:training step"
"""XLA's prefix of planes that the viewer draws above the host's threads."""
SHORTEST = 500
"""A block is at least this part of a step: XLA moves single instructions out of their phase."""


def label(path: Path, trace: Trace, program: str) -> int:
    """Name the events of `program` (the step's) in a CPU's trace file after their stage and phase. Returns how many instructions.

    `trace` is what was read from `path`. The file is replaced whole; a second time changes nothing.
    """
    if trace.platform != "cpu" or path.suffix != ".pb":
        return 0
    places: dict[str, Place] = {}
    containers: set[str] = set()
    ours = {number: module for number, module in trace.programs.items() if module.name == program}
    for module in ours.values():
        step = Program(module)
        for name, instruction in step.instructions.items():
            shares = step.shares(name)
            places[name] = max(shares, key=lambda place: shares[place])
            if instruction.opcode in CONTAINERS:
                containers.add(name)
    space = MESSAGES["XSpace"].FromString(path.read_bytes())
    labelled = 0
    for plane in space.planes:
        for entry in plane.event_metadata.values() if plane.name == "/host:CPU" else ():
            if (where := places.get(entry.name)) is not None:
                entry.display_name = f"{where.stage} {where.phase}: {entry.name}"
                labelled += 1
    events = [e for e in trace.events if e.program in ours and e.instruction in places and e.instruction not in containers]
    events.sort(key=lambda e: e.start)
    others = [plane for plane in space.planes if plane.name != PLANE]
    del space.planes[:]
    shortest = (events[-1].end - events[0].start) // (SHORTEST * max(1, len(trace.steps))) if events else 0
    lines = {
        title: blocks([(e.start, e.end, getattr(places[e.instruction], part)) for e in events], shortest)
        for title, part in (("phase", "phase"), ("kind of layer", "layer"))
    }
    space.planes.extend([*others, _plane(lines)])
    with replacing(path) as new:
        new.write_bytes(space.SerializeToString(deterministic=True))
    return labelled


Block = tuple[int, int, str]


def blocks(events: Iterable[Block], shortest: int = 0) -> list[Block]:
    """Runs of one name among (start, end, name), sorted by their starts: each ends where the next begins, or before. What has no name of
    ours ("other"), and runs of less than `shortest`, neither are runs nor end one."""
    found: list[Block] = []
    for start, end, name in events:
        if name == OUTSIDE:
            continue
        if found and found[-1][2] == name:
            found[-1] = found[-1][0], max(found[-1][1], end), name
            continue
        if found:
            found[-1] = found[-1][0], min(found[-1][1], start), found[-1][2]
        found.append((start, end, name))
    return blocks([b for b in found if b[1] - b[0] >= shortest]) if shortest else found


def _plane(lines: dict[str, list[Block]]) -> Any:
    plane = MESSAGES["XPlane"](name=PLANE)
    numbers: dict[str, int] = {}
    for number, (title, found) in enumerate(lines.items(), 1):
        begin = found[0][0] // 1000 if found else 0
        line = plane.lines.add(id=number, name=title, timestamp_ns=begin)
        for start, end, name in found:
            key = numbers.setdefault(name, len(numbers) + 1)
            line.events.add(metadata_id=key, offset_ps=start - begin * 1000, duration_ps=end - start)
    for name, key in numbers.items():
        plane.event_metadata[key].id = key
        plane.event_metadata[key].name = name
    return plane

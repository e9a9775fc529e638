"""Our scopes in TensorBoard's trace viewer: a CPU's trace names its events after XLA's instructions, e.g. dynamic-slice_bitcast_fusion.52.

The viewer shows an event's display name where there is one. It is added to the file: "moe/w1_dequant backward: dynamic-slice_…";
names, times and programs stay as they were. A GPU's trace carries scopes with its kernels, and the viewer draws lines of them.
"""

from __future__ import annotations

from pathlib import Path

from moejax.files import replacing
from moejax.profiling.program import Program
from moejax.profiling.xplane import MESSAGES, Trace


def label(path: Path, trace: Trace, program: str) -> int:
    """Name the events of `program` (the step's) in a CPU's trace file after their stage and phase. Returns how many instructions.

    `trace` is what was read from `path`. The file is replaced whole; a second time changes nothing.
    """
    names: dict[str, str] = {}
    for module in trace.programs.values():
        if module.name == program:
            step = Program(module)
            for name in step.instructions:
                shares = step.shares(name)
                largest = max(shares, key=lambda place: shares[place])
                names[name] = f"{largest.stage} {largest.phase}: {name}"
    if trace.platform != "cpu" or path.suffix != ".pb":
        return 0
    space = MESSAGES["XSpace"].FromString(path.read_bytes())
    labelled = 0
    for plane in space.planes:
        for entry in plane.event_metadata.values() if plane.name == "/host:CPU" else ():
            if entry.name in names:
                entry.display_name = names[entry.name]
                labelled += 1
    with replacing(path) as new:
        new.write_bytes(space.SerializeToString())
    return labelled

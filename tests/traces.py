"""Traces made by hand: events of our choosing over a program that XLA really compiled."""

from __future__ import annotations

import jax

from moejax.profiling.program import module_of
from moejax.profiling.xplane import MESSAGES, Event, Trace

PROGRAM = 7


def module(function, *arguments):
    """The optimized HloModuleProto of a jitted function."""
    return module_of(jax.jit(function).lower(*arguments).compile())


def leaves(module):
    """Names of the instructions that do work in the entry computation."""
    entry = next(c for c in module.computations if c.id == module.entry_computation_id)
    idle = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call"}
    return [i.name for i in entry.instructions if i.opcode not in idle]


def trace_of(path, module, spans, platform="cpu"):
    """A Trace with events (instruction, start, end) of one program, times in picoseconds."""
    trace = Trace(platform, path)
    trace.events = sorted((Event(start, end, name, PROGRAM, name) for name, start, end in spans), key=lambda e: e.start)
    trace.programs = {PROGRAM: module}
    return trace


class Plane:
    """Builds an XPlane: `line(name).add(event, start, end, **stats)`."""

    def __init__(self, space, name):
        self.plane = space.planes.add(name=name)
        self._events, self._stats = {}, {}

    def _key(self, table, metadata, name):
        if name not in table:
            table[name] = len(table) + 1
            metadata[table[name]].id, metadata[table[name]].name = table[name], name
        return table[name]

    def line(self, name):
        line = self.plane.lines.add(id=len(self.plane.lines), name=name)
        return lambda event, start, end, **stats: self._add(line, event, start, end, stats)

    def _add(self, line, event, start, end, stats):
        number = self._key(self._events, self.plane.event_metadata, event)
        added = line.events.add(metadata_id=number, offset_ps=start, duration_ps=end - start)
        for name, value in stats.items():
            stat = added.stats.add(metadata_id=self._key(self._stats, self.plane.stat_metadata, name))
            if isinstance(value, str):
                stat.str_value = value
            else:
                stat.uint64_value = value

    def program(self, module, number=PROGRAM):
        """Embed a program, as the profiler does in /host:metadata."""
        metadata = self.plane.event_metadata[number]
        metadata.id, metadata.name = number, f"{module.name}({number})"
        proto = MESSAGES["HloProto"](hlo_module=module)
        metadata.stats.add(metadata_id=self._key(self._stats, self.plane.stat_metadata, "Hlo Proto"), bytes_value=proto.SerializeToString())


def space():
    return MESSAGES["XSpace"]()


def saved(space, folder, host="host"):
    """Write a trace where a run keeps it; returns the file."""
    file = folder / "plugins" / "profile" / "2026_01_01" / f"{host}.xplane.pb"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(space.SerializeToString())
    return file


def cpu_space(product):
    """One operation that hands a task to another thread, and a marker."""
    made = space()
    Plane(made, "/host:metadata").program(product)
    host = Plane(made, "/host:CPU")
    name = leaves(product)[0]
    python, first, second = (host.line(n) for n in ("python", "tf_XLAEigen/1", "tf_XLAEigen/2"))
    python("train", 0, 100, step_num=4)
    first(name, 10, 30, hlo_op=name, program_id=PROGRAM)
    first("ThreadpoolListener::Record", 12, 12, _p=99)
    second("ThreadpoolListener::StartRegion", 20, 20, _c=99)
    second("end: " + name, 60, 61)
    second("ThreadpoolListener::StopRegion", 70, 70)
    first("ThreadpoolListener::Record", 35, 35, _p=98)  # handed out by nothing of ours
    return made, name


def gpu_space(product, gpus=1):
    """Kernels on two streams, a derived line, a copy that belongs to no instruction."""
    made = space()
    Plane(made, "/host:metadata").program(product)
    name = leaves(product)[0]
    for number in range(gpus):
        gpu = Plane(made, f"/device:GPU:{number}")
        compute, copies, derived = (gpu.line(n) for n in ("Stream #7(Compute)", "Stream #8(MemcpyD2D)", "XLA Ops"))
        stats = {"hlo_op": name, "program_id": PROGRAM, "tf_op": "jit(step)/jvp(layers)/while/body/moe/w1/dot_general:"}
        compute("sm90_gemm", 0, 100, **stats)
        compute("sm90_gemm", 100, 200, **stats)
        copies("MemcpyD2D", 150, 250)
        derived(name, 0, 200, **stats)
    Plane(made, "/host:CPU").line("python")("train", 0, 90, step_num=1)
    return made

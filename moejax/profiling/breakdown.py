"""Where a step's time goes: a trace's events, by phase and stage.

Wall time is partitioned. At every instant the operations that run share it equally; a loop or a call, which only runs other
operations, has what is left when none of these runs. So nothing counts twice, and all phases together are the time in which the
device was busy; the rest of a step is "idle". Everything here comes from the trace's file alone.

Of several devices each has its own partition, and all figures are of the mean device. What goes between them (collectives) has, like a
loop, only the time in which its device does nothing else: that is exposed; the rest of it is overlapped.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from typing import Any

from moejax.errors import UserError
from moejax.profiling import collectives, schema, scopes
from moejax.profiling.collectives import Collective
from moejax.profiling.program import CONTAINERS, Cost, Program
from moejax.profiling.scopes import COLLECTIVES, NOWHERE, OUTSIDE, Place
from moejax.profiling.times import Times, partition
from moejax.profiling.xplane import Event, Trace

PICO = 1e-12


@dataclass(frozen=True)
class Breakdown(Times):
    """All times in seconds per step, all costs per step."""

    program: str  # the step's program
    platform: str
    costs: dict[Place, Cost]
    mixed_seconds: float  # what fusions that mix stages or phases were split off their largest part, by their instructions' own cost
    unnamed: list[tuple[str, float]]  # the longest under none of our scopes: path or instruction, seconds
    collectives: dict[str, Collective]  # by kind
    working: dict[int, float]  # device -> seconds per step in which it did anything but collectives

    @property
    def profiled_collectives(self) -> dict[str, schema.Collective]:
        """As step_profile.json has them."""
        return {
            kind: schema.Collective(
                count=c.count, bytes=c.bytes, exposed_seconds=c.exposed_seconds, overlapped_seconds=c.seconds - c.exposed_seconds
            )
            for kind, c in self.collectives.items()
        }

    @property
    def cost(self) -> dict[str, Cost]:
        """By stage."""
        total: dict[str, Cost] = defaultdict(Cost)
        for where, cost in self.costs.items():
            total[where.stage] += cost
        return dict(total)


def analyze(trace: Trace) -> Breakdown:
    """The breakdown of a trace's steps. Raises UserError if the trace holds a compilation, or no whole step."""
    if trace.compiled:
        raise UserError(
            f"{trace.path}: a program was compiled while the trace was taken, so its steps are no steady steps. Profile later ones "
            "(profile.start_step), or use a batching that compiles once (pack, fixed)"
        )
    programs = {number: Program(module) for number, module in trace.programs.items()}
    name = _step_program(trace, programs)
    ours = {number for number, program in programs.items() if program.name == name}
    runs = _runs(trace, programs, ours)
    start, end = _window(trace, ours)
    events = [e for e in trace.events if e.end > start and e.start < end]
    start, end = min(start, *(e.start for e in events)), max(end, *(e.end for e in events))
    devices = sorted({e.device for e in events if e.program in ours})
    steps = len(trace.steps) or runs // len(devices)
    each = 1 / (steps * len(devices))  # of a sum over all steps and devices, the mean
    seconds: dict[Place, float] = defaultdict(float)
    unnamed: dict[str, float] = defaultdict(float)
    counts: dict[int, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    between: dict[str, Collective] = defaultdict(Collective)
    working: dict[int, float] = dict.fromkeys(devices, 0.0)
    mixed = 0.0
    for device in devices:
        own = [e for e in events if e.device == device]
        kinds = [_collective(e, programs) for e in own]
        last = [kind is not None or _is_container(e, programs) for e, kind in zip(own, kinds, strict=True)]
        for event, kind, time in zip(own, kinds, partition(own, last), strict=True):
            if event.program in ours:
                counts[event.program][event.instruction] += each
            shares = _shares(event, programs, ours)
            if kind is not None:
                program = programs[event.program]
                received = collectives.received(program, program.instructions[event.instruction], len(devices))
                between[kind] += Collective(each, received * each, (event.end - event.start) * PICO * each, time * PICO * each)
                shares = {_between(where): share for where, share in shares.items()}
            else:
                working[device] += time * PICO / steps
            mixed += time * PICO * each * (1 - max(shares.values()))
            for where, share in shares.items():
                seconds[where] += time * share * PICO * each
                if where.stage == OUTSIDE:
                    unnamed[_label(event, programs)] += time * share * PICO * each
    costs: dict[Place, Cost] = defaultdict(Cost)
    for number in ours & counts.keys():
        # Programs of several batch shapes take turns: each counts by its share of the steps.
        weight = _runs(trace, programs, {number}) / runs
        for where, cost in programs[number].costs({k: v / weight for k, v in counts[number].items()}).items():
            costs[where] += cost.times(weight * runs * each)
    longest = sorted(unnamed.items(), key=lambda item: -item[1])
    return Breakdown(
        steps, (end - start) * PICO / steps, dict(seconds), name, trace.platform, dict(costs), mixed, longest[:20], dict(between), working
    )


def _collective(event: Event, programs: dict[int, Program]) -> str | None:
    """Its kind, where it is one."""
    program = programs.get(event.program)
    instruction = None if program is None else program.instructions.get(event.instruction)
    return None if program is None or instruction is None else collectives.kind(program, instruction)


def _between(where: Place) -> Place:
    """Where a collective under this path counts: next to its layer's own stages, whose rates it has no part in."""
    return Place(COLLECTIVES, where.stage if where.stage == OUTSIDE else f"{where.layer}/{COLLECTIVES}")


def _step_program(trace: Trace, programs: dict[int, Program]) -> str:
    """Name of the program that ran longest."""
    times: Counter[str] = Counter()
    for event in trace.events:
        if event.program in programs:
            times[programs[event.program].name] += event.end - event.start
    if not times:
        raise UserError(
            f"{trace.path} does not hold the programs that its events belong to, so nothing can be said of them: take the trace with "
            "jax.profiler on the machine that ran them, and keep the file whole"
        )
    return times.most_common(1)[0][0]


def _runs(trace: Trace, programs: dict[int, Program], ours: set[int]) -> int:
    """How often these programs ran: the commonest number of events among the instructions that run once per run."""
    total = 0
    for number in ours:
        once = {i.name for i in programs[number].computations[programs[number].entry].instructions}
        counts = Counter(event.instruction for event in trace.events if event.program == number and event.instruction in once)
        total += Counter(counts.values()).most_common(1)[0][0] if counts else 0
    if not total:
        raise UserError(f"{trace.path} holds no whole step: profile more steps (profile.steps)")
    return total


def _window(trace: Trace, ours: set[int]) -> tuple[int, int]:
    """Start and end of what is looked at: the marked steps, else the step program's first and last event. On a GPU, which runs
    behind the host, the end is the last event's in any case."""
    own = [e for e in trace.events if e.program in ours]
    start, end = own[0].start, max(e.end for e in own)
    if trace.steps:
        start = min(start, trace.steps[0].start)
        end = max(end, trace.steps[-1].end) if trace.platform == "cpu" else end
    return start, end


def _is_container(event: Event, programs: dict[int, Program]) -> bool:
    instruction = programs[event.program].instructions.get(event.instruction) if event.program in programs else None
    return instruction is not None and instruction.opcode in CONTAINERS


def _shares(event: Event, programs: dict[int, Program], ours: set[int]) -> dict[Place, float]:
    """By the program; where that knows no stage, by the path that a GPU's event itself may carry."""
    shares = {NOWHERE: 1.0}
    if event.program in ours and event.instruction in programs[event.program].instructions:
        shares = programs[event.program].shares(event.instruction)
    if event.op_name and event.program in ours | {0} and all(where.stage == OUTSIDE for where in shares):
        return {scopes.place(event.op_name): 1.0}
    return shares


def _label(event: Event, programs: dict[int, Program]) -> str:
    program = programs.get(event.program)
    instruction: Any = None if program is None else program.instructions.get(event.instruction)
    path = event.op_name or (instruction.metadata.op_name if instruction is not None else "")
    return path or event.instruction or event.kernel

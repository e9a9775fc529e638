"""Where a PyTorch step's time goes: torch.profiler's trace, by the phases and stages of `scopes`. Python's library alone.

The program marks its scopes (`benchmarks/pytorch/tracing.py`): annotations "moejax:" + "step", "phase/forward", "phase/backward", or a
stage. Phases: a stage inside the backward pass is recomputation, since only a checkpointed forward pass runs there; an autograd node
belongs to the stage of the forward operation that made it (same sequence number: one thread runs the forward pass). On a CPU every
instant of a step counts for the innermost thing that runs, Python between operations included; on a GPU a kernel counts for the
operation that launched it.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from moejax.errors import UserError
from moejax.profiling.scopes import NOWHERE, OUTSIDE, SCOPES, Place
from moejax.profiling.times import Times, partition

MARK = "moejax:"
STAGES = {name for layer, parts in SCOPES.items() for name in (layer, *(f"{layer}/{part}" for part in parts))}
NODE = "autograd::engine::evaluate_function"
_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
_READ = ("cpu_op", "user_annotation", *_DEVICE)
_NUMBERS = ("Sequence number", "External id")
_MICRO = 1e-6

# What the MoE block itself calls, outside its modules: transformers writes these steps as plain functions.
_IN_MOE = {
    "router": ("softmax", "div_", "div", "sum", "sigmoid"),
    "topk": ("topk", "sort"),
    "dispatch": ("one_hot", "where", "nonzero", "index", "greater", "gt", "permute", "histc", "argsort", "cumsum", "bincount"),
    "combine": ("index_add_", "index_add", "mul", "zeros", "zeros_like", "new_zeros"),
    "act": ("silu", "gelu"),
}  # fmt: skip
_BY_NAME = {f"aten::{name}": f"moe/{part}" for part, names in _IN_MOE.items() for name in names} | {
    "aten::linear": "moe/w1", "aten::_grouped_mm": "moe/w1",
}  # fmt: skip


@dataclass
class Event:
    """A span on a thread, in microseconds. place: where its own time counts, once that is known."""

    name: str
    kind: str
    thread: Any
    start: float
    end: float
    sequence: int | None
    external: int | None
    own: float = 0.0
    place: Place = NOWHERE
    children: list[Event] = field(default_factory=list)
    tasks: tuple[()] = ()  # of other threads: none is known


def read(path: Path) -> list[dict[str, Any]]:
    """The events of a trace (`export_chrome_trace`, .json or .json.gz). Raises UserError."""
    if not path.is_file():
        raise UserError(f"{path} does not exist (expected a trace of torch.profiler)")
    try:
        opened: Any = gzip.open if path.suffix == ".gz" else open
        with opened(path, "rt", encoding="utf-8") as file:
            events = json.load(file)["traceEvents"]
    except (OSError, EOFError, ValueError, KeyError, TypeError, RecursionError, zlib.error) as error:
        raise UserError(f"{path} is no trace of torch.profiler, or is cut off ({type(error).__name__})") from None
    wrong = next((n for n, e in enumerate(events) if not _whole(e)), None) if isinstance(events, list) else 0
    if wrong is not None:
        raise UserError(f"{path}: event {wrong} of its traceEvents is none that torch.profiler writes: damaged, or of another program?")
    return list(events)


def _whole(event: Any) -> bool:
    """Whether an event that is looked at has the fields that are read, with values of their types."""
    if not isinstance(event, dict):
        return False
    if event.get("ph") != "X" or event.get("cat") not in _READ:
        return True
    values, times = event.get("args", {}), (event.get("ts"), event.get("dur"))
    return (
        isinstance(event.get("name"), str) and isinstance(event.get("tid"), int | str) and isinstance(values, dict)
        and all(isinstance(time, int | float) and abs(time) < 1e18 for time in times)
        and all(isinstance(values.get(key), int | None) for key in _NUMBERS)
    )  # fmt: skip


def analyze(raw: list[dict[str, Any]]) -> Times:
    """Raises UserError if the trace holds no marked step."""
    threads, device = _events(raw)
    steps = [e for events in threads.values() for e in events if e.name == f"{MARK}step"]
    if not steps:
        raise UserError(f"the trace holds no step marked {MARK}step: take it with benchmarks/torch_run.py --profile")
    roots = {thread: _nest(events) for thread, events in threads.items()}
    # The thread that runs the steps first: autograd's own thread asks where a node was made.
    external = _place([roots[thread] for thread in sorted(roots, key=lambda t: t != steps[0].thread)])
    inside = [(s.start, s.end) for s in steps]
    seconds: dict[Place, float] = defaultdict(float)
    scale = _MICRO / len(steps)
    if device:
        for event, time in zip(device, partition(device, [False] * len(device)), strict=True):
            seconds[external.get(event.external or -1, NOWHERE)] += time * scale
        start, end = min(e.start for e in device), max(e.end for e in device)
        whole = max(end, steps[-1].end) - min(start, steps[0].start)
    else:
        for event in threads[steps[0].thread]:
            if any(start <= event.start and event.end <= end for start, end in inside):
                seconds[event.place] += event.own * scale
        whole = sum(end - start for start, end in inside)
    return Times(len(steps), whole * scale, dict(seconds))


def _events(raw: list[dict[str, Any]]) -> tuple[dict[Any, list[Event]], list[Event]]:
    """Host events by thread, in order of their start, and the device's."""
    threads: dict[Any, list[Event]] = defaultdict(list)
    device = []
    for e in raw:
        kind = e.get("cat")
        if e.get("ph") != "X" or kind not in _READ:
            continue
        values = e.get("args", {})
        start, numbers = float(e["ts"]), [values.get(key) for key in _NUMBERS]
        event = Event(e["name"], kind, e["tid"], start, start + float(e["dur"]), *numbers)
        if kind in _DEVICE:
            device.append(event)
        elif kind == "cpu_op" or event.name.startswith(MARK):
            threads[event.thread].append(event)
    for events in threads.values():
        events.sort(key=lambda e: (e.start, -e.end))
    return threads, device


def _nest(events: list[Event]) -> list[Event]:
    """The outermost events; every event gets its children and its own time."""
    roots: list[Event] = []
    stack: list[Event] = []
    for event in events:
        while stack and stack[-1].end <= event.start:
            stack.pop()
        event.own = event.end - event.start
        if stack:
            stack[-1].children.append(event)
            # Times are rounded: a child may end a little after its parent.
            stack[-1].own -= min(event.end, stack[-1].end) - event.start
        else:
            roots.append(event)
        stack.append(event)
    return roots


def _place(threads: list[list[Event]]) -> dict[int, Place]:
    """Give every event of these threads (their outermost events) its place. Returns those of external ids."""
    made: dict[int, Place] = {}  # by sequence number
    external: dict[int, Place] = {}
    last = NOWHERE  # the node before, for nodes that no operation made

    def place(event: Event, outer: Place, backward: bool) -> None:
        """backward: inside the backward pass."""
        nonlocal last
        here = outer
        if event.kind == "user_annotation":
            name = event.name.removeprefix(MARK)
            if name.startswith("phase/"):
                here, backward = Place(name.partition("/")[2], OUTSIDE), name == "phase/backward"
            elif name == "optimizer":
                here = Place("optimizer", "optimizer")
            elif name in STAGES:
                here = Place("recompute" if backward else "forward", name)
        elif event.name.startswith(NODE):
            found = made.get(event.sequence) if event.sequence is not None else None
            here, backward = Place("backward", (found or last).stage), True
            last = here
        else:
            here = Place(outer.phase, _refined(outer.stage, event.name))
            if here.phase == "forward" and event.sequence is not None:
                # Of several operations with one number the last to begin made the node: its wrappers peeked at the number before it.
                made[event.sequence] = here
        if event.external is not None:
            external[event.external] = here
        event.place = here
        for child in event.children:
            place(child, here, backward)

    for roots in threads:
        last = NOWHERE
        for event in roots:
            place(event, NOWHERE, False)
    return external


def _refined(stage: str, name: str) -> str:
    """The stage of an operation called `name` under `stage`: dequantization, and the steps of an MoE block that are no modules."""
    if "dequantize" in name:
        if stage.startswith("moe/"):
            return stage if stage.endswith("_dequant") else f"{stage}_dequant"
        return f"{stage}/dequant" if f"{stage}/dequant" in STAGES else stage
    return _BY_NAME.get(name, stage) if stage == "moe" else stage

"""Matrix FLOPs of a compiled module, counted along the loops that it really runs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field

_COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{$")
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\((.*)$")
_SHAPE = re.compile(r"^\w+\[([\d,]*)\]")
_CALLED = re.compile(r"(?:calls|to_apply|body|branch_computations)=(?:\{([^}]*)\}|(%?[\w.\-]+))")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CONTRACTING = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")
_OP_NAME = re.compile(r'op_name="([^"]*)"')


@dataclass
class _Computation:
    dots: list[tuple[str, float]] = field(default_factory=list)  # (op_name, FLOPs)
    calls: list[tuple[str, str, int | None, str]] = field(default_factory=list)  # (kind, callee, trips, op_name)


def dot_flops(
    module_text: str, unknown_trips: Callable[[str], float] | None = None, counted: Callable[[str], bool] | None = None
) -> float:
    """FLOPs of all matrix products of an optimized HLO module (`compiled.as_text()`), 2 per multiply-add.

    A loop of known trip count counts its body so often. For one whose trip count depends on data, `unknown_trips(op_name)` gives the
    (mean) number; without it a ValueError is raised. `counted(op_name)` restricts the sum to products of some scopes. Conditional
    branches are not resolved: a ValueError says so.
    """
    computations, entry = _parse(module_text)

    def total(name: str) -> float:
        computation = computations[name]
        flops = sum(f for op_name, f in computation.dots if counted is None or counted(op_name))
        for kind, callee, trips, op_name in computation.calls:
            if kind == "conditional":
                raise ValueError(f"{op_name}: a conditional's branch is not known")
            inner = total(callee)
            if inner and kind == "while" and trips is None:
                if unknown_trips is None:
                    raise ValueError(f"{op_name}: a loop's trip count is not known")
                flops += inner * unknown_trips(op_name)
            else:
                flops += inner * (trips or 1)
        return flops

    return total(entry)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
    computations: dict[str, _Computation] = {}
    shapes: dict[str, list[int]] = {}
    entry, current = "", _Computation()
    for line in text.splitlines():
        header = _COMPUTATION.match(line)
        if header:
            current = computations[header[2]] = _Computation()
            shapes = {}
            entry = header[2] if header[1] else entry
            continue
        instruction = _INSTRUCTION.match(line)
        if not instruction:
            continue
        name, result, opcode, rest = instruction.groups()
        shape = _SHAPE.match(result)
        if shape:
            shapes[name] = [int(n) for n in shape[1].split(",") if n]
        label = _OP_NAME.search(line)
        op_name = label[1] if label else ""
        if opcode == "dot":
            operand = re.match(r"(?:\w+\[[\d,]*\]\S* )?%?([\w.\-]+)", rest)
            contracting = _CONTRACTING.search(line)
            if operand is None or contracting is None:
                raise ValueError(f"unreadable dot: {line.strip()[:120]}")
            lhs = shapes[operand[1]]
            depth = math.prod(lhs[int(d)] for d in contracting[1].split(",") if d)
            current.dots.append((op_name, 2.0 * math.prod(shapes[name]) * depth))
        called = _CALLED.search(line)
        if called and opcode in ("fusion", "call", "while", "conditional"):
            trips = _TRIPS.search(line)
            for callee in (called[1] or called[2]).split(", "):
                current.calls.append((opcode, callee.lstrip("%"), int(trips[1]) if trips else None, op_name))
    return computations, entry

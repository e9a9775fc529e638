"""Collectives of a program by hand: kinds, bytes by arithmetic, exposed and overlapped time, and those that data decide about."""

from dataclasses import replace
from pathlib import Path

import pytest
from traces import trace_of

from moejax.profiling import bars, collectives, traced
from moejax.profiling.breakdown import analyze
from moejax.profiling.collectives import Collective
from moejax.profiling.program import Program
from moejax.profiling.xplane import MESSAGES

TRIPS = b'{"known_trip_count":{"n":"3"}}'
# computation -> (instruction, opcode, fp32 numbers, operands, what it calls, path); the last instruction is the root
STEP = {
    "scattered": [("given", "parameter", 64, [], [], ""), ("scatter", "reduce-scatter", 16, ["given"], [], "")],
    "condition": [("below", "parameter", 1, [], [], "")],
    "body": [
        ("x", "parameter", 16, [], [], ""),
        ("gather", "all-gather-start", 64, ["x"], [], "jit(step)/jvp(layers)/moe/w1/all_gather"),
        ("gathered", "all-gather-done", 64, ["gather"], [], ""),
        ("sine", "sine", 64, ["gathered"], [], "jit(step)/jvp(layers)/moe/w1/sin"),
        ("start", "async-start", 16, ["sine"], ["scattered"], ""),
        ("done", "async-done", 16, ["start"], [], ""),
    ],
    "branch": [("chosen", "parameter", 16, [], [], ""), ("within", "all-reduce", 16, ["chosen"], [], "")],
    "main": [
        ("argument", "parameter", 16, [], [], ""),
        ("loop", "while", 16, ["argument"], ["condition", "body"], ""),
        ("sum", "all-reduce", 16, ["loop"], [], "jit(step)/psum"),
    ],
}
BRANCHED = STEP | {"main": [*STEP["main"], ("choice", "conditional", 16, ["sum"], ["branch"], "")]}


def module(computations, trips=TRIPS):
    made = MESSAGES["HloModuleProto"](name="jit_step", entry_computation_id=len(computations))
    numbers = {name: number for number, name in enumerate(computations, 1)}
    ids = {line[0]: 10 + n for n, line in enumerate(line for lines in computations.values() for line in lines)}
    for name, lines in computations.items():
        computation = made.computations.add(id=numbers[name], root_id=ids[lines[-1][0]])
        for instruction, opcode, size, operands, called, path in lines:
            i = computation.instructions.add(name=instruction, id=ids[instruction], opcode=opcode)
            i.shape.element_type, i.metadata.op_name, i.backend_config = 11, path, trips if opcode == "while" else b""
            i.shape.dimensions.append(size)
            i.operand_ids.extend(ids[o] for o in operands)
            i.called_computation_ids.extend(numbers[c] for c in called)
    return made


def test_bytes_are_those_of_a_ring():
    """Of 4 devices: three others' 64 bytes; three quarters of 256; twice three quarters of 64. Loops count."""
    found = collectives.of_program(Program(module(STEP)), 4)
    assert found == {"all-gather": Collective(3, 3 * 3 * 64), "reduce-scatter": Collective(3, 3 * 192), "all-reduce": Collective(1, 96)}


def test_a_branch_and_a_loop_of_data_are_told():
    assert collectives.under_data(Program(module(STEP))) == []
    assert collectives.under_data(Program(module(BRANCHED))) == ["within"]
    assert sorted(collectives.under_data(Program(module(STEP, trips=b"")))) == ["gather", "scatter"]


def test_exposed_is_what_nothing_else_hides():
    """Two devices: a gather alone, then half hidden by a sine; what awaits a scatter is counted where that began."""
    spans = [("loop", 0, 100), ("gather", 0, 40), ("sine", 30, 70), ("start", 60, 90), ("sum", 100, 110)]
    trace = trace_of(Path("by hand"), module(STEP), spans)
    trace.events += [replace(event, device=1) for event in trace.events]
    b = analyze(trace)
    each = {kind: (c.seconds, c.exposed_seconds) for kind, c in b.collectives.items()}
    assert each["all-gather"] == pytest.approx((40e-12, 30e-12)) and each["all-reduce"] == pytest.approx((10e-12, 10e-12))
    assert each["reduce-scatter"] == pytest.approx((30e-12, 20e-12))
    assert b.phases["collectives"] == pytest.approx(60e-12) and b.sums("stage", "forward") == pytest.approx({"moe/w1": 40e-12})
    assert b.sums("stage", "collectives") == pytest.approx({"moe/collectives": 50e-12, "other": 10e-12})
    assert bars._order([bars.Bars("several", b.phases, b.layers, b.moe_kernels)], "phases") == ["forward", "other", "collectives"]
    assert b.busy_seconds == pytest.approx(110e-12) and b.phases["idle"] == 0 and b.steps == 1
    assert b.working == pytest.approx({0: 50e-12, 1: 50e-12})  # with what the loop itself takes at its end
    assert b.collectives["all-gather"].bytes == 64  # of two devices the other's
    assert b.profiled_collectives["all-gather"].overlapped_seconds == pytest.approx(10e-12)


def test_experts_over_devices_are_as_uneven_as_their_tokens():
    assert traced.imbalance({"0": [4.0, 2.0, 1.0, 1.0], "1": [3.0, 1.0, 2.0, 2.0], "2": [0.0] * 4}, 2) == {"0": 1.5, "1": 1.0, "2": 1.0}

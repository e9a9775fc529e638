"""Wall time to phases and stages: by hand, on synthetic programs, and on a real trace that is kept here."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from support import VECTORS
from traces import PROGRAM, leaves, module, trace_of

from moejax.errors import UserError
from moejax.profiling import breakdown, xplane
from moejax.profiling.breakdown import analyze, partition
from moejax.profiling.program import Program
from moejax.profiling.scopes import Place
from moejax.profiling.xplane import Event, StepMarker

HERE = Path("made by hand")


def events(*spans):
    return [Event(start, end, f"i{n}", 0, "", "", tuple(tasks)) for n, (start, end, *tasks) in enumerate(spans)]


def test_partition_shares_what_overlaps():
    assert partition(events((0, 100), (50, 150)), [False, False]) == [75, 75]
    assert partition(events((0, 10), (20, 30)), [False, False]) == [10, 10]


def test_partition_gives_a_container_only_what_is_left():
    assert partition(events((0, 100), (10, 40), (50, 60)), [True, False, False]) == [60, 30, 10]
    # of nested containers the innermost
    assert partition(events((0, 100), (20, 80), (30, 70)), [True, True, False]) == [40, 20, 40]


def test_partition_counts_tasks_on_other_threads():
    # The second operation runs alone at first, then next to two tasks of the first.
    assert partition(events((0, 10, (10, 40), (20, 40)), (10, 40)), [False, False]) == pytest.approx([10 + 5 + 40 / 3, 5 + 20 / 3])


def two_stages(x, y):
    with jax.named_scope("attention"):
        small = x @ x
    with jax.named_scope("moe"), jax.named_scope("w1"):
        return small, y @ y


def test_known_proportions():
    """A stage with 4 times the matrix product of another shows it, in FLOPs and in the time of its events."""
    program = module(two_stages, jnp.ones((64, 64)), jnp.ones((64, 256)) @ jnp.ones((256, 64)))
    program = module(lambda x, y: (two_stages(x, x)[0], _wide(y)), jnp.ones((64, 64)), jnp.ones((64, 256)))
    places = {name: Program(program).shares(name) for name in leaves(program)}
    by_stage = {next(iter(p)).stage: name for name, p in places.items()}
    spans = [(by_stage["attention"], 0, 100), (by_stage["moe/w1"], 100, 500)]
    b = analyze(trace_of(HERE, program, spans))
    assert b.sums("stage") == {"moe/w1": pytest.approx(400e-12), "attention": pytest.approx(100e-12)}
    assert b.cost["moe/w1"].flops == 4 * b.cost["attention"].flops == 4 * 2 * 64**3
    assert b.attributed == 1 and b.phases["idle"] == 0 and b.steps == 1
    assert b.layers.keys() == {"moe", "attention"} and list(b.moe_kernels) == ["moe/w1"]


def _wide(y):
    with jax.named_scope("moe"), jax.named_scope("w1"):
        return y @ y.T


def test_a_program_without_our_scopes():
    program = module(lambda x: jnp.sin(x @ x), jnp.ones((32, 32)))
    b = analyze(trace_of(HERE, program, [(name, 10 * i, 10 * i + 10) for i, name in enumerate(leaves(program))]))
    assert b.attributed == 0 and b.layers.keys() == {"other"}
    assert sum(seconds for _, seconds in b.unnamed) == pytest.approx(b.busy_seconds)
    assert any("dot_general" in label for label, _ in b.unnamed)


def test_a_fusion_is_split_by_its_instructions():
    """Elementwise work of two stages in one fusion: by elements; a sine counts more than a product."""

    def both(x):
        with jax.named_scope("norm"):
            y = x * 2.0
        with jax.named_scope("moe"), jax.named_scope("act"):
            return jnp.sin(y)

    program = module(both, jnp.ones((64, 64)))
    (fusion,) = leaves(program)
    shares = Program(program).shares(fusion)
    assert {p.stage for p in shares} == {"norm", "moe/act"}
    assert sum(shares.values()) == pytest.approx(1)
    assert shares[Place("forward", "moe/act")] > shares[Place("forward", "norm")] > 0
    b = analyze(trace_of(HERE, program, [(fusion, 0, 90)]))
    assert b.mixed_seconds == pytest.approx(b.sums("stage")["norm"])


def test_idle_is_what_the_markers_leave():
    program = module(lambda x: two_stages(x, x)[0], jnp.ones((64, 64)))
    name = leaves(program)[0]
    trace = trace_of(HERE, program, [(name, 10, 40), (name, 110, 140)])
    trace.steps = [StepMarker(1, 0, 50), StepMarker(2, 100, 150)]
    b = analyze(trace)
    assert b.steps == 2
    assert b.step_seconds == pytest.approx(75e-12) and b.phases["idle"] == pytest.approx(45e-12)


def test_other_programs_are_other():
    program = module(lambda x: two_stages(x, x)[0], jnp.ones((64, 64)))
    small = module(lambda x: two_stages(x, x)[0] + 1, jnp.ones((8, 8)))
    trace = trace_of(HERE, program, [(leaves(program)[0], 0, 90)])
    small.name = "jit_evaluation"
    trace.programs[8] = small
    trace.events.append(Event(40, 50, leaves(small)[0], 8, "k"))
    b = analyze(trace)
    assert b.sums("layer")["other"] == pytest.approx(5e-12)


def test_two_shapes_of_the_step_count_by_their_share():
    """A step that was compiled for two batch shapes: costs are the mean over the steps."""
    one, two = (module(lambda x: two_stages(x, x)[0], jnp.ones((n, n))) for n in (32, 64))
    trace = trace_of(HERE, one, [(leaves(one)[0], 0, 10), (leaves(one)[0], 10, 20), (leaves(one)[0], 20, 30)])
    trace.programs[8] = two
    trace.events.append(Event(30, 70, leaves(two)[0], 8, "k"))
    b = analyze(trace)
    assert b.steps == 4
    assert b.cost["attention"].flops == pytest.approx((3 * 2 * 32**3 + 2 * 64**3) / 4)


def test_no_whole_step():
    program = module(lambda x: two_stages(x, x)[0], jnp.ones((64, 64)))
    trace = trace_of(HERE, program, [("something.else", 0, 10)])
    with pytest.raises(UserError, match="no whole step"):
        analyze(trace)


@pytest.fixture(scope="module")
def real():
    """Two steps of a tiny Mixtral (NF4, LoRA, full rematerialization), taken by tests/oracles/trace.py."""
    return xplane.read(VECTORS / "mixtral-cpu.xplane.pb.gz")


def test_the_real_trace(real):
    b = analyze(real)
    assert b.steps == 2 == len(real.steps) and b.platform == "cpu" and b.program == "jit_step"
    assert b.attributed >= 0.95
    phases = b.phases
    busy = sum(seconds for name, seconds in phases.items() if name != "idle")
    assert busy == pytest.approx(b.busy_seconds, rel=1e-9)
    assert busy + phases["idle"] == pytest.approx(b.step_seconds, rel=0.02)
    assert all(phases[name] > 0 for name in ("forward", "recompute", "backward", "optimizer"))
    assert phases["other"] < 0.02 * busy
    assert {"norm", "attention", "moe", "loss", "optimizer", "embed", "layers"} <= b.layers.keys()
    parts = ("router", "topk", "dispatch", "w1_dequant", "w1", "w3_dequant", "w3", "act", "w2_dequant", "w2", "combine", "lora")
    kernels = {f"moe/{part}" for part in parts}
    assert kernels <= b.moe_kernels.keys()
    # w2 needs no recomputation, w1 and w3 do; dequantization is part of the pass that needs it.
    assert "moe/w2" not in b.sums("stage", "recompute") or b.sums("stage", "recompute")["moe/w2"] < 1e-6
    assert b.sums("stage", "recompute")["moe/w1"] > 0


def test_costs_of_the_real_trace(real):
    """Products of known size, along loops whose trips the compiler knows (layers) and does not (tiles)."""
    cost = analyze(real).cost
    layers, tokens, d, f, k = 2, 256, 64, 96, 2
    useful = layers * tokens * k * 2 * d * f
    # w1: forward, recomputed, gradient of its input; w2 is not recomputed. Small tiles pad each of 8 groups.
    assert 3 * useful <= cost["moe/w1"].flops <= 3 * 1.5 * useful
    assert cost["moe/w1"].flops == pytest.approx(cost["moe/w3"].flops)
    assert cost["moe/w2"].flops == pytest.approx(cost["moe/w1"].flops * 2 / 3, rel=0.01)
    # Dequantization reads half a byte and writes four (fp32) per weight, in the forward and in the backward pass.
    weights = layers * 8 * d * f
    assert 2 * 4.5 * weights <= cost["moe/w1_dequant"].bytes <= 2 * 4 * 4.5 * weights


def test_every_event_counts_once(real):
    programs = {n: Program(m) for n, m in real.programs.items()}
    spent = partition(real.events, [breakdown._is_container(e, programs) for e in real.events])
    assert min(spent) >= -1
    spans = sorted(span for e in real.events for span in ((e.start, e.end), *e.tasks))
    covered, reached = 0, spans[0][0]
    for start, end in spans:
        covered += max(0, end - max(start, reached))
        reached = max(reached, end)
    assert sum(spent) == pytest.approx(covered, rel=1e-9)
    assert PROGRAM not in real.programs

"""The breakdown of a torch.profiler trace: rules on small traces made by hand, and a real one (tests/oracles/torch_trace.py)."""

import gzip
import json

import pytest
from support import ROOT

from moejax.errors import UserError
from moejax.profiling import torch_trace
from moejax.profiling.scopes import Place

REAL = ROOT / "tests" / "vectors" / "torch-mixtral.json.gz"


def span(name, start, end, *, kind="cpu_op", thread=1, sequence=None, external=None):
    values = {"Sequence number": sequence} if sequence is not None else {}
    values |= {"External id": external} if external is not None else {}
    return {"ph": "X", "cat": kind, "name": name, "tid": thread, "ts": start, "dur": end - start, "args": values}


def mark(name, start, end):
    return span(f"moejax:{name}", start, end, kind="user_annotation")


def microseconds(raw):
    return {(p.phase, p.stage): round(1e6 * s, 6) for p, s in torch_trace.analyze(raw).seconds.items() if s > 1e-12}


def node(name, start, end, sequence):
    return span(f"autograd::engine::evaluate_function: {name}", start, end, sequence=sequence)


STEP = [
    mark("step", 0, 100),
    mark("phase/forward", 0, 40),
    mark("moe", 0, 40),
    mark("moe/w1", 5, 20),
    span("aten::linear", 6, 20, sequence=7),  # peeks at the number; aten::mm below makes the node
    span("aten::mm", 8, 18, sequence=7),
    span("aten::index_add_", 30, 38, sequence=8),
    mark("phase/backward", 40, 90),
    node("IndexAddBackward0", 40, 50, 8),
    node("MmBackward0", 50, 80, 7),
    mark("moe/w1", 55, 65),  # a checkpointed forward pass inside the node
    span("aten::mm", 56, 64, sequence=21),
    span("aten::mm", 66, 79, sequence=21),
    mark("optimizer", 90, 98),
]


def test_phases_and_stages_by_hand():
    found = microseconds(STEP)
    assert found == {
        ("forward", "moe"): 5 + 10 + 2,
        ("forward", "moe/w1"): 15,
        ("forward", "moe/combine"): 8,
        ("backward", "moe/combine"): 10,
        ("backward", "moe/w1"): 20,
        ("recompute", "moe/w1"): 10,
        ("backward", "other"): 10,
        ("optimizer", "optimizer"): 8,
        ("other", "other"): 2,
    }


def test_everything_counts_once():
    found = torch_trace.analyze(STEP)
    assert found.busy_seconds == pytest.approx(100e-6) and found.step_seconds == pytest.approx(100e-6)
    assert sum(found.phases.values()) == pytest.approx(found.step_seconds)
    assert found.phases["idle"] == 0.0
    assert found.attributed == pytest.approx(0.88)


def test_two_steps_are_averaged_and_what_lies_between_them_is_left_out():
    later = [dict(e, ts=e["ts"] + 500) for e in STEP]
    between = [span("aten::topk", 200, 300)]
    found = torch_trace.analyze([*STEP, *between, *later])
    assert found.steps == 2
    assert found.step_seconds == pytest.approx(100e-6)
    assert found.seconds == pytest.approx(torch_trace.analyze(STEP).seconds)


@pytest.mark.parametrize(
    ("stage", "name", "expected"),
    [
        ("moe/w1", "bitsandbytes::dequantize_4bit", "moe/w1_dequant"),
        ("moe/router", "bitsandbytes::dequantize_4bit.out", "moe/router_dequant"),
        ("attention", "bitsandbytes::dequantize_4bit", "attention/dequant"),
        ("moe", "aten::topk", "moe/topk"),
        ("moe", "aten::softmax", "moe/router"),
        ("moe", "aten::where", "moe/dispatch"),
        ("moe/act", "aten::mul", "moe/act"),
        ("attention", "aten::softmax", "attention"),
    ],
)
def test_operations_without_a_module(stage, name, expected):
    raw = [mark("step", 0, 10), mark("phase/forward", 0, 10), mark(stage, 0, 10), span(name, 0, 10)]
    assert microseconds(raw) == {("forward", expected): 10}


def test_a_node_without_a_number_belongs_to_the_one_before():
    raw = [mark("step", 0, 30), mark("phase/forward", 0, 10), mark("attention", 0, 10), span("aten::mm", 0, 10, sequence=3)]
    raw += [mark("phase/backward", 10, 30), node("MmBackward0", 10, 20, 3)]
    raw += [span("autograd::engine::evaluate_function: torch::autograd::AccumulateGrad", 20, 30)]
    assert microseconds(raw) == {("forward", "attention"): 10, ("backward", "attention"): 20}


def test_kernels_of_a_gpu_count_for_what_launched_them():
    raw = [
        mark("step", 0, 20),
        mark("phase/forward", 0, 10),
        mark("attention", 0, 5),
        span("aten::mm", 1, 2, sequence=1, external=11),
    ]
    raw += [mark("loss", 5, 10), span("aten::sum", 6, 7, sequence=2, external=12)]
    backward = node("MmBackward0", 12, 15, 1) | {"tid": 2}
    raw += [backward, span("aten::mm", 13, 14, thread=2, external=13)]
    kernels = [("gemm", 10, 30, 11), ("sum", 20, 40, 12), ("gemm", 50, 60, 13)]
    raw += [span(name, a, b, kind="kernel", thread=7, external=e) for name, a, b, e in kernels]
    found = torch_trace.analyze(raw)
    # From 20 to 30 two kernels run at once and share the time.
    assert {p: round(1e6 * s, 6) for p, s in found.seconds.items()} == {
        Place("forward", "attention"): 15,
        Place("forward", "loss"): 15,
        Place("backward", "attention"): 10,
    }
    assert found.phases["idle"] == pytest.approx(20e-6)


def test_real_trace():
    found = torch_trace.analyze(torch_trace.read(REAL))
    assert found.steps == 1 and found.attributed >= 0.9
    assert sum(found.phases.values()) == pytest.approx(found.step_seconds)
    assert all(found.phases[p] > 0 for p in ("forward", "recompute", "backward", "optimizer"))
    parts = {"router", "topk", "dispatch", "w1", "w3", "act", "w2", "combine", "lora"}
    by_phase = {phase: {p.stage for p in found.seconds if p.phase == phase} for phase in found.phases}
    for phase in ("forward", "recompute", "backward"):
        assert {"attention", "norm", *(f"moe/{part}" for part in parts - {"topk"})} <= by_phase[phase], phase
    assert "loss" in by_phase["forward"] and "loss" not in by_phase["recompute"]
    assert set(found.moe_kernels) <= {"moe", *(f"moe/{part}" for part in parts)}


def test_every_node_of_the_real_trace_finds_its_operation():
    raw = torch_trace.read(REAL)
    nodes = [e for e in raw if e["name"].startswith(torch_trace.NODE) and "AccumulateGrad" not in e["name"]]
    nodes = [e for e in nodes if "Sequence number" in e["args"]]
    made = {e["args"]["Sequence number"] for e in raw if e not in nodes and "Sequence number" in e["args"]}
    assert len(nodes) > 300 and all(e["args"]["Sequence number"] in made for e in nodes)


def test_bad_traces(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        torch_trace.read(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("not a trace")
    with pytest.raises(UserError, match=r"text\.json is no trace of torch\.profiler"):
        torch_trace.read(tmp_path / "text.json")
    whole = gzip.compress(json.dumps({"traceEvents": STEP}).encode())
    (tmp_path / "cut.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cut off"):
        torch_trace.read(tmp_path / "cut.json.gz")
    with pytest.raises(UserError, match="no step marked moejax:step"):
        torch_trace.analyze([span("aten::mm", 0, 1)])

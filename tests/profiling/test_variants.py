"""The same model scanned or unrolled, recomputed or not: its stages' FLOPs are found in the same places."""

# ruff: noqa: E402 (benchmarks/ has to be on the path first)
import sys
from contextlib import contextmanager, nullcontext
from functools import cache

import jax
import pytest
from support import ROOT

sys.path[:0] = [str(ROOT / "benchmarks")]

from step import RANDOM, Server

from moejax import config as configuration
from moejax.profiling.capture import broken_down

STAGES = ("attention", "moe/w1", "moe/w3", "moe/w2", "moe/router", "moe/lora", "loss")
LAYERS = 3
SMALL = [
    *RANDOM, f"model.overrides={{hidden_size: 64, intermediate_size: 96, num_layers: {LAYERS}, vocab_size: 128}}",
    "data.row_tokens=64", "data.max_length=64", "data.batch_rows=2",
]  # fmt: skip


@contextmanager
def unrolled(length):
    """Inside, `jax.lax.scan` writes out loops of this length one layer after the other."""
    scan = jax.lax.scan

    def written_out(f, init, xs=None, *rest, **options):
        leading = {leaf.shape[0] for leaf in jax.tree.leaves(xs)}
        return scan(f, init, xs, *rest, **options | ({"unroll": True} if leading == {length} else {}))

    jax.lax.scan = written_out
    try:
        yield
    finally:
        jax.lax.scan = scan


@cache
def served(remat, name):
    with unrolled(LAYERS) if name == "unrolled" else nullcontext():
        experiment = configuration.load(ROOT / "configs/bench_mixtral_tiny.yaml", [*SMALL, f"training.remat={remat}"])
        server = Server(experiment)
        server.step()
    return server


def traced(server):
    return broken_down(1, lambda _: jax.block_until_ready((server.program.step(server.batch), server.program.state)))


@cache
def breakdown(remat, name):
    server = served(remat, name)
    return traced(server)


def flops(found, phase):
    """FLOPs by stage of one phase."""
    return {stage: sum(c.flops for p, c in found.costs.items() if p.phase == phase and p.stage == stage) for stage in STAGES}


@pytest.mark.long
@pytest.mark.parametrize("remat", ["full", "none"])
def test_scanned_and_unrolled_layers_have_the_same_work_in_the_same_places(remat):
    for phase in ("forward", "recompute", "backward"):
        scanned, unrolled = (flops(breakdown(remat, name), phase) for name in ("scanned", "unrolled"))
        for stage in STAGES:
            if phase != "forward" and stage in ("attention", "moe/router"):
                # The first layer's attention passes no gradient on: nothing before it is trained. Written out, XLA leaves it away.
                assert (LAYERS - 1) / LAYERS * 0.8 * scanned[stage] <= unrolled[stage] <= 1.01 * scanned[stage], (phase, stage)
            else:
                assert unrolled[stage] == pytest.approx(scanned[stage], rel=0.03), (phase, stage)


@pytest.mark.parametrize("name", ["scanned", pytest.param("unrolled", marks=pytest.mark.long)])
def test_the_forward_pass_is_the_same_with_and_without_recomputation(name):
    full, none = (flops(breakdown(remat, name), "forward") for remat in ("full", "none"))
    for stage in STAGES:
        assert full[stage] == pytest.approx(none[stage], rel=0.03), stage
    assert breakdown("full", name).phases["recompute"] > 0
    assert flops(breakdown("none", name), "recompute") == dict.fromkeys(STAGES, 0.0)


@pytest.mark.parametrize("name", ["scanned", pytest.param("unrolled", marks=pytest.mark.long)])
@pytest.mark.parametrize("remat", ["full", "none"])
def test_everything_is_attributed(remat, name):
    """In one of three traced steps: another process may hold any of a few milliseconds up."""
    server = served(remat, name)
    steps = (traced(server) for _ in range(3))
    assert any(found.attributed >= 0.95 and found.phases["other"] < 0.02 * found.busy_seconds for found in steps)

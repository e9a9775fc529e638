"""Paths as JAX writes them, in two versions' forms, to phase and stage."""

import pytest

from moejax.profiling.scopes import place

SCAN10 = "jit(step)/jvp(layers)/while/body/closed_call"
SCAN12 = "jit(step)/jvp(layers)/while/body/eval_jaxpr"
BACK = "jit(step)/transpose(jvp(layers))/while/body/closed_call/checkpoint"


@pytest.mark.parametrize(
    ("path", "phase", "stage"),
    [
        (f"{SCAN10}/attention/dot_general", "forward", "attention"),
        (f"{SCAN12}/attention/dot_general", "forward", "attention"),
        (f"{SCAN10}/moe/closed_call/while/body/closed_call/tiles/while/body/w1/ti,oi->to/dot_general", "forward", "moe/w1"),
        (f"{SCAN10}/moe/closed_call/while/body/closed_call/w1_dequant/mul", "forward", "moe/w1_dequant"),
        (f"{SCAN10}/moe/router/router_dequant/mul", "forward", "moe/router_dequant"),
        (f"{SCAN10}/moe/router/lora/dot_general", "forward", "moe/lora"),
        (f"{BACK}/moe/while/body/closed_call/tiles/while/body/w1/lora/add", "backward", "moe/lora"),
        (f"{BACK}/attention/transpose(attention)/...i,oi->...o/dot_general", "backward", "attention"),
        (f"{BACK}/rematted_computation/attention/dequant/mul", "recompute", "attention/dequant"),
        (f"{BACK}/moe/while/body/tiles/while/body/rematted_computation/w3/dot_general", "recompute", "moe/w3"),
        (f"{BACK}/moe/while/body/tiles/while/body/jvp(act)/mul", "backward", "moe/act"),
        ("jit(step)/jvp(norm)/mul", "forward", "norm"),
        (f"{SCAN10}/attention/norm/rsqrt", "forward", "attention/norm"),  # of q and k
        ("jit(step)/transpose(jvp(norm))/mul", "backward", "norm"),
        ("jit(step)/transpose(jvp(checkpoint))/rematted_computation/mamba/scan/exp", "recompute", "mamba/scan"),
        ("jit(step)/vmap(jvp(mamba))/conv/mul", "forward", "mamba/conv"),
        (f"{SCAN10}/add", "forward", "layers"),
        ("jit(step)/optimizer/transpose(x)/add", "optimizer", "optimizer"),
        ("jit(step)/jvp(loss)/while/body/nd,vd->nv/dot_general", "forward", "loss"),
        ("jit(norm)/reduce_sum", "other", "other"),  # a function of that name is no scope of ours
        ("jit(f)/jvp()/sin", "forward", "other"),
        ("jit(f)/transpose", "other", "other"),
        ("", "other", "other"),
    ],
)
def test_place(path, phase, stage):
    assert place(path) == (phase, stage)

"""FLOPs and bytes of the compiled step within bounds: a lost fusion or a dense fallback fails here, without a clock.

FLOPs against the arithmetic of benchmarks/floors.py, which knows nothing of the program; bytes of dequantization against what a weight
must take. Each guard is shown to fail: by XLA's own ragged product, and by one more fp32 copy of the experts.
"""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT

from models.ops import expert_tile, grouped_choice, linear
from moejax import config
from moejax.training import aot, experts, step_cost

sys.path[:0] = [str(ROOT / "benchmarks")]

import floors  # noqa: E402

ROWS, TOKENS = 4, 128
NF4_PASSES = 2  # forward and backward
MOST_OF_A_WEIGHT = 5.0  # bytes: half of one read, with the scales, and an fp32 one written
MIXTRAL_BYTES = 1.75e9


def compiled(model, k, backend="loop"):
    """(found, floors' stages, architecture) of one step of the bench config."""
    overrides = [f"model.experts_per_token={k}", f"model.moe_backend={backend}"]
    experiment = config.load(ROOT / "configs" / f"bench_{model}_tiny.yaml", overrides)
    sizes = experiment.model.architecture(None)
    step = aot.compile_step(experiment, sizes, rows=ROWS, row_tokens=TOKENS, gpu=None)
    tokens = ROWS * TOKENS
    found = step_cost.costs(step.program, experts.plan(experiment, sizes, tokens), step_cost.uniform_loads(sizes, tokens))
    return found, floors.floors(experiment, sizes, ROWS, TOKENS), sizes


def flops_share(found, stages):
    return step_cost.total(found).flops / sum(stage.flops for stage in stages)


def dequantized_bytes(found, sizes):
    """Bytes of dequantization per expert weight and pass."""
    weights = 3 * sizes.num_layers * sizes.num_experts * sizes.hidden_size * sizes.intermediate_size
    moved = sum(cost.bytes for place, cost in found.items() if place.stage in ("moe/w1_dequant", "moe/w2_dequant", "moe/w3_dequant"))
    return moved / weights / NF4_PASSES


# Bytes: what jax 0.10.2 compiles for a CPU takes 1.61, 3.09, 3.26 and 3.45 GB.
@pytest.mark.parametrize(
    ("model", "k", "most_flops", "most_bytes"),
    [("mixtral", 2, 1.1, MIXTRAL_BYTES), ("mixtral", 8, 1.1, 3.4e9), ("blackmamba", 2, 1.15, 3.6e9), ("blackmamba", 8, 1.15, 3.8e9)],
)
def test_the_step_takes_what_the_arithmetic_says(model, k, most_flops, most_bytes):
    found, stages, sizes = compiled(model, k)
    assert 0.98 <= flops_share(found, stages) <= most_flops
    assert step_cost.total(found).bytes <= most_bytes
    if model == "mixtral":
        assert 4 <= dequantized_bytes(found, sizes) <= MOST_OF_A_WEIGHT


def test_a_dense_fallback_would_be_seen():
    """XLA expands `ragged_dot` on a CPU to the product with every expert."""
    found, stages, _ = compiled("mixtral", 2, "ragged")
    assert flops_share(found, stages) > 2


def test_one_more_copy_of_the_experts_would_be_seen(monkeypatch):
    """One that XLA cannot fuse away: sorted. Nothing is run."""
    plain = linear.dequantized

    def copied(weight, dtype, scope):
        wide = plain(weight, jnp.float32, scope)
        with jax.named_scope(scope):
            return jax.lax.sort(wide).astype(dtype)

    monkeypatch.setattr(expert_tile, "dequantized", copied)
    found, _, sizes = compiled("mixtral", 2)
    assert dequantized_bytes(found, sizes) > 2 * MOST_OF_A_WEIGHT
    assert step_cost.total(found).bytes > MIXTRAL_BYTES


def test_a_loop_that_nobody_knows_is_an_error():
    trips = step_cost.tile_trips(grouped_choice.choose("loop", "cpu", 512, 8, 2), np.array([128] * 8))
    with pytest.raises(ValueError, match="jit/while: how often this loop runs is not known"):
        trips("jit/while")
    with pytest.raises(ValueError, match="capacity: which of its branches"):
        step_cost.costs(None, grouped_choice.choose("capacity", "cpu", 512, 8, 2), np.array([128] * 8))

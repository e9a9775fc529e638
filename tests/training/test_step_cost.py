"""FLOPs and bytes of the compiled step within bounds: a lost fusion or a dense fallback fails here, without a clock.

FLOPs against the arithmetic of benchmarks/floors.py, which knows nothing of the program; bytes of dequantization against what a weight
must take. Each guard is shown to fail: by XLA's own ragged product, and by one more fp32 copy of the experts.
"""

import sys
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import ragged_backend
from support import ROOT

from moejax import config
from moejax.models import layers
from moejax.models.ops import linear
from moejax.models.ops.grouped import dot
from moejax.models.ops.grouped import matmul as gm
from moejax.profiling.program import CONTAINERS, FREE, Cost, Program, module_of
from moejax.training import experts, step
from moejax.training.program import TrainProgram

sys.path[:0] = [str(ROOT / "benchmarks")]

import floors  # noqa: E402
import grouped_choice  # noqa: E402

ROWS, TOKENS = 4, 128
NF4_PASSES = 2  # forward and backward
INDEX_OF_A_WEIGHT = 3.5  # bytes: on a CPU the two codes of a byte first become bytes, side by side
MOST_OF_A_WEIGHT = 5.0 + INDEX_OF_A_WEIGHT  # the code read, with the scales, and an fp32 one written
MIXTRAL_BYTES = 1.75e9
CAPACITY_FLOPS, SKEWED_FLOPS = 1.37, 1.51  # 176 rows for 128 on average; for the largest group of 314 three tiles of 64 more


def step_of(model, k, backend="loop", remat="full"):
    """(experiment, architecture, compiled step) of the bench config."""
    overrides = [f"model.experts_per_token={k}", f"model.moe_backend={backend}", f"training.remat={remat}"]
    experiment = config.load(ROOT / "configs" / f"bench_{model}_tiny.yaml", overrides)
    sizes = experiment.model.architecture(None)
    return experiment, sizes, TrainProgram(experiment, sizes).compile(ROWS, TOKENS)


once = cache(step_of)  # for tests that compile what is there, unpatched


@pytest.fixture
def patched():
    """`step_of` of code that a test changed: no step that was traced before (tests/shared_steps.py), and none is left behind."""

    def make(*arguments, **settings):
        step.make_train_step.cache_clear()
        return step_of(*arguments, **settings)

    yield make
    step.make_train_step.cache_clear()


def counted(experiment, sizes, compiled_step, loads=None):
    plan = experts.plan(experiment, sizes, ROWS * TOKENS)
    loads = experts.uniform_loads(sizes, ROWS * TOKENS) if loads is None else loads
    return Program(module_of(compiled_step.executable)).costs({}, None if plan is None else experts.routed(plan, loads))


def total(found):
    return sum(found.values(), Cost())


def launches(compiled_step, plan, loads):
    """Kernels, library calls and copies of one run."""
    program = Program(module_of(compiled_step.executable))
    return sum(
        count * sum(i.opcode not in CONTAINERS | FREE for i in program.computations[computation].instructions)
        for computation, count in program.executions({}, experts.routed(plan, loads)).items()
    )


def compiled(model, k, backend="loop", make=once):
    """(found, floors' stages, architecture) of one step of the bench config."""
    experiment, sizes, compiled_step = make(model, k, backend, "full")
    return counted(experiment, sizes, compiled_step), floors.floors(experiment, sizes, ROWS, TOKENS), sizes


def flops_share(found, stages):
    return total(found).flops / sum(stage.flops for stage in stages)


def dequantized_bytes(found, sizes):
    """Bytes of dequantization per expert weight and pass."""
    weights = 3 * sizes.num_layers * sizes.num_experts * sizes.hidden_size * sizes.intermediate_size
    moved = sum(cost.bytes for place, cost in found.items() if place.stage in ("moe/w1_dequant", "moe/w2_dequant", "moe/w3_dequant"))
    return moved / weights / NF4_PASSES


# Bytes: what jax 0.10.2 compiles for a CPU takes 1.61, 3.09, 3.26 and 3.45 GB.
@pytest.mark.parametrize(
    ("model", "k", "most_flops", "most_bytes"),
    [("mixtral", 2, 1.1, MIXTRAL_BYTES), ("mixtral", 8, 1.1, 3.4e9), ("blackmamba", 2, 1.15, 3.6e9),
     pytest.param("blackmamba", 8, 1.15, 3.8e9, marks=pytest.mark.long)],
)  # fmt: skip
def test_the_step_takes_what_the_arithmetic_says(model, k, most_flops, most_bytes):
    found, stages, sizes = compiled(model, k)
    assert 0.98 <= flops_share(found, stages) <= most_flops
    assert total(found).bytes <= most_bytes
    if model == "mixtral":
        assert 4 + INDEX_OF_A_WEIGHT <= dequantized_bytes(found, sizes) <= MOST_OF_A_WEIGHT


def test_a_dense_fallback_would_be_seen(patched, monkeypatch):
    """XLA expands `ragged_dot` on a CPU to the product with every expert."""
    monkeypatch.setitem(gm._BACKENDS, "capacity", ragged_backend)
    found, stages, _ = compiled("mixtral", 2, "capacity", make=patched)
    assert flops_share(found, stages) > 2


def test_one_more_copy_of_the_experts_would_be_seen(patched, monkeypatch):
    """One that XLA cannot fuse away: sorted. Nothing is run."""
    plain = linear.dequantized

    def copied(weight, dtype, scope):
        wide = plain(weight, jnp.float32, scope)
        with jax.named_scope(scope):
            return jax.lax.sort(wide).astype(dtype)

    monkeypatch.setattr(dot, "dequantized", copied)
    found, _, sizes = compiled("mixtral", 2, make=patched)
    assert dequantized_bytes(found, sizes) > 5.0 + MOST_OF_A_WEIGHT
    assert total(found).bytes > MIXTRAL_BYTES


def recomputed(found):
    """FLOPs computed again, of the forward pass's."""
    by_phase = {phase: sum(c.flops for place, c in found.items() if place.phase == phase) for phase in ("forward", "recompute")}
    return by_phase["recompute"] / by_phase["forward"]


@pytest.mark.parametrize("model", [pytest.param("mixtral", marks=pytest.mark.long), "blackmamba"])
def test_dots_computes_no_large_product_twice(model, patched, monkeypatch):
    """What is left is elementwise, and the router's skinny adapter. A name that is no longer kept would be seen."""
    assert recomputed(counted(*once(model, 2, "loop", "dots"))) < 0.02
    assert recomputed(counted(*once(model, 2, "loop", "full"))) > 0.2
    monkeypatch.setattr(layers, "DOT_NAMES", tuple(name for name in layers.DOT_NAMES if name != "hidden"))
    assert recomputed(counted(*patched(model, 2, remat="dots"))) > 0.1


def test_what_dots_keeps_is_bounded():
    """Next to what `full` keeps: the results of the layers' products, each once. Nothing dequantized, no scores, no logits."""
    experiment, c, compiled_step = once("mixtral", 2, "loop", "dots")
    tokens = ROWS * TOKENS
    sorted_rows = tokens * c.experts_per_token + experts.plan(experiment, c, tokens).tile
    heads = (2 * c.num_heads + 2 * c.num_kv_heads) * c.head_dim  # q, k, v and the weighted values
    adapters = 16  # of the router: the product with A
    kept = 4 * c.num_layers * (tokens * (heads + c.hidden_size + c.num_experts + adapters) + 2 * sorted_rows * c.intermediate_size)
    more = compiled_step.temporary_bytes - once("mixtral", 2, "loop", "full")[2].temporary_bytes
    assert 0.9 * kept < more < 1.05 * kept


def test_capacity_pads_by_no_more_than_its_capacity():
    """A random routing fits into it; of a skewed one what is beyond goes through tiles. A wider batch would be seen."""
    experiment, sizes, compiled_step = once("mixtral", 2, "capacity")
    tokens, stages = ROWS * TOKENS, floors.floors(experiment, sizes, ROWS, TOKENS)

    def share(loads):
        return flops_share(counted(experiment, sizes, compiled_step, np.array(loads)), stages)

    def drawn(skew):
        chosen = grouped_choice.experts_of(tokens, sizes.num_experts, sizes.experts_per_token, skew)
        return np.bincount(chosen.ravel(), minlength=sizes.num_experts)

    assert max(drawn(None)) <= 176 and 0.98 <= share(drawn(None)) <= CAPACITY_FLOPS
    assert 0.98 * SKEWED_FLOPS <= share(drawn(grouped_choice.SKEWED)) <= SKEWED_FLOPS


def test_launches_follow_the_tiles():
    """More rows are more tiles of the loop, and nothing more in `capacity`'s batch while it holds them."""
    even, launched = experts.uniform_loads(once("mixtral", 2)[1], ROWS * TOKENS), {}
    for backend in ("loop", "capacity"):
        experiment, sizes, compiled_step = once("mixtral", 2, backend)
        plan = experts.plan(experiment, sizes, ROWS * TOKENS)
        launched[backend] = [launches(compiled_step, plan, loads) for loads in (even // 2, even)]
    assert launched["capacity"][0] == launched["capacity"][1] < launched["loop"][0] < launched["loop"][1]


def test_a_routing_takes_its_tiles():
    """What is beyond the capacity, of all experts of a layer; the mean over many routings."""
    plan = gm.choose("capacity", "cpu", 512, 8, 2)
    assert (plan.capacity, plan.tile) == (176, 64)  # four standard deviations of the 128 rows that an expert has on average
    even, one = np.full(8, 128), np.array([512, 498, 14, 0, 0, 0, 0, 0])
    assert experts.routed(plan, np.array([even, one]))("a/moe/tiles/while", None) == (6 + 6) / 2
    assert experts.routed(plan, even)("a/moe/tiles/while", None) == 0.0


def test_what_nobody_knows_is_an_error():
    loads = np.array([128] * 8)
    trips = experts.routed(gm.choose("loop", "cpu", 512, 8, 2), loads)
    with pytest.raises(ValueError, match="jit/while: how often this loop runs is not known"):
        trips("jit/while", None)
    with pytest.raises(ValueError, match="moe/cond: how often this conditional runs is not known"):
        trips("moe/cond", 0)


def test_rows_of_tokens_make_no_second_table():
    """What a step holds besides its arguments: with rows of three tokens some rows more, and no embedding [V, D]."""
    sizes = {"vocab_size": 20_000, "hidden_size": 32, "num_layers": 1, "num_experts": 2, "intermediate_size": 16}

    def held(rows):
        content = {
            "name": "x", "model": {"preset": "mixtral-tiny", "overrides": sizes}, "adapter": {"rank": 2, "token_rows": rows},
            "data": {"batching": "fixed", "row_tokens": 16, "max_length": 16},
            "training": {"steps": 1, "compute_dtype": "float32", "loss_chunk_tokens": 16},
        }  # fmt: skip
        experiment = config.Experiment.model_validate(content)
        return TrainProgram(experiment, experiment.model.architecture(None)).compile(1, 16).temporary_bytes

    assert held([5, 70, 19_999]) - held(None) < 20_000 * 32 * 4 / 20

"""Weights in bf16: rounding that loses nothing on average, a metric that shows what is lost, and a warning before it is."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import TINY

from moejax.config import TrainingConfig
from moejax.data.batch import Batch
from moejax.models.build import build
from moejax.models.config import PRESETS
from moejax.training import low_precision
from moejax.training.checkpoint import Checkpoints, Position
from moejax.training.optimizer import is_decayed, make_optimizer
from moejax.training.program import initial_state, split
from moejax.training.step import Objective, make_train_step

ALL_BITS = jnp.arange(65536, dtype=jnp.uint16)
TINIEST, LARGEST = 2.0**-149, 3.3895313892515355e38  # of fp32's subnormal numbers; of bf16


def rounded(x):
    """x, fp32, with each of the 65,536 draws, as float64."""
    return np.asarray(low_precision.stochastic(jnp.full(65536, x, jnp.float32), ALL_BITS)).astype(np.float64)


@pytest.mark.parametrize(
    "x", [0.0, 1.0, 1.0 + 2**-9, -1.0 - 3 * 2**-14, 0.1, -1e-3, 1.9999999, 3e38, 1e-38, -1e-40, TINIEST, 77 * TINIEST]
)  # fmt: skip
def test_rounding_is_unbiased_exactly(x):
    x = np.float32(x)
    values = rounded(x)
    assert values.mean() == np.float64(x)
    assert len(np.unique(values)) <= 2


def test_what_is_no_number_stays_so_and_nothing_becomes_infinite():
    for x in (np.inf, -np.inf):
        assert np.all(rounded(x) == x)
    for word in (0x7F800001, 0x7FC00000, 0xFFFFFFFF):  # bf16 cuts off the payload; the usual NaN; a carry would make it zero
        assert np.all(np.isnan(rounded(np.uint32(word).view(np.float32))))
    assert np.unique(rounded(np.finfo(np.float32).max)).tolist() == [LARGEST]
    assert np.all(np.signbit(rounded(-0.0)))


def test_each_leaf_has_bits_of_its_own():
    halfway = jnp.full(4096, 1 + 2**-8, jnp.float32)
    wide, like = [halfway, halfway, jnp.int32(7)], [halfway.astype(jnp.bfloat16), halfway.astype(jnp.bfloat16), jnp.int32(0)]
    first, second, count = low_precision.stored_like(wide, like, jax.random.key(0))
    again, other = (low_precision.stored_like(wide, like, jax.random.key(k))[0] for k in (0, 1))
    up = [np.asarray(a.astype(jnp.float32)) > 1.0 for a in (first, second, other)]
    assert count == 7 and np.array_equal(first, again)
    for a in up:
        assert 0.45 < a.mean() < 0.55
    for a, b in ((0, 1), (0, 2)):
        assert 0.45 < np.mean(up[a] == up[b]) < 0.55


@pytest.fixture(scope="module")
def run():
    """run(param_dtype, steps, **training) -> (states, metrics) of a tiny Mixtral trained whole at a rate that bf16 cannot follow."""
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, 32, (2, 2, 16)), jnp.int32)
    batch = Batch(tokens, tokens, jnp.ones(tokens.shape), jnp.ones_like(tokens), jnp.broadcast_to(jnp.arange(16), tokens.shape))

    def run(dtype, steps, state=None, **settings):
        training = TrainingConfig(steps=9, learning_rate=2e-5, param_dtype=dtype, clip_norm=1.0, **settings)
        sizes = PRESETS["mixtral-tiny"].replace(vocab_size=32, **TINY | {"num_layers": 1, "experts_per_token": 4})  # small to compile
        key, stored = jax.random.key(0), jnp.dtype(training.stored_dtype)
        graphdef, trainable, frozen = split(build(sizes, key=key, dtype=jnp.float32, param_dtype=stored), full=True)
        schedule = optax.constant_schedule(training.learning_rate)
        optimizer = make_optimizer(training, schedule)
        objective = Objective(graphdef, full=True, remat="none", chunk_tokens=32, stochastic=training.rounds_stochastically)
        step = compiled.setdefault((dtype, *settings.items()), jax.jit(make_train_step(objective, optimizer, schedule, seed=3)))
        states, records = [initial_state(trainable, optimizer) if state is None else state], []
        for _ in range(steps):
            state, metrics = step(states[-1], frozen, batch)
            states.append(state)
            records.append({name: float(value) for name, value in metrics.items() if value.ndim == 0})
        return states, records

    compiled = {}
    return run


def change(new, old):
    wide = [np.asarray(a.astype(jnp.float32)).astype(np.float64).ravel() for a in jax.tree.leaves((new, old))]
    half = len(wide) // 2
    return np.concatenate(wide[:half]) - np.concatenate(wide[half:])


def test_stochastic_rounding_learns_what_fp32_masters_learn(run):
    """Two micro-batches a step, clipped. And `update_norm` is of what changed, in every dtype."""
    moved = {}
    for dtype in ("float32", "bfloat16", "bfloat16_stochastic"):
        states, records = run(dtype, 12)
        for before, later, record in zip(states, states[1:], records, strict=False):
            expected = np.linalg.norm(change(later.trainable, before.trainable))
            np.testing.assert_allclose(record["update_norm"], expected, rtol=1e-4)
        moved[dtype] = change(states[-1].trainable, states[0].trainable)
        fell = records[0]["loss"] - records[-1]["loss"]
        moved[dtype, "loss"] = fell
        assert fell > 0
        assert {str(a.dtype) for a in jax.tree.leaves(states[-1].opt_state)} == {"int32", dtype.removesuffix("_stochastic")}

    def along(dtype):
        """Of the way that the fp32 weights went, how much these went too."""
        return moved[dtype] @ moved["float32"] / (moved["float32"] @ moved["float32"])

    assert along("bfloat16") < 0.6 < 0.9 < along("bfloat16_stochastic") < 1.1
    assert moved["bfloat16", "loss"] < 0.7 * moved["float32", "loss"]
    assert 0.8 < moved["bfloat16_stochastic", "loss"] / moved["float32", "loss"] < 1.2


@pytest.mark.parametrize("optimizer", ["adamw", pytest.param("lion", marks=pytest.mark.long)])
def test_moments_in_bf16_are_those_of_fp32_on_average(run, optimizer):
    """The weights go the same way in fp32; and where a step takes a thousandth of a second moment, less than the half of its bf16 step,
    a thousandth is lost on average."""
    wide, narrow = (run("float32", 12, optimizer=optimizer, moments_dtype=dtype)[0] for dtype in (None, "bfloat16"))
    assert {str(a.dtype) for a in jax.tree.leaves(narrow[-1].trainable)} == {"float32"}
    assert {str(a.dtype) for a in jax.tree.leaves(narrow[-1].opt_state)} == {"int32", "bfloat16"}
    whole, part = (change(states[-1].trainable, states[0].trainable) for states in (wide, narrow))
    assert 0.95 < part @ whole / (whole @ whole) < 1.05
    if optimizer == "adamw":

        def second(path):
            return ".nu" in jax.tree_util.keystr(path)

        ones = jax.tree_util.tree_map_with_path(lambda path, a: jnp.ones_like(a) if second(path) else a, narrow[-1].opt_state)
        after = run("float32", 1, narrow[-1]._replace(opt_state=ones), optimizer=optimizer, moments_dtype="bfloat16")[0][-1].opt_state
        left = [np.asarray(a.astype(jnp.float32)).ravel() for path, a in jax.tree_util.tree_leaves_with_path(after) if second(path)]
        assert abs(np.concatenate(left).mean() - 0.999) < 2e-4


def test_stochastic_rounding_resumes_to_the_bit(run, tmp_path):
    states, records = run("bfloat16_stochastic", 4)
    folder = Checkpoints(tmp_path / "checkpoints", keep=1, best=False)
    folder.save(2, states[2], Position(0, 2), None)
    folder.wait()
    restored, _ = folder.restore(states[0], 2)
    folder.close()
    again, after = run("bfloat16_stochastic", 2, restored)
    assert after == records[2:]
    for a, b in zip(jax.tree.leaves(again[-1]), jax.tree.leaves(states[-1]), strict=True):
        assert np.array_equal(a, b)


def test_a_rate_that_bf16_cannot_follow_is_told(make_experiment):
    whole = {"adapter": None, "quantization": {"format": "none"}}

    def experiment(**training):
        return make_experiment(**whole, training={"learning_rate": 5e-5, "param_dtype": "bfloat16", **training})

    (told,) = low_precision.warnings(experiment())
    assert told.startswith("warning: training.learning_rate = 5e-05 is too small for weights in bf16")
    # 0.6745 standard deviations of 0.02 are 0.0135; from 2^-7 to 2^-6 bf16 goes in steps of 2^-14.
    assert "the median weight, 0.013 (a new model's: no weights are read here), changes only by more than 3.1e-05" in told
    assert "param_dtype=bfloat16_stochastic" in told and "param_dtype=float32" in told
    large = build(PRESETS["mixtral-tiny"].replace(vocab_size=32, **TINY))
    graphdef, weights, rest = split(large, full=True)
    drawn = jax.tree_util.tree_map_with_path(
        lambda path, a: jnp.full(a.shape, 0.5 if is_decayed(path) else 99.0, jnp.bfloat16), weights
    )
    (told,) = low_precision.warnings(experiment(learning_rate=1e-3), nnx.merge(graphdef, drawn, rest))
    assert "median weight, 0.5, changes only by more than 0.002, half" in told  # norms are not what is looked at
    for quiet in (experiment(learning_rate=1e-3), experiment(param_dtype="float32"), experiment(param_dtype="bfloat16_stochastic")):
        assert low_precision.warnings(quiet) == []
    adapter = make_experiment(training={"learning_rate": 5e-5, "param_dtype": "bfloat16"})
    assert low_precision.warnings(adapter) == []  # adapters are in fp32

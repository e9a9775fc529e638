"""Moments in 8 bits against bitsandbytes 0.50.2 (tests/oracles/adam8.py): maps, codes, and where 25 steps lead."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from oracles.drawn import GRADIENT_STEPS, gradient, weight
from support import read_vectors

from moejax.estimator import sizes
from moejax.models.ops import nf4
from moejax.training import adam8
from moejax.training.optimizer import kept_wide
from moejax.training.program import TrainProgram

KNOWN = read_vectors("adam8")
SETTINGS = json.loads(str(KNOWN["settings"]))
SHAPES = {name: tuple(shape) for name, shape in SETTINGS["shapes"].items()}
MAPS = [(KNOWN["signed_map"], True), (KNOWN["unsigned_map"], False)]
STACKS = ("layers", "experts", "hidden", "rank")


def rule(decay=SETTINGS["decay"]):
    schedule = optax.constant_schedule(SETTINGS["rate"])
    return adam8.adamw_8bit(schedule, *SETTINGS["betas"], SETTINGS["eps"], decay, lambda tree: jax.tree.map(lambda _: True, tree))


def trained(weights, gradients):
    """Weights and state after a step of each of the gradients."""
    optimizer = rule()
    state = optimizer.init(weights)

    @jax.jit
    def step(weights, state, grads):
        updates, state = optimizer.update(grads, state, weights)
        return optax.apply_updates(weights, updates), state

    for grads in gradients:
        weights, state = step(weights, state, grads)
    return weights, state


def trained_on_drawn():
    weights = {name: jnp.asarray(weight(name, shape)) for name, shape in SHAPES.items()}
    return trained(weights, [{n: jnp.asarray(gradient(n, step, s)) for n, s in SHAPES.items()} for step in range(GRADIENT_STEPS)])


def off(weights, whose):
    """Shares of the weights that are elsewhere than theirs by more than a thousandth of the way that theirs went."""
    moved = {name: np.abs(KNOWN[f"{name}/{whose}"] - weight(name, shape)) for name, shape in SHAPES.items()}
    return {name: np.mean(np.abs(weights[name] - KNOWN[f"{name}/{whose}"]) > 1e-3 * moved[name]) for name in SHAPES}


@pytest.mark.parametrize(("known", "signed"), MAPS)
def test_the_maps_are_theirs_to_the_bit(known, signed):
    assert np.array_equal(nf4.dynamic_map(signed).view(np.uint32), known.view(np.uint32))


@pytest.mark.parametrize(("known", "signed"), MAPS)
def test_a_number_becomes_the_nearest_code_and_the_even_one_between_two(known, signed):
    """At every code, at every middle, at their neighbours in fp32, and at random; the kernel's own search, written in torch, has made the
    codes of the vectors."""
    middles = (known[1:] + known[:-1]) * np.float32(0.5)
    numbers = [known, middles, *(np.nextafter(x, np.float32(to)) for x in (known, middles) for to in (-2, 2))]
    draw = np.random.default_rng(0)
    numbers += [(10 ** draw.uniform(-9, 0, 20000)).astype(np.float32), draw.uniform(0, 1, 20000).astype(np.float32)]
    x = np.concatenate(numbers)
    x = np.concatenate([x, -x]) if signed else x[x >= 0]
    x = x[np.abs(x) <= 1]
    lower = np.searchsorted(known[1:-1], x, side="right")  # code below x, of the 255 pairs of neighbours
    middle = middles[lower]
    expected = lower + ((x > middle) | ((x == middle) & (lower % 2 == 1)))
    if signed:
        expected = np.where((expected == 127) & np.signbit(x), 126, expected)
    assert np.array_equal(jax.jit(lambda x: adam8.nearest(x, signed))(x), expected)


def test_25_steps_are_those_of_the_cuda_kernel():
    weights, state = trained_on_drawn()
    assert max(off(weights, "kernel").values()) < 0.002  # a thousandth of a short way is what fp32 weights round to
    for name in ("matrix", "first", "second", "limit"):
        for kind in ("first", "second"):
            ours = getattr(state, kind)[name]
            assert np.mean(np.asarray(ours.codes).ravel() != KNOWN[f"{name}/{kind}"]) < 1e-3
            np.testing.assert_allclose(ours.largest, KNOWN[f"{name}/{kind}/largest"], rtol=1e-5)
    assert state.first["small"].dtype == jnp.float32
    np.testing.assert_allclose(state.second["small"].ravel(), KNOWN["small/second"], rtol=1e-5)
    assert min(share for name, share in off(weights, "cpu").items() if name != "small") > 0.3  # its table's rule is another


def test_by_its_table_25_steps_are_those_of_bitsandbytes_on_a_cpu(monkeypatch):
    """Of the rule that it takes there everything but the place of the decay is ours: maps, blocks, corrections, the order of things."""

    def by_table(x, signed):
        table = jnp.asarray(nf4._nearest_table(nf4.dynamic_map(signed)))
        return table[((x + 1) * np.float32(0.5) * np.float32(65535) + np.float32(0.5)).astype(jnp.int32)].astype(jnp.int32)

    monkeypatch.setattr(adam8, "nearest", by_table)
    assert max(off(trained_on_drawn()[0], "cpu").values()) < 0.005


def test_a_stack_keeps_the_blocks_of_its_matrices_apart():
    """[2 layers, 2 experts, 40, 112], 17.5 blocks each: the same numbers as each matrix alone; small matrices are not made large."""
    names = [["first", "second"], ["second", "first"]]
    small = [[["third", "fourth"][expert] + str(layer) for expert in range(2)] for layer in range(2)]

    def stack(of, rows):
        return jnp.stack([jnp.stack([jnp.asarray(of(name)) for name in row]) for row in rows])

    def tree(make):
        large = stack(lambda name: make(name, (40, 112)), names)
        return {"w": nnx.Param(large, axes=STACKS), "s": nnx.Param(stack(lambda name: make(name, (63, 60)), small), axes=STACKS)}

    steps = [tree(lambda name, shape, step=step: gradient(name, step, shape)) for step in range(5)]
    weights, state = trained(tree(weight), steps)
    assert isinstance(state.first["w"].get_value(), adam8.Moments) and state.first["s"].get_value().dtype == jnp.float32
    for layer in range(2):
        for expert in range(2):
            name = names[layer][expert]
            one, alone = trained(
                {"w": jnp.asarray(weight(name, (40, 112)))}, [{"w": jnp.asarray(gradient(name, t, (40, 112)))} for t in range(5)]
            )
            np.testing.assert_allclose(weights["w"].get_value()[layer, expert], one["w"], rtol=1e-6)
            for kind in ("first", "second"):
                stacked, single = getattr(state, kind)["w"].get_value(), getattr(alone, kind)["w"]
                assert np.mean(stacked.codes[layer, expert] != single.codes) < 1e-3
                np.testing.assert_allclose(stacked.largest[layer, expert], single.largest, rtol=1e-6)


@pytest.mark.parametrize(
    ("shape", "axes", "count"),
    [((3, 2, 40, 112), STACKS, (3, 1)), ((2, 2, 80, 128), STACKS, (2, 4)), ((48, 256), ("vocab", "x"), (1, 2)), ((150, 113), (), (1, 1))],
)
def test_a_large_weight_is_changed_piece_after_piece(shape, axes, count, monkeypatch):
    """Some matrices at a time, or rows where they are whole blocks: with the same numbers."""
    weights = {"w": nnx.Param(jnp.asarray(weight("w", shape)), axes=axes)}
    steps = [{"w": nnx.Param(jnp.asarray(gradient("w", step, shape)), axes=axes)} for step in range(3)]
    at_once, before = trained(weights, steps)
    monkeypatch.setattr(sizes, "AT_ONCE", 10000)
    stacked = adam8.stacked_in(weights["w"])
    assert sizes.pieces(shape, stacked) == count and stacked == (2 if axes == STACKS else 0)
    after, state = trained(weights, steps)
    np.testing.assert_allclose(after["w"].get_value(), at_once["w"].get_value(), rtol=1e-6)
    for kind in ("first", "second"):
        a, b = (getattr(s, kind)["w"].get_value() for s in (state, before))
        assert np.mean(a.codes != b.codes) < 1e-3
        np.testing.assert_allclose(a.largest, b.largest, rtol=1e-6)


def test_a_weight_in_bf16_is_rounded_once():
    """Its update is stored in bf16: where a weight changes little, the weight after it is the nearest to what fp32 would make of it."""
    wide = {"w": jnp.asarray(weight("w", (64, 64))).astype(jnp.bfloat16).astype(jnp.float32)}
    grads = {"w": jnp.asarray(gradient("w", 0, (64, 64)))}
    expected = trained(wide, [grads])[0]["w"].astype(jnp.bfloat16)
    narrow, state = trained({"w": wide["w"].astype(jnp.bfloat16)}, [grads])
    assert narrow["w"].dtype == jnp.bfloat16 and state.first["w"].largest.dtype == jnp.float32
    assert np.mean(np.asarray(narrow["w"] != expected)) < 0.01


def test_a_step_changes_its_state_in_place(make_experiment, monkeypatch):
    """Donated to the last byte, where weights are changed piece after piece too."""
    monkeypatch.setattr(sizes, "AT_ONCE", 20000)
    experiment = make_experiment(training={"optimizer": "adamw_8bit", "steps": 2}, adapter={"rank": 160, "targets": ["w1", "q_proj"]})
    program = TrainProgram(experiment, experiment.model.architecture(None))
    leaves = jax.tree.leaves(program.state)
    assert any(leaf.dtype == jnp.uint8 and leaf.size > 20000 for leaf in leaves)
    given = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    assert program.compile(1, 64).executable.memory_analysis().alias_size_in_bytes >= given


def test_what_stays_in_fp32_is_told(make_experiment):
    """Of the tiny Mixtral's adapters all of one layer's small ones, and each expert's by itself."""
    experiment = make_experiment(training={"optimizer": "adamw_8bit"})
    config = experiment.model.architecture(None)
    (line,) = kept_wide(experiment, config)
    trained = [s for s in sizes.stored(experiment, config) if s.trained]
    assert f"{sum(s.parameters for s in trained)} trained tensors" in line and "moments are in fp32" in line
    assert kept_wide(make_experiment(training={"optimizer": "adamw"}), config) == []

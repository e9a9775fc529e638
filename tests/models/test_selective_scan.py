"""The forms of the selective scan agree with a loop in fp64, packed or alone, in values and gradients."""

import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from support import ROOT, assert_close_to_largest

from moejax.models.config import PRESETS
from moejax.models.layers import Target
from moejax.models.mamba import Mamba
from moejax.models.ops import choice
from moejax.models.ops import selective_scan as ss

B, T, D, N = 2, 37, 6, 4
FORMS = [pytest.param(form, marks=pytest.mark.long) if form == "kernel" else form for form in ss.CHUNKS]
"""Every test of values is every form's; a kernel is interpreted, which is slow."""


def make(seed=0, t=T):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    dt = jnp.asarray(rng.uniform(0.01, 1.0, (B, t, D)), jnp.float32)
    a = -jnp.asarray(rng.uniform(0.2, 4.0, (D, N)), jnp.float32)
    return normal(B, t, D), dt, a, normal(B, t, N), normal(B, t, N), normal(D)


def by_hand(u, dt, a, b, c, d, starts, state):
    """The definition, one number after the other, in fp64."""
    u, dt, a, b, c, d, state = (np.asarray(x, np.float64) for x in (u, dt, a, b, c, d, state))
    y = np.zeros(u.shape)
    for row in range(u.shape[0]):
        h = state[row]
        for t in range(u.shape[1]):
            h = np.zeros_like(h) if starts[row, t] else h
            h = np.exp(dt[row, t][:, None] * a) * h + (dt[row, t] * u[row, t])[:, None] * b[row, t]
            y[row, t] = h @ c[row, t] + d * u[row, t]
        state[row] = h
    return y, state


def sequential(u, dt, a, b, c, d, starts, state):
    """The definition, a token after the other: what automatic differentiation is asked for."""

    def body(h, xs):
        u, dt, b, c, start = xs
        h = jnp.where(start[:, None, None], 0.0, jnp.exp(dt[..., None] * a)) * h + (dt * u)[..., None] * b[:, None]
        return h, jnp.einsum("bdn,bn->bd", h, c) + d * u

    last, y = jax.lax.scan(body, state, tuple(jnp.swapaxes(x, 0, 1) for x in (u, dt, b, c, starts)))
    return jnp.swapaxes(y, 0, 1), last


def starts_at(*places, t=T):
    return jnp.zeros((B, t), bool).at[:, list(places)].set(True).at[1, 5].set(True)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("t", [1, 8, 37])
def test_values(form, t):
    operands, state = make(t=t), jnp.asarray(np.random.default_rng(9).normal(size=(B, D, N)), jnp.float32)
    starts = starts_at(*[p for p in (0, 11, 16, 17) if p < t], t=t) if t > 5 else jnp.zeros((B, t), bool)
    y, last = jax.jit(partial(ss.selective_scan, form=form, chunk=8, interpret=True))(*operands, starts, state)
    expected, expected_last = by_hand(*operands, np.asarray(starts), state)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    np.testing.assert_allclose(last, expected_last, rtol=1e-5, atol=1e-5 * np.abs(expected_last).max())


@pytest.mark.parametrize("form", FORMS)
def test_gradients_equal_automatic_differentiation_of_the_reference(form):
    rng = np.random.default_rng(3)
    operands, state = make(1), jnp.asarray(rng.normal(size=(B, D, N)), jnp.float32)
    weights = jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32), jnp.asarray(rng.normal(size=(B, D, N)), jnp.float32)

    def loss(scan, operands, state):
        y, last = scan(*operands, starts_at(0, 11, 24), state)
        return jnp.sum(y * weights[0]) + jnp.sum(last * weights[1])

    found = jax.jit(jax.grad(loss, argnums=(1, 2)), static_argnums=0)(
        partial(ss.selective_scan, form=form, chunk=8, interpret=True), operands, state
    )
    expected = jax.grad(loss, argnums=(1, 2))(sequential, operands, state)
    for ours, reference in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(ours, reference, rtol=0, atol=1e-5 * max(1e-6, np.abs(reference).max()))


def drawn(rows, length, channels, states, dtype="float32"):
    """Operands of `selective_scan` as a layer has them, segments that begin anywhere, and weights of y and the last state."""
    rng = np.random.default_rng(length)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    row, read = (rows, length, channels), (rows, length, states)
    dt = jnp.asarray(np.exp(rng.uniform(np.log(1e-3), np.log(0.1), row)), jnp.float32)
    a = -jnp.asarray(np.arange(1, states + 1) * np.exp(0.1 * rng.normal(size=(channels, states))), jnp.float32)
    u, b, c = (normal(*shape).astype(dtype) for shape in (row, read, read))
    starts = jnp.asarray(rng.random((rows, length)) < 0.05).at[0, 0].set(False)
    state = normal(rows, channels, states)
    return (u, dt, a, b, c, normal(channels)), starts, state, (normal(*row), normal(rows, channels, states))


def with_gradients(scan, operands, starts, state, weights):
    """y, the last state, and the gradients of six operands and the first state."""
    def run(operands, state):
        out, pull = jax.vjp(lambda operands, state: scan(*operands, starts, state), operands, state)
        return out, pull(weights)

    return jax.tree.leaves(jax.jit(run)(operands, state))


def in_fp32(u, dt, a, b, c, d, starts, state):
    u, b, c = (x.astype(jnp.float32) for x in (u, b, c))
    return sequential(u, dt, a, b, c, d, starts, state)


SHAPES = [(1, 21, 3, 2), (2, 37, 40, 5), (1, 64, 32, 16), (3, 16, 97, 4), (1, 1, 1, 1)]
"""Rows, tokens, channels, states: multiples of nothing, of everything, and one of each."""
CASES = [(form, shape, dtype) for form in ss.CHUNKS for shape in SHAPES for dtype in ("float32", "bfloat16")]
QUICK = [("kernel", SHAPES[0], "bfloat16"), *((form, SHAPES[0], "float32") for form in ss.CHUNKS if form != "kernel")]


@pytest.mark.parametrize(
    ("form", "shape", "dtype"), [pytest.param(*case, marks=() if case in QUICK else pytest.mark.long) for case in CASES]
)
def test_values_and_gradients_are_within_rounding_of_the_reference(form, shape, dtype):
    """4e-7 of an array's largest number; where the gradient is bf16, as its operand, the two may round to neighbours."""
    case = drawn(*shape, dtype)
    found = with_gradients(partial(ss.selective_scan, form=form, interpret=True), *case)
    expected = with_gradients(in_fp32, *case)
    for name, ours, reference in zip(("y", "last", "u", "dt", "a", "b", "c", "d", "state"), found, expected, strict=True):
        assert (ours.dtype, ours.shape) == (reference.dtype, reference.shape), name
        as_numbers = (np.asarray(x, np.float32) for x in (ours, reference))
        assert_close_to_largest(*as_numbers, 4e-7 if ours.dtype == jnp.float32 else 2**-8, name)


GATED = {SHAPES[0]: "float32", SHAPES[1]: "bfloat16", (2, 48, 64, 16): "bfloat16", (1, 64, 32, 16): "float32"}
"""Shape -> dtype. Of whole blocks z is read where it lies, in the second half of wider rows."""


@pytest.mark.parametrize(("shape", "dtype"), [pytest.param(*c, marks=[pytest.mark.long] * (c[0] != SHAPES[0])) for c in GATED.items()])
def test_softplus_and_gate_in_the_kernel_are_within_rounding_of_the_reference(shape, dtype):
    """As above, with gradients of the bias and of what holds z. Also where a token does nothing (dt of minus infinity)."""
    (u, _, a, b, c, d), starts, state, (weights, of_last) = drawn(*shape, dtype)
    rng = np.random.default_rng(1)
    raw, both = (jnp.asarray(rng.normal(size=(*u.shape[:2], k * u.shape[2])) * 2, dtype) for k in (1, 2))
    raw = raw.at[0, -1].set(-jnp.inf)
    bias = jnp.asarray(rng.normal(size=u.shape[2:]) - 3, jnp.float32)

    def kernel(*given):
        return ss.gated(*given[:-1], starts, given[-1], form="kernel", interpret=True)

    def reference(*given):
        u, raw, a, b, c, d, bias, both, state = given
        y, last = in_fp32(u, jax.nn.softplus(raw.astype(jnp.float32) + bias), a, b, c, d, starts, state)
        return (y * jax.nn.silu(both[..., u.shape[2] :].astype(jnp.float32))).astype(u.dtype), last

    def run(scan):
        out, pull = jax.vjp(scan, u, raw, a, b, c, d, bias, both, state)
        return jax.tree.leaves((out, pull((weights.astype(u.dtype), of_last))))

    names = ("y", "last", "u", "raw", "a", "b", "c", "d", "bias", "both", "state")
    for name, ours, expected in zip(names, jax.jit(lambda: run(kernel))(), jax.jit(lambda: run(reference))(), strict=True):
        assert (ours.dtype, ours.shape) == (expected.dtype, expected.shape), name
        as_numbers = (np.asarray(x, np.float32) for x in (ours, expected))
        assert_close_to_largest(*as_numbers, 4e-7 if ours.dtype == jnp.float32 else 2**-8, name)


@pytest.mark.parametrize("form", FORMS)
def test_a_segment_in_a_row_equals_the_segment_alone(form):
    """Values and gradients: nothing of a neighbour is left, not even as a factor of zero times infinity."""
    first, second = make(4, t=13), make(5, t=24)
    second = (*second[:2], first[2], *second[3:5], first[5])  # one A and one D
    packed = [jnp.concatenate([x, y], axis=1) if x.ndim == 3 else x for x, y in zip(first, second, strict=True)]

    @jax.jit
    @jax.value_and_grad
    def loss(operands, starts):
        return jnp.sum(jnp.sin(ss.selective_scan(*operands, starts, form=form, chunk=8, interpret=True)[0]))

    together = loss(tuple(packed), jnp.zeros((B, 37), bool).at[:, 0].set(True).at[:, 13].set(True))
    alone = [loss(o, jnp.zeros((B, o[0].shape[1]), bool)) for o in (first, second)]
    np.testing.assert_allclose(together[0], alone[0][0] + alone[1][0], rtol=1e-5)
    for i in (0, 1, 3, 4):
        parts = np.concatenate([alone[0][1][i], alone[1][1][i]], axis=1)
        np.testing.assert_allclose(together[1][i], parts, atol=2e-5 * np.abs(parts).max())


def test_memory_is_at_most_a_tenth_of_an_associative_scan_over_the_row():
    """One 2.8B layer, batch 16, length 512, forward and backward, by the compiler."""
    shape = jax.ShapeDtypeStruct
    b, t, d, n = 16, 512, 2944, 16
    operands = [shape(s, jnp.float32) for s in ((b, t, d), (b, t, d), (d, n), (b, t, n), (b, t, n), (d,))]

    def temporary(form, chunk=None):
        def loss(*operands):
            return jnp.sum(ss.selective_scan(*operands, form=form, chunk=chunk)[0] ** 2)

        compiled = jax.jit(jax.grad(loss, argnums=range(6))).lower(*operands).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporary("chunked") <= 0.1 * temporary("chunked_associative", t)


def test_form_and_chunk_are_the_nearest_measured_shapes(monkeypatch):
    def entry(rows, length, form, chunk):
        return {"rows": rows, "length": length, "channels": 1024, "form": form, "chunk": chunk}

    table = {"NVIDIA X": [entry(1, 512, "chunked", 8), entry(16, 512, "chunked_associative", 64), entry(16, 8192, "chunked", 128)]}
    monkeypatch.setattr(choice, "table", {"scan": table}.get)
    assert choice.scan("NVIDIA X", 1, 256, 1024) == ("chunked", 8)
    assert choice.scan("NVIDIA X", 1, 512, 8192) == ("chunked_associative", 64)  # as wide as 8 rows of 1024
    assert choice.scan("NVIDIA X", 16, 4096, 1024) == ("chunked", 128)
    assert choice.scan("cpu", 8, 256, 512) == ("chunked", 16)
    assert choice.scan("NVIDIA Y", 8, 256, 512) == ("chunked_associative", 32)
    assert choice.scan("NVIDIA X", 1, 256, 1024, "kernel") == ("kernel", 16)
    assert choice.scan("NVIDIA X", 1, 256, 1024, "chunked") == ("chunked", 8)


def test_the_model_runs_the_tables_form(monkeypatch):
    """The program of a layer holds the chosen chunk's states: [chunk, rows, states, channels]."""
    config = PRESETS["blackmamba-tiny"]
    mamba = Mamba(jax.random.key(0), config.stacks[0].block.mixer, config, jnp.float32, Target("auto", "cpu"))
    x, segments = jnp.ones((2, 64, config.hidden_size)), jnp.ones((2, 64), jnp.int32)
    for chunk in (8, 64):
        found = {"rows": 2, "length": 64, "channels": 256, "form": "chunked", "chunk": chunk}
        monkeypatch.setattr(choice, "table", {"scan": {"cpu": [found]}}.get)
        program = str(jax.make_jaxpr(lambda x: mamba(x, segments))(x))
        assert f"f32[{chunk},2,{config.state_size},{config.inner_size}]" in program


def test_every_entry_of_the_table_names_its_measurement():
    for entries in choice.table("scan").values():
        for entry in entries:
            result = json.loads((ROOT / entry["measured"]).read_text())
            assert {k: v for k, v in entry.items() if k != "measured"} in result["entries"]


@pytest.mark.long
def test_a_layer_by_the_kernel_is_a_layer_by_xla(monkeypatch):
    """Packed rows and a cache with padding on the right; values, and gradients of all weights."""
    config, gated = PRESETS["blackmamba-tiny"], ss.gated
    monkeypatch.setattr(ss, "gated", lambda *given, **more: gated(*given, **more, interpret=True))
    mixer = config.stacks[0].block.mixer
    layers = [Mamba(jax.random.key(0), mixer, config, jnp.float32, Target("auto", "cpu", scan=form)) for form in ("chunked", "kernel")]
    x = jax.random.normal(jax.random.key(1), (1, 20, config.hidden_size))
    segments, valid, cache = jnp.ones((1, 20), jnp.int32).at[:, 9:].set(2), jnp.arange(20)[None] < 17, Mamba.empty(mixer, 1, 1, 0, x.dtype)

    def run(layer):
        graph, weights = nnx.split(layer)

        def outputs(weights):
            layer = nnx.merge(graph, weights)
            return layer(x, segments), layer.cached(x, valid, segments, cache, 0)

        out, pull = jax.vjp(outputs, weights)
        return jax.tree.leaves((out, pull(jax.tree.map(jnp.cos, out))))

    for number, (ours, expected) in enumerate(zip(*(jax.jit(lambda layer=layer: run(layer))() for layer in layers[::-1]), strict=True)):
        assert_close_to_largest(ours, expected, 2e-6, str(number))

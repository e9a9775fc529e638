"""jax's splash attention kernels and its grouped product of a TPU, in interpret mode, against attention by blocks and plain products."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_pair import both
from flax import nnx
from support import assert_close_to_largest

from moejax.models.build import build
from moejax.models.config import PRESETS
from moejax.models.ops import flash
from moejax.models.ops.grouped import ragged
from moejax.models.ops.splash import splash_attention

TOLERANCE = {"float32": 2e-6, "bfloat16": 2e-2}


def check(shape, dtype, sinks=None, reach=None, window=None):
    """window: where it is a number that the program is given."""
    given = None if window is None else jnp.asarray(window, jnp.int32)
    ours = jax.jit(partial(splash_attention, interpret=True, reach=reach, window=given))
    names = ("out", "dq", "dk", "dv", *(() if sinks is None else ("dsinks",)))
    found = both(ours, *shape, dtype, sinks, reach if window is None else window)
    for name, ours, reference in zip(names, *found, strict=True):
        as_numbers = (np.asarray(a, np.float32) for a in (ours, reference))
        assert_close_to_largest(*as_numbers, TOLERANCE[dtype], name)


@pytest.mark.long
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(2, 150, 2, 1, 64), (1, 128, 4, 4, 128), (1, 257, 4, 2, 128), (3, 384, 2, 1, 128)])
def test_splash_is_exact(shape, dtype):
    """Lengths that are no whole block, grouped queries, segments inside of blocks."""
    check(shape, dtype)


def test_splash_with_a_window_and_sinks():
    check((1, 120, 1, 1, 64), "float32", sinks=[1.5], reach=20)


@pytest.mark.long
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("reach", [1, 100, 385, 1150])
@pytest.mark.parametrize("window", ["fixed", "near", "everywhere"])
def test_splash_with_windows_and_sinks(window, reach, dtype):
    """Three blocks of 384: windows of one token, inside of a block, over a border, and over the whole row; sinks that nothing reaches and
    above all scores; in a program that has one kernel, and in one that has both."""
    number = {"fixed": None, "near": reach, "everywhere": 2**30}[window]
    check((1, 1100, 4, 2, 64), dtype, sinks=[-30.0, 0.0, 1.5, 9.0], reach=reach, window=number)


@pytest.mark.long
@pytest.mark.parametrize("reach", [20, 128])
def test_splash_with_a_window_or_sinks_alone(reach):
    check((2, 300, 4, 2, 128), "float32", reach=reach)
    check((2, 300, 4, 2, 128), "float32", sinks=np.linspace(-2, 3, 4))


@pytest.mark.long
def test_layers_of_gpt_oss_with_and_without_a_window(monkeypatch):
    """One scan over both, its windows numbers that it carries: what each weight's gradient is by blocks, that of sinks among them."""
    monkeypatch.setattr(flash, "splash_attention", partial(splash_attention, interpret=True))
    config = PRESETS["gpt-oss-tiny"].replace(
        vocab_size=32, hidden_size=32, intermediate_size=24, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=2, head_dim=64
    )
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 32, (2, 140)), jnp.int32)

    def gradients(attention):
        model = build(config, key=jax.random.key(0), platform="TPU v5 lite", attention=attention, param_dtype=jnp.float32)
        graph, state = nnx.split(model)

        def loss(state):
            return jnp.square(nnx.merge(graph, state)(tokens, remat="full")[0].astype(jnp.float32) - 1).mean()

        return jax.tree.map(np.asarray, nnx.to_pure_dict(jax.jit(jax.grad(loss))(state)))

    by_splash, by_blocks = gradients("auto"), gradients("blocks")
    assert np.abs(by_blocks["layers"]["attention"]["sinks"]).min() > 0
    for (path, found), expected in zip(jax.tree.leaves_with_path(by_splash), jax.tree.leaves(by_blocks), strict=True):
        assert_close_to_largest(found, expected, 4e-2, jax.tree_util.keystr(path))


@pytest.mark.parametrize("rows", [128, pytest.param(300, marks=pytest.mark.long)])
def test_the_kernels_of_groups_are_plain_products(rows):
    """The gradient is a sum over each group: empty groups are zero, and rows behind the last one are of none."""
    drawn, sizes = np.random.default_rng(rows), np.array([0, 70, 0, 37, 5])
    dy, x = (drawn.standard_normal((rows, width)).astype(np.float32) for width in (16, 40))
    dy[sizes.sum() :] = np.nan
    of_groups = jnp.asarray(sizes, jnp.int32)
    found = ragged.kernel_gradient(of_groups, jnp.asarray(dy), jnp.asarray(x), interpret=True)
    ends = np.cumsum(sizes)
    expected = np.stack([dy[end - size : end].T @ x[end - size : end] for end, size in zip(ends, sizes, strict=True)])
    assert_close_to_largest(found, expected, 2e-6, "gradient")
    w = drawn.standard_normal((len(sizes), 16, 40)).astype(np.float32)
    found = ragged.kernel_narrow(of_groups, jnp.asarray(x), jnp.asarray(w), interpret=True)
    expected = np.concatenate([x[end - size : end] @ w[e].T for e, (end, size) in enumerate(zip(ends, sizes, strict=True))])
    assert found.shape == (rows, 16)
    assert_close_to_largest(found[: sizes.sum()], expected, 2e-6, "product")


def test_where_the_kernels_of_a_tpu_run():
    assert flash.refusal("TPU v5 lite", jnp.bfloat16, 128) is None
    assert "training.compute_dtype is float32" in flash.refusal("TPU v5 lite", jnp.float32, 128)
    assert "64, 128, 256 numbers, and the model's have 48" in flash.refusal("TPU v6 lite", jnp.bfloat16, 48)
    assert ragged.refusal("TPU v5 lite") is None and "for a TPU" in ragged.refusal("NVIDIA L4")

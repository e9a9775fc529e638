"""jax's flash attention kernels, in interpret mode, against attention by blocks."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_pair import both
from support import assert_close_to_largest

from moejax.models import layers
from moejax.models.ops import flash

FLASH = partial(flash.flash_attention, interpret=True)


@pytest.mark.parametrize(("rows", "length", "heads", "kv", "head_dim"), [(2, 150, 2, 1, 32)])
def test_flash_is_exact(rows, length, heads, kv, head_dim):
    """A length that is no whole block, grouped queries, segments inside of blocks."""
    for name, ours, reference in zip(("out", "dq", "dk", "dv"), *both(FLASH, rows, length, heads, kv, head_dim), strict=True):
        assert_close_to_largest(ours, reference, 2e-6, name)


def test_grouped_queries_need_no_copy_of_keys():
    """Nothing between the arguments and the kernel: it reads a group's keys and values where they are."""
    q, k = jnp.zeros((1, 128, 4, 32)), jnp.zeros((1, 128, 2, 32))
    traced = jax.make_jaxpr(lambda *given: flash.flash_attention(*given))(q, k, k, jnp.zeros((1, 128), jnp.int32))
    assert "mha_forward" in str(traced) and not {"broadcast_in_dim", "reshape", "gather"} & primitives(traced.jaxpr)


def primitives(jaxpr):
    """Of a traced function, outside of kernels."""
    found = {e.primitive.name for e in jaxpr.eqns}
    inner = [v for e in jaxpr.eqns if e.primitive.name != "pallas_call" for v in jax.tree.leaves(list(e.params.values()))]
    return found.union(*(primitives(getattr(v, "jaxpr", v)) for v in inner if hasattr(getattr(v, "jaxpr", v), "eqns")))


@pytest.mark.long
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [(1, 128, 4, 4, 64), (1, 257, 4, 2, 128), (3, 384, 2, 1, 32)])
def test_flash_is_exact_at_more_shapes(shape, dtype):
    for name, ours, reference in zip(("out", "dq", "dk", "dv"), *both(FLASH, *shape, dtype), strict=True):
        as_numbers = (np.asarray(a, np.float32) for a in (ours, reference))
        assert_close_to_largest(*as_numbers, 2e-6 if dtype == "float32" else 2e-2, name)


@pytest.mark.parametrize(("remat", "forwards"), [("none", 1), ("dots", 1), ("full", 2)])
def test_dots_keeps_what_the_backward_pass_needs(remat, forwards):
    """`full` runs the forward kernel again, `dots` keeps its output and sums."""
    q = jnp.zeros((1, 128, 2, 32))

    def loss(q):
        body = layers.rematerialized(lambda x: flash.flash_attention(x, x, x, jnp.zeros(x.shape[:2], jnp.int32)).sum(), remat)
        return body(jnp.sin(q))

    traced = str(jax.make_jaxpr(jax.grad(loss))(q))
    assert traced.count("name=mha_forward") == forwards and traced.count("name=mha_backward") == 1


def test_where_flash_cannot_run():
    assert flash.refusal("NVIDIA A100-SXM4-80GB", jnp.bfloat16, 128) is None
    assert "this is a CPU" in flash.refusal("cpu", jnp.bfloat16, 128)
    assert "training.compute_dtype is float32" in flash.refusal("NVIDIA L4", jnp.float32, 128)
    assert "the model's have 48" in flash.refusal("NVIDIA L4", jnp.bfloat16, 48)

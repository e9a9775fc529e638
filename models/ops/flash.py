"""Where attention runs by a kernel of jax: on a TPU `splash`, and on a GPU those that stand here.

Causal attention inside segments by jax's own Triton kernels for GPUs (`jax.experimental.pallas.ops.gpu.attention`): scores never leave a
multiprocessor (FlashAttention, arXiv 2205.14135). Exact, as `attention.segment_attention` is.

The kernels are called as jax's `mha` calls them, but for what it lacks: names for what the backward pass needs, and grouped queries, whose
heads read their group's keys and values where these are, not a copy for each.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from moejax.models.ops import choice
from moejax.models.ops.choice import is_tpu
from moejax.models.ops.splash import splash_attention

QUERIES, KEYS = 128, 64
"""Rows of a block, forward."""
QUERIES_BACK, KEYS_BACK = (32, 64), (64, 32)
"""Backward, for the gradients of keys and of queries: no register is spilled on compute capability 8.0 and 9.0 at 128 numbers a head."""
WARPS, STAGES = 8, 2
HEADS = (32, 64, 128)
"""Numbers of a head that the kernels were compiled for."""
TPU_HEADS = (64, 128, 256)
LATENT = "latent attention goes by blocks"
MEASURED = "as `moejax tune` measured here"


def refusal(platform: str, dtype: Any, head_dim: int, lacking: str | None = None) -> str | None:
    """Why these kernels cannot run; None where they can. lacking: what `unsupported` says of the attention."""
    if lacking is not None and (lacking == LATENT or not is_tpu(platform)):
        return lacking
    if platform == "cpu":
        return "jax's flash attention is for GPUs and TPUs, and this is a CPU"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"jax's flash attention computes in bfloat16 here, and training.compute_dtype is {jnp.dtype(dtype).name}"
    heads = TPU_HEADS if is_tpu(platform) else HEADS
    if head_dim not in heads:
        return f"jax's flash attention has heads of {', '.join(map(str, heads))} numbers, and the model's have {head_dim}"
    return None


def unsupported(sinks: bool, window: int | None) -> str | None:
    """What an attention needs that the kernels for GPUs do not have; None: nothing."""
    needed = [name for name, there in (("sinks", sinks), (f"window (here of {window} positions)", window is not None)) if there]
    return f"jax's flash attention has no {' and no '.join(needed)}" if needed else None


def why_blocks(asked: str, platform: str, dtype: Any, head_dim: int, length: int, lacking: str | None = None) -> str | None:
    """Why rows of this many tokens go by blocks of queries (`attention.segment_attention`), as asked ("auto", "blocks", "flash") or where
    these kernels cannot run, or were measured and not chosen; None: by these kernels."""
    if asked == "blocks":
        return "model.attention"
    short = f"rows of {length} tokens, flash attention begins at {QUERIES}" if length < QUERIES else None
    slower = MEASURED if asked == "auto" and choice.attention(platform, length, head_dim) == "blocks" else None
    return refusal(platform, dtype, head_dim, lacking) or short or slower


def attention(
    platform: str, q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, window: jax.Array | None = None,
    reach: int | None = None, sinks: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """By the platform's kernels: see `flash_attention` and `splash_attention`, which alone has windows and sinks."""
    if is_tpu(platform):
        return splash_attention(q, k, v, segment_ids, window=window, reach=reach, sinks=sinks)
    return flash_attention(q, k, v, segment_ids)


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, interpret: bool = False) -> jax.Array:
    """q: [B, T, H, C]; k, v: [B, T, G, C] (H a multiple of G); segment_ids: int32 [B, T]. Returns [B, T, H, C] in q's dtype.

    Rows are padded to whole blocks. The output and one fp32 number per query are named for rematerialization policies ("mixed",
    "flash_log_sums"): the backward pass needs both. interpret: on a CPU, for tests.
    """
    t = q.shape[1]
    more = -t % QUERIES

    def whole(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2))) if more else x

    return _flash(*map(whole, (q, k, v, segment_ids)), interpret)[:, :t]


def _called(kernels: Any, kernel: Any, interpret: bool, **more: Any) -> Any:
    """A kernel over a grid, its settings in `more`. A function of its own for jax, which leaves such a one out of a backward pass whose
    policy has all that it gives."""
    parameters = kernels.plgpu.CompilerParams(num_warps=WARPS, num_stages=STAGES)
    return jax.jit(kernels.pl.pallas_call(kernel, compiler_params=parameters, interpret=interpret, **more))


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool) -> jax.Array:
    return _forward(q, k, v, segment_ids, interpret)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool) -> tuple[jax.Array, Any]:
    import jax.experimental.pallas.ops.gpu.attention as kernels  # at import it would cost every start on a CPU

    (b, t, h, c), of_group, spec = q.shape, q.shape[2] // k.shape[2], kernels.pl.BlockSpec
    block = spec((None, QUERIES, None, c), lambda i, row, head: (row, i, head, 0))
    group = spec((None, t, None, c), lambda i, row, head: (row, 0, head // of_group, 0))
    kernel = partial(kernels.mha_forward_kernel, sm_scale=c**-0.5, causal=True, block_q=QUERIES, block_k=KEYS, head_dim=c)
    out, log_sums = _called(
        kernels, kernel, interpret, grid=(t // QUERIES, b, h), name="mha_forward",
        in_specs=[block, group, group, spec((None, t), lambda i, row, head: (row, 0))],
        out_specs=[block, spec((None, None, QUERIES), lambda i, row, head: (row, head, i))],
        out_shape=[jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct((b, h, t), jnp.float32)],
    )(q, k, v, segment_ids)  # fmt: skip
    out, log_sums = checkpoint_name(out, "mixed"), checkpoint_name(log_sums, "flash_log_sums")
    return out, (q, k, v, segment_ids, out, log_sums)


def _backward(interpret: bool, residuals: Any, dout: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    import jax.experimental.pallas.ops.gpu.attention as kernels

    q, k, v, segment_ids, out, log_sums = residuals
    (b, t, h, c), of_group, spec = q.shape, q.shape[2] // k.shape[2], kernels.pl.BlockSpec
    delta = kernels._preprocess_backward(out, dout, log_sums, QUERIES, False, interpret)
    (queries, queries_of_dq), (keys, keys_of_dq) = QUERIES_BACK, KEYS_BACK
    whole = spec((None, t, None, c), lambda row, head, i: (row, 0, head, 0))
    group = spec((None, t, None, c), lambda row, head, i: (row, 0, head // of_group, 0))
    sums = spec((None, None, t), lambda row, head, i: (row, head, 0))
    kernel = partial(
        kernels.mha_backward_kernel, sm_scale=c**-0.5, causal=True, head_dim=c, block_q_dkv=queries, block_kv_dkv=keys,
        block_q_dq=queries_of_dq, block_kv_dq=keys_of_dq,
    )  # fmt: skip
    dq, *of_heads = _called(
        kernels, kernel, interpret, grid=(b, h, t // keys), name="mha_backward",
        in_specs=[whole, group, group, spec((None, t), lambda row, head, i: (row, 0)), whole, whole, sums, sums],
        out_specs=[spec((None, rows, None, c), lambda row, head, i: (row, i, head, 0)) for rows in (queries_of_dq, keys, keys)],
        out_shape=[jax.ShapeDtypeStruct(q.shape, a.dtype) for a in (q, k, v)],
    )(q, k, v, segment_ids, out, dout, log_sums, delta)  # fmt: skip
    dk, dv = (jnp.sum(a.reshape(b, t, -1, of_group, c), axis=3) for a in of_heads)
    return dq, dk, dv, None


_flash.defvjp(_forward, _backward)

"""Causal attention inside segments by jax's own Triton kernels for GPUs (`jax.experimental.pallas.ops.gpu.attention`): scores never leave a
multiprocessor (FlashAttention, arXiv 2205.14135). Exact, as `attention.segment_attention` is."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

QUERIES, KEYS = 128, 64
"""Rows of a block, forward; backward 64 and 32: no register is spilled on compute capability 8.0 and 9.0 at 128 numbers a head."""
WARPS = 8
HEADS = (32, 64, 128)
"""Numbers of a head that the kernels were compiled for."""


def refusal(platform: str, dtype: Any, head_dim: int, lacking: str | None = None) -> str | None:
    """Why these kernels cannot run; None where they can. lacking: what `unsupported` says of the attention."""
    if lacking is not None:
        return lacking
    if platform == "cpu" or platform.startswith("TPU"):
        return f"jax's flash attention is for GPUs, and this is a {platform if platform != 'cpu' else 'CPU'}"
    if jnp.dtype(dtype) != jnp.bfloat16:
        return f"jax's flash attention computes in bfloat16 here, and training.compute_dtype is {jnp.dtype(dtype).name}"
    if head_dim not in HEADS:
        return f"jax's flash attention has heads of {', '.join(map(str, HEADS))} numbers, and the model's have {head_dim}"
    return None


def unsupported(sinks: bool, window: int | None) -> str | None:
    """What an attention needs that these kernels do not have; None: nothing."""
    needed = [name for name, there in (("sinks", sinks), (f"window (here of {window} positions)", window is not None)) if there]
    return f"jax's flash attention has no {' and no '.join(needed)}" if needed else None


def why_blocks(asked: str, platform: str, dtype: Any, head_dim: int, length: int, lacking: str | None = None) -> str | None:
    """Why rows of so many tokens go by blocks of queries (`attention.segment_attention`), as asked ("auto", "blocks", "flash") or where
    these kernels cannot run; None: by these kernels."""
    if asked == "blocks":
        return "model.attention"
    short = f"rows of {length} tokens, flash attention begins at {QUERIES}" if length < QUERIES else None
    return refusal(platform, dtype, head_dim, lacking) or short


def flash_attention(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, *, interpret: bool = False) -> jax.Array:
    """q: [B, T, H, C]; k, v: [B, T, G, C] (H a multiple of G); segment_ids: int32 [B, T]. Returns [B, T, H, C] in q's dtype.

    Rows are padded to whole blocks. The output and one fp32 number per query are named for rematerialization policies ("mixed",
    "flash_log_sums"): the backward pass needs both. interpret: on a CPU, for tests.
    """
    t, h, g = q.shape[1], q.shape[2], k.shape[2]
    more = -t % QUERIES

    def whole(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, more), *[(0, 0)] * (x.ndim - 2))) if more else x

    def of_every_head(x: jax.Array) -> jax.Array:
        wide = jnp.broadcast_to(x[:, :, :, None], (*x.shape[:3], h // g, x.shape[3]))
        return wide.reshape(*x.shape[:2], h, x.shape[3])

    return _flash(*map(whole, (q, of_every_head(k), of_every_head(v), segment_ids)), interpret)[:, :t]


def _settings() -> tuple[Any, Any]:
    import jax.experimental.pallas.ops.gpu.attention as kernels  # at import it would cost every start on a CPU

    return kernels, kernels.BlockSizes(
        block_q=QUERIES, block_k=KEYS, block_q_dkv=32, block_kv_dkv=64, block_q_dq=64, block_kv_dq=32
    )


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def _flash(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool) -> jax.Array:
    return _forward(q, k, v, segment_ids, interpret)[0]


def _forward(q: jax.Array, k: jax.Array, v: jax.Array, segment_ids: jax.Array, interpret: bool) -> tuple[jax.Array, Any]:
    kernels, blocks = _settings()
    out, log_sums = kernels.mha(
        q, k, v, segment_ids, sm_scale=q.shape[-1] ** -0.5, causal=True, block_sizes=blocks, num_warps=WARPS, interpret=interpret,
        return_residuals=True,
    )  # fmt: skip
    out, log_sums = checkpoint_name(out, "mixed"), checkpoint_name(log_sums, "flash_log_sums")
    return out, (q, k, v, segment_ids, out, log_sums)


def _backward(interpret: bool, residuals: Any, dout: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    # jax's own rule, called here so that its residuals have names: `mha` by itself gives them none.
    kernels, blocks = _settings()
    scale = residuals[0].shape[-1] ** -0.5
    dq, dk, dv, _ = kernels._mha_backward(scale, True, blocks, "triton", WARPS, 2, None, interpret, False, False, residuals, dout)
    return dq, dk, dv, None


_flash.defvjp(_forward, _backward)

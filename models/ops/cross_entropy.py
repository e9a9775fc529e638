"""Linear + cross-entropy over the vocabulary in chunks of tokens: the logits [N, V] never exist as a whole."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

from moejax.models.ops import host


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2, 7))
def linear_cross_entropy(
    chunk: int,
    label_smoothing: float,
    trainable: bool,
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    ids: tuple[int, ...] = (),
    rows: jax.Array | None = None,
) -> jax.Array:
    """Sum over tokens of mask · ((1-s)·(-log p[target]) + s·mean over V of (-log p)); s as Hugging Face's label smoother.

    hidden: [N, D]; weight: [V, D]; targets: int32 [N]; mask: fp32 [N]. Logits, softmax and sum in fp32. `chunk`: tokens at a time.
    rows: [n, D], trained in the place of the weight's own rows `ids` (`moejax.models.token_rows`).
    The gradients of hidden, of rows and (if `trainable`) of weight are computed in the forward pass, chunk by chunk: they are linear in the
    scalar that comes back, and so the logits are computed once instead of twice.
    """
    return _scan_chunks(chunk, label_smoothing, None, hidden, weight, targets, mask, ids, rows)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0, 5))
def token_log_probabilities(
    chunk: int, hidden: jax.Array, weight: jax.Array, targets: jax.Array, mask: jax.Array, ids: tuple[int, ...] = (),
    rows: jax.Array | None = None,
) -> jax.Array:  # fmt: skip
    """mask · log p[target] of each token, fp32 [N]; arguments as of `linear_cross_entropy`. weight is frozen: it gets no gradient.

    The gradient of hidden is known but for each token's own factor, so it is computed in the forward pass as well.
    """
    return _scan_tokens(chunk, False, hidden, weight, targets, mask, ids, rows)[0]


def _scan_tokens(chunk, gradients, hidden, weight, targets, mask, ids, rows):  # type: ignore[no-untyped-def]
    """(mask · log p [N], its gradients by hidden [N, D] or None, and by the logits of the tokens `ids` [N, n] or None)."""
    n = hidden.shape[0]
    w = host.fetched(weight).astype(hidden.dtype)

    def body(carry, part):  # type: ignore[no-untyped-def]
        h, target, m = part
        logits = jnp.einsum("nd,vd->nv", h, w, preferred_element_type=jnp.float32)
        if rows is not None:
            logits = replaced(logits, h, rows, ids)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        log_p = (jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0] - normalizer) * m
        if not gradients:
            return carry, (log_p, None, None)
        one_hot = target[:, None] == jnp.arange(logits.shape[-1])
        dlogits = ((jnp.where(one_hot, 1.0, 0.0) - jnp.exp(logits - normalizer[:, None])) * m[:, None]).astype(h.dtype)
        dlogits, own = _parted(dlogits, ids)
        dh = jnp.einsum("nv,vd->nd", dlogits, w)
        return carry, (log_p, dh if own is None else dh + own @ rows.astype(h.dtype), own)

    _, (log_p, *found) = jax.lax.scan(body, None, _in_chunks(chunk, hidden, targets, mask))
    return log_p.reshape(-1)[:n], *(None if a is None else a.reshape(-1, a.shape[-1])[:n] for a in found)


def _tokens_forward(chunk, hidden, weight, targets, mask, ids, rows):  # type: ignore[no-untyped-def]
    log_p, dhidden, own = _scan_tokens(chunk, True, hidden, weight, targets, mask, ids, rows)
    return log_p, (dhidden, own, None if own is None else hidden)


def _tokens_backward(chunk, ids, residuals, g):  # type: ignore[no-untyped-def]
    dhidden, own, hidden = residuals
    drows = None if own is None else jnp.einsum("nr,nd->rd", own * g[:, None], hidden, preferred_element_type=jnp.float32)
    return (dhidden * g[:, None]).astype(dhidden.dtype), None, None, None, drows


token_log_probabilities.defvjp(_tokens_forward, _tokens_backward)


def _in_chunks(chunk, *arrays):  # type: ignore[no-untyped-def]
    """[N, …] -> [chunks, tokens of a chunk, …], the last one filled up with zeros."""
    n = arrays[0].shape[0]
    chunk = min(chunk, n)
    return tuple(jnp.pad(a, ((0, -n % chunk), *((0, 0),) * (a.ndim - 1))).reshape(-1, chunk, *a.shape[1:]) for a in arrays)


def _scan_chunks(chunk, smoothing, gradients, hidden, weight, targets, mask, ids, rows):  # type: ignore[no-untyped-def]
    """(loss, (dW or None, drows or None), dhidden or None); `gradients`: None, "hidden" or "both"."""
    n, d = hidden.shape
    w = host.fetched(weight).astype(hidden.dtype)
    parts = _in_chunks(chunk, hidden, targets, mask)

    def body(carry, part):  # type: ignore[no-untyped-def]
        loss, (dw, drows) = carry
        h, target, m = part
        logits = jnp.einsum("nd,vd->nv", h, w, preferred_element_type=jnp.float32)
        if rows is not None:
            logits = replaced(logits, h, rows, ids)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        nll = normalizer - (1 - smoothing) * picked
        if smoothing:
            nll = nll - smoothing * jnp.mean(logits, axis=-1)
        loss = loss + jnp.sum(nll * m)
        if gradients is None:
            return (loss, (dw, drows)), None
        one_hot = target[:, None] == jnp.arange(logits.shape[-1])
        dlogits = jnp.exp(logits - normalizer[:, None]) - jnp.where(one_hot, 1 - smoothing, 0.0) - smoothing / logits.shape[-1]
        dlogits = (dlogits * m[:, None]).astype(h.dtype)
        dlogits, own = _parted(dlogits, ids)
        if own is not None:
            drows = drows + jnp.einsum("nr,nd->rd", own, h, preferred_element_type=jnp.float32)
        if gradients == "both":
            dw = dw + jnp.einsum("nv,nd->vd", dlogits, h, preferred_element_type=jnp.float32)
        dh = jnp.einsum("nv,vd->nd", dlogits, w)
        return (loss, (dw, drows)), dh if own is None else dh + own @ rows.astype(h.dtype)

    dw = jnp.zeros(weight.shape, jnp.float32) if gradients == "both" else None
    drows = None if rows is None or gradients is None else jnp.zeros(rows.shape, jnp.float32)
    (loss, dweights), dhidden = jax.lax.scan(body, (jnp.zeros((), jnp.float32), (dw, drows)), parts)
    return loss, dweights, None if dhidden is None else dhidden.reshape(-1, d)[:n]


def _forward(chunk, smoothing, trainable, hidden, weight, targets, mask, ids, rows):  # type: ignore[no-untyped-def]
    gradients = "both" if trainable else "hidden"
    loss, (dw, drows), dhidden = _scan_chunks(chunk, smoothing, gradients, hidden, weight, targets, mask, ids, rows)
    return loss, (dhidden, None if dw is None else dw.astype(weight.dtype), None if drows is None else drows.astype(rows.dtype))


def _backward(chunk, smoothing, trainable, ids, residuals, g):  # type: ignore[no-untyped-def]
    dhidden, dw, drows = (None if a is None else (a * g).astype(a.dtype) for a in residuals)
    return dhidden, dw, None, None, drows


linear_cross_entropy.defvjp(_forward, _backward)


def _parted(dlogits: jax.Array, ids: tuple[int, ...]) -> tuple[jax.Array, jax.Array | None]:
    """[N, V] with zeros in the columns `ids`, and those columns; without ids the whole, and None."""
    if not ids:
        return dlogits, None
    columns = jnp.asarray(ids)
    return jnp.where(jnp.zeros(dlogits.shape[-1], bool).at[columns].set(True), 0, dlogits), dlogits[:, columns]


def replaced(logits: jax.Array, hidden: jax.Array, rows: jax.Array, ids: tuple[int, ...]) -> jax.Array:
    """Logits fp32 [..., V] in which the columns `ids` are those of rows [n, D] for hidden [..., D]."""
    own = jnp.einsum("...d,nd->...n", hidden, rows.astype(hidden.dtype), preferred_element_type=jnp.float32)
    if ids == tuple(range(ids[0], ids[0] + len(ids))):  # new tokens follow each other: a slice, no scatter
        return jax.lax.dynamic_update_slice_in_dim(logits, own, ids[0], logits.ndim - 1)
    return logits.at[..., jnp.asarray(ids)].set(own)

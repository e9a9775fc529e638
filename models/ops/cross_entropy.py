"""Linear + cross-entropy over the vocabulary in chunks of tokens: the logits [N, V] never exist as a whole."""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def linear_cross_entropy(
    chunk: int,
    label_smoothing: float,
    trainable: bool,
    hidden: jax.Array,
    weight: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
) -> jax.Array:
    """Sum over tokens of mask · ((1-s)·(-log p[target]) + s·mean over V of (-log p)); s as Hugging Face's label smoother.

    hidden: [N, D]; weight: [V, D]; targets: int32 [N]; mask: fp32 [N]. Logits, softmax and sum in fp32. `chunk`: tokens at a time.
    The gradients of hidden and (if `trainable`) of weight are computed in the forward pass, chunk by chunk: they are linear in the
    scalar that comes back, and so the logits are computed once instead of twice.
    """
    return _scan_chunks(chunk, label_smoothing, None, hidden, weight, targets, mask)[0]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def token_log_probabilities(chunk: int, hidden: jax.Array, weight: jax.Array, targets: jax.Array, mask: jax.Array) -> jax.Array:
    """mask · log p[target] of each token, fp32 [N]; arguments as of `linear_cross_entropy`. weight is frozen: it gets no gradient.

    The gradient of hidden is known but for each token's own factor, so it is computed in the forward pass as well.
    """
    return _scan_tokens(chunk, False, hidden, weight, targets, mask)[0]


def _scan_tokens(chunk, gradients, hidden, weight, targets, mask):  # type: ignore[no-untyped-def]
    """(mask · log p [N], its gradients by the rows of hidden [N, D] or None)."""
    n, d = hidden.shape
    w = weight.astype(hidden.dtype)

    def body(carry, part):  # type: ignore[no-untyped-def]
        rows, target, m = part
        logits = jnp.einsum("nd,vd->nv", rows, w, preferred_element_type=jnp.float32)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        log_p = (jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0] - normalizer) * m
        if not gradients:
            return carry, (log_p, None)
        one_hot = target[:, None] == jnp.arange(logits.shape[-1])
        dlogits = ((jnp.where(one_hot, 1.0, 0.0) - jnp.exp(logits - normalizer[:, None])) * m[:, None]).astype(rows.dtype)
        return carry, (log_p, jnp.einsum("nv,vd->nd", dlogits, w))

    _, (log_p, dhidden) = jax.lax.scan(body, None, _in_chunks(chunk, hidden, targets, mask))
    return log_p.reshape(-1)[:n], None if dhidden is None else dhidden.reshape(-1, d)[:n]


def _tokens_forward(chunk, hidden, weight, targets, mask):  # type: ignore[no-untyped-def]
    return _scan_tokens(chunk, True, hidden, weight, targets, mask)


def _tokens_backward(chunk, dhidden, g):  # type: ignore[no-untyped-def]
    return (dhidden * g[:, None]).astype(dhidden.dtype), None, None, None


token_log_probabilities.defvjp(_tokens_forward, _tokens_backward)


def _in_chunks(chunk, *arrays):  # type: ignore[no-untyped-def]
    """[N, …] -> [chunks, tokens of a chunk, …], the last one filled up with zeros."""
    n = arrays[0].shape[0]
    chunk = min(chunk, n)
    return tuple(jnp.pad(a, ((0, -n % chunk), *((0, 0),) * (a.ndim - 1))).reshape(-1, chunk, *a.shape[1:]) for a in arrays)


def _scan_chunks(chunk, smoothing, gradients, hidden, weight, targets, mask):  # type: ignore[no-untyped-def]
    """(loss, dW or None, dhidden or None); `gradients`: None, "hidden" or "both"."""
    n, d = hidden.shape
    w = weight.astype(hidden.dtype)
    parts = _in_chunks(chunk, hidden, targets, mask)

    def body(carry, part):  # type: ignore[no-untyped-def]
        loss, dw = carry
        h, target, m = part
        logits = jnp.einsum("nd,vd->nv", h, w, preferred_element_type=jnp.float32)
        normalizer = jax.nn.logsumexp(logits, axis=-1)
        picked = jnp.take_along_axis(logits, target[:, None], axis=-1)[:, 0]
        nll = normalizer - (1 - smoothing) * picked
        if smoothing:
            nll = nll - smoothing * jnp.mean(logits, axis=-1)
        loss = loss + jnp.sum(nll * m)
        if gradients is None:
            return (loss, dw), None
        one_hot = target[:, None] == jnp.arange(logits.shape[-1])
        dlogits = jnp.exp(logits - normalizer[:, None]) - jnp.where(one_hot, 1 - smoothing, 0.0) - smoothing / logits.shape[-1]
        dlogits = (dlogits * m[:, None]).astype(h.dtype)
        if gradients == "both":
            dw = dw + jnp.einsum("nv,nd->vd", dlogits, h, preferred_element_type=jnp.float32)
        return (loss, dw), jnp.einsum("nv,vd->nd", dlogits, w)

    dw = jnp.zeros(weight.shape, jnp.float32) if gradients == "both" else None
    (loss, dw), dhidden = jax.lax.scan(body, (jnp.zeros((), jnp.float32), dw), parts)
    return loss, dw, None if dhidden is None else dhidden.reshape(-1, d)[:n]


def _forward(chunk, smoothing, trainable, hidden, weight, targets, mask):  # type: ignore[no-untyped-def]
    gradients = "both" if trainable else "hidden"
    loss, dw, dhidden = _scan_chunks(chunk, smoothing, gradients, hidden, weight, targets, mask)
    return loss, (dhidden, None if dw is None else dw.astype(weight.dtype))


def _backward(chunk, smoothing, trainable, residuals, g):  # type: ignore[no-untyped-def]
    dhidden, dw = residuals
    return (dhidden * g).astype(dhidden.dtype), None if dw is None else (dw * g).astype(dw.dtype), None, None


linear_cross_entropy.defvjp(_forward, _backward)

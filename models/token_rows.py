"""Rows of an embedding and of a head that are trained next to frozen tables: those of some tokens, as PEFT's `trainable_token_indices`.

A row takes the place of the table's own. The table stays as it is: no second one is ever made of it.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.models.ops import host
from moejax.models.ops.cross_entropy import replaced


class TokenRows(nnx.Module):
    """rows: fp32 [n, D], of the tokens `ids` (increasing) of a table [V, D]; they begin as the table's own."""

    def __init__(self, ids: tuple[int, ...], table: jax.Array | jax.ShapeDtypeStruct):
        self.ids = ids
        shape = (len(ids), table.shape[-1])
        rows: Any = jax.ShapeDtypeStruct(shape, jnp.float32)
        if not isinstance(table, jax.ShapeDtypeStruct):
            rows = jnp.asarray(np.asarray(table)[list(ids)]) if host.is_host(table) else table[jnp.asarray(ids)]
            rows = rows.astype(jnp.float32)
        self.rows = nnx.LoRAParam(rows, axes=("tokens", "embed"))

    def looked_up(self, tokens: jax.Array, x: jax.Array) -> jax.Array:
        """x: [..., D], what the table has for tokens [...]: with these rows where they are the tokens'."""
        with jax.named_scope("embed"):
            ids = jnp.asarray(self.ids, tokens.dtype)
            at = jnp.minimum(jnp.searchsorted(ids, tokens), len(self.ids) - 1)
            rows = jnp.take(self.rows.get_value(), at, axis=0).astype(x.dtype)
            return jnp.where((ids[at] == tokens)[..., None], rows, x)

    def scored(self, hidden: jax.Array, logits: jax.Array) -> jax.Array:
        """logits: fp32 [..., V], the table's for hidden [..., D]: with these rows' in the place of its own."""
        return replaced(logits, hidden, self.rows.get_value(), self.ids)

    def within(self, table: np.ndarray) -> np.ndarray:
        """A copy of the table on the host, with these rows in it."""
        out = table.copy()
        out[list(self.ids)] = np.asarray(self.rows.get_value()).astype(table.dtype)
        return out

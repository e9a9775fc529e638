"""Trained rows of tokens: a table with them in it computes the same, and has the same gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import full_logits

from moejax.models.build import build, remove_lora
from moejax.models.config import PRESETS, LoRAConfig
from moejax.models.ops.cross_entropy import linear_cross_entropy, token_log_probabilities

SIZES = PRESETS["mixtral-tiny"].replace(vocab_size=40, num_layers=1, hidden_size=16, intermediate_size=16, num_experts=2)


def drawn(*shape):
    return jax.random.normal(jax.random.key(sum(shape)), shape)


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_with_rows_is_one_with_other_tables(tied):
    sizes, ids = SIZES.replace(tie_word_embeddings=tied), (3, 38, 39)
    model, plain = (build(sizes, key=jax.random.key(0), adapter=LoRAConfig(2, token_rows=rows), dtype=jnp.float32) for rows in (ids, ()))
    tokens = jnp.asarray([[3, 38, 39, 7, 3, 0], [1, 2, 39, 39, 4, 5]])
    begun = full_logits(model, tokens)
    apart = 0 if jax.__version_info__ < (0, 11) else 6e-8  # a newer compiler's product of three columns has another order of sums
    np.testing.assert_allclose(begun, full_logits(plain, tokens), rtol=0, atol=apart)  # they begin as the tables' own
    for rows, table in ((model.embed_rows, plain.embed), (model.output_rows, None if tied else plain.head)):
        if table is not None:
            rows.rows.set_value(drawn(3, 16))
            table.weight.set_value(jnp.asarray(rows.within(np.asarray(table.weight.get_value()))))
    np.testing.assert_allclose(full_logits(model, tokens), full_logits(plain, tokens), rtol=0, atol=1e-6)
    remove_lora(model)
    np.testing.assert_array_equal(full_logits(model, tokens), begun)  # the reference of preference training


@pytest.mark.parametrize("ids", [(3, 7, 29), (4, 5, 6)])
def test_gradients(ids):
    """Of both losses, against a table in which the rows are put."""
    hidden, weight, rows, each = drawn(18, 8), drawn(30, 8), drawn(3, 8), drawn(18)
    targets, mask = jnp.asarray([*ids, *range(15)]), (drawn(18) > -1).astype(jnp.float32)

    def expected(of_logits):
        return lambda hidden, rows: of_logits(hidden @ weight.at[jnp.asarray(ids)].set(rows).T)

    def log_p(logits):
        return jnp.sum(each * mask * jax.nn.log_softmax(logits)[jnp.arange(18), targets])

    def smoothed(logits):
        p = jax.nn.log_softmax(logits)
        return -jnp.sum(mask * (0.9 * p[jnp.arange(18), targets] + 0.1 * p.mean(-1)))

    def tokens(hidden, rows):
        return jnp.sum(each * token_log_probabilities(4, hidden, weight, targets, mask, ids, rows))

    def entropy(hidden, rows):
        return linear_cross_entropy(4, 0.1, False, hidden, weight, targets, mask, ids, rows)

    for ours, theirs in ((tokens, expected(log_p)), (entropy, expected(smoothed))):
        (a, found), (b, wanted) = (jax.value_and_grad(f, (0, 1))(hidden, rows) for f in (ours, theirs))
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-5)
        for x, y in zip(found, wanted, strict=True):
            np.testing.assert_allclose(x, y, rtol=0, atol=1e-5)

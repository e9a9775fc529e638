"""Greedy decoding of prompts of different lengths in one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from models.build import build
from models.config import PRESETS
from moejax.errors import UserError
from moejax.evaluation.generate import generate


@pytest.fixture(scope="module")
def model():
    config = PRESETS["mixtral-tiny"].replace(vocab_size=50, hidden_size=32, num_layers=2, max_position_embeddings=64)
    return build(config, key=jax.random.key(0), dtype=jnp.float32)


def full_pass(model, prompt, steps, end):
    """Greedy by computing everything anew for each token."""
    tokens = list(prompt)
    for _ in range(steps):
        ids = jnp.array([tokens])
        logits = model.logits(model(ids, jnp.ones_like(ids), jnp.arange(len(tokens))[None])[0])
        following = int(jnp.argmax(logits[0, -1]))
        if following == end:
            break
        tokens.append(following)
    return tokens[len(prompt) :]


def test_batches_answer_as_each_alone(model):
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 50, n).tolist() for n in (3, 11, 7)]
    expected = [full_pass(model, p, 6, end=-1) for p in prompts]
    assert generate(model, prompts, max_new_tokens=6, end=-1, batch_size=2) == expected
    end = expected[1][3]
    cut = [e[: e.index(end)] if end in e else e for e in expected]
    assert generate(model, prompts, max_new_tokens=6, end=end) == cut


def test_bad_prompts(model):
    with pytest.raises(UserError, match="prompt 1 is empty"):
        generate(model, [[1], []], max_new_tokens=2, end=0)
    with pytest.raises(UserError, match="exceed the model's 64 positions"):
        generate(model, [[1]], max_new_tokens=64, end=0)

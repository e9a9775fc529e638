"""Decoding prompts of different lengths in one batch: greedy, sampled, in pieces, stopped early."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from moejax.errors import UserError
from moejax.evaluation import generate as generating
from moejax.evaluation.generate import CHECKED, Sampling, _go_on, before, candidates, cut, generate, stream
from moejax.models.build import build
from moejax.models.cache import decode_step, init_cache, prefill
from moejax.models.config import PRESETS

CONFIG = PRESETS["mixtral-tiny"].replace(vocab_size=50, hidden_size=32, num_layers=2, max_position_embeddings=64)


@pytest.fixture(scope="module")
def model():
    return build(CONFIG, key=jax.random.key(0), dtype=jnp.float32)


def full_pass(model, prompt, steps, end):
    """Greedy by computing everything again for each token. Rows are filled up: what follows a token never reaches it."""
    graphdef, state = nnx.split(model)
    length, ids = len(prompt) + steps, np.zeros((1, 24), np.int32)
    ids[0, : len(prompt)] = prompt
    for place in range(len(prompt), length):
        following = int(np.argmax(full_logits(graphdef, state, ids)[0, place - 1]))
        if following == end:
            return ids[0, len(prompt) : place].tolist()
        ids[0, place] = following
    return ids[0, len(prompt) : length].tolist()


@partial(jax.jit, static_argnums=0)
def full_logits(graphdef, state, tokens):
    model = nnx.merge(graphdef, state)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return model.logits(model(tokens, jnp.ones_like(tokens), positions)[0])


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
    with pytest.raises(UserError, match="max_new_tokens = 0"):
        generate(model, [[1]], max_new_tokens=0, end=0)


def test_cached_logits_of_a_padded_batch_equal_the_full_pass(model):
    """At every step. (BlackMamba: tests/models/test_blackmamba.py.)"""
    tokens, lengths = jax.random.randint(jax.random.key(1), (3, 20), 0, 50), jnp.array([9, 2, 5])
    graphdef, state = nnx.split(model)
    full = full_logits(graphdef, state, tokens)
    begin = jax.jit(lambda state, tokens: prefill(nnx.merge(graphdef, state), tokens, lengths, init_cache(model, 3, 20)))
    go_on = jax.jit(lambda state, tokens, cache: decode_step(nnx.merge(graphdef, state), tokens, cache))
    logits, cache = begin(state, tokens[:, :9])
    for step in range(11):
        np.testing.assert_allclose(logits, full[jnp.arange(3), lengths + step - 1], rtol=0, atol=1e-5)
        logits, cache = go_on(state, tokens[jnp.arange(3), lengths + step], cache)


PROMPTS = [[3, 1, 4], [1, 5, 9, 2, 6, 5, 3, 5, 8], [2, 7, 1, 8, 2]]


def test_a_sampled_row_is_the_same_alone(model):
    sampling = Sampling(temperature=1.0, top_p=0.95, top_k=40, seed=3)
    together = generate(model, PROMPTS, max_new_tokens=6, end=-1, sampling=sampling)
    alone = [generate(model, [p], max_new_tokens=6, end=-1, sampling=sampling)[0] for p in PROMPTS]
    in_twos = generate(model, PROMPTS[::-1], max_new_tokens=6, end=-1, sampling=sampling, batch_size=2)[::-1]
    assert together == alone == in_twos
    assert together != generate(model, PROMPTS, max_new_tokens=6, end=-1, sampling=Sampling(1.0, 0.95, 40, seed=4))
    copies = generate(model, [PROMPTS[0]] * 3, max_new_tokens=6, end=-1, sampling=sampling)
    assert copies[0] == alone[0] and len({tuple(c) for c in copies}) == 3


def test_each_step_draws_anew():
    """Of equally likely tokens: with one draw for all steps it would be one token again and again."""
    level = build(CONFIG, key=jax.random.key(0), dtype=jnp.float32)
    level.head.weight.set_value(0 * level.head.weight.get_value())
    (drawn,) = generate(level, PROMPTS[:1], max_new_tokens=50, end=-1, sampling=Sampling(1.0, seed=3))
    assert len(set(drawn)) > 20


def test_one_candidate_is_greedy(model):
    greedy = generate(model, PROMPTS, max_new_tokens=6, end=-1)
    for sampling in (Sampling(5.0, top_k=1), Sampling(5.0, top_p=1e-6), Sampling(1e-30)):
        assert generate(model, PROMPTS, max_new_tokens=6, end=-1, sampling=sampling) == greedy


def test_pieces_are_the_whole(model):
    sampling = Sampling(1.0, 0.9, seed=7)
    whole = generate(model, PROMPTS, max_new_tokens=6, end=-1, sampling=sampling)
    end = whole[1][3]
    pieces = list(stream(model, PROMPTS, max_new_tokens=6, end=end, sampling=sampling, piece=2))
    assert [p.shape[1] for p in pieces] == [1, 2, 2, 1][: len(pieces)]
    cut_there = [w[: w.index(end)] if end in w else w for w in whole]
    assert [before(row, end) for row in np.concatenate(pieces, axis=1)] == cut_there
    assert generate(model, PROMPTS, max_new_tokens=6, end=end, sampling=sampling) == cut_there


@pytest.fixture
def steps(monkeypatch):
    """The decoding steps of each compiled program that ran."""
    counted, go_on = [], generating._go_on

    def counting(graphdef, state, out, cache, step, *rest):
        before = int(step)
        result = go_on(graphdef, state, out, cache, step, *rest)
        counted.append(int(result[2]) - before)
        return result

    monkeypatch.setattr(generating, "_go_on", counting)
    return counted


def test_a_batch_ends_when_each_row_has_stopped(model, steps):
    """At the next question after the last row's stop, by a stop or an end token; what was said until then is the same."""
    whole = generate(model, PROMPTS, max_new_tokens=50, end=-1)
    assert sum(steps) == 49
    steps.clear()
    answers = generate(model, PROMPTS, max_new_tokens=50, end=-1, stopped=lambda row, tokens: len(tokens) >= (1, 20, 9)[row])
    assert sum(steps) == 2 * CHECKED and [len(a) for a in answers] == [1 + 2 * CHECKED] * 3
    assert answers == [w[: 1 + 2 * CHECKED] for w in whole]
    steps.clear()
    assert generate(model, PROMPTS, max_new_tokens=50, end=-1, stopped=lambda row, tokens: row > 0) == whole
    assert sum(steps) == 49  # one row goes on to the end
    steps.clear()
    ends = whole[0][5]  # the other rows are stopped before theirs, if it comes
    cut_there = generate(model, PROMPTS, max_new_tokens=50, end=ends, stopped=lambda row, tokens: row > 0)
    assert cut_there[0] == whole[0][: whole[0].index(ends)] and sum(steps) <= CHECKED


def test_a_last_batch_that_is_not_full_ends_with_its_rows(model, steps):
    """What it is filled up with does not go on."""
    end = generate(model, PROMPTS[:1], max_new_tokens=50, end=-1)[0][5]
    (answer,) = generate(model, PROMPTS[:1], max_new_tokens=50, end=end)
    steps.clear()
    assert generate(model, PROMPTS[:1] * 3, max_new_tokens=50, end=end, batch_size=2) == [answer] * 3
    assert [s for s in steps if s] == [len(answer)] * 2


def test_one_compile_per_bucket(model):
    generate(model, [[1] * 3], max_new_tokens=6, end=-1, sampling=Sampling(1.0))
    compiled = _go_on.jitted()._cache_size()
    for length, settings in ((16, Sampling(2.0, 0.5, 3, 9)), (9, Sampling(0.1))):
        generate(model, [[1] * length], max_new_tokens=6, end=7, sampling=settings)
    assert _go_on.jitted()._cache_size() == compiled
    generate(model, [[1] * 17], max_new_tokens=6, end=-1, sampling=Sampling(1.0))
    assert _go_on.jitted()._cache_size() == compiled + 1


def test_candidates_and_their_frequencies():
    """Shares 0.1, 0.4, 0.2, 0.3: the fewest with 0.8 together are the tokens 1, 3, 2; of the likeliest two, 4/7 and 3/7."""
    logits = jnp.log(jnp.array([[0.1, 0.4, 0.2, 0.3]])) + 5.0
    for top_p, top_k, shares in (
        (0.8, 4, [0, 4 / 9, 2 / 9, 3 / 9]),
        (0.69, 4, [0, 4 / 7, 0, 3 / 7]),
        (1.0, 2, [0, 4 / 7, 0, 3 / 7]),
        (0.5, 2, [0, 1, 0, 0]),  # top_k first: token 1 has 4/7 of what is left
        (1.0, 4, [0.1, 0.4, 0.2, 0.3]),
    ):
        ids, kept = candidates(logits, top_p, top_k)
        np.testing.assert_array_equal(ids[0], [1, 3, 2, 0])
        np.testing.assert_allclose(jax.nn.softmax(kept[0])[jnp.argsort(ids[0])], shares, atol=1e-6)
        drawn = ids[0][jax.random.categorical(jax.random.key(0), kept[0], shape=(20_000,))]
        counts = np.bincount(drawn, minlength=4)
        assert not counts[np.array(shares) == 0].any()
        np.testing.assert_allclose(counts / 20_000, shares, atol=0.015)  # four standard deviations


def test_equal_logits_and_the_last_token():
    ids, kept = candidates(jnp.zeros((1, 5)), 1.0, 1)
    assert ids[0, 0] == 0 and np.isfinite(kept[0]).tolist() == [True, False, False, False, False]
    assert np.isfinite(candidates(jax.random.normal(jax.random.key(0), (1, 32000)), 1.0, 32000)[1]).all()


def test_stop_strings():
    assert cut("one\n\ntwo END", ["END", "\n\n"]) == ("one", True)
    assert cut("one", ["END"]) == ("one", False)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: expected 0"),
        ({"temperature": float("nan")}, "temperature = nan"),
        ({"top_p": 0.0}, "top_p = 0.0: expected 0 < top_p <= 1"),
        ({"top_p": 1.1}, "top_p = 1.1"),
        ({"top_k": 0}, "top_k = 0: expected at least 1"),
        ({"seed": -1}, "seed = -1"),
    ],
)
def test_bad_sampling(settings, message):
    with pytest.raises(UserError, match=message):
        Sampling(**settings)

"""Log-likelihoods and batched greedy decoding against transformers and PEFT (tests/oracles/evaluation.py), with and without adapter."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import VECTORS

from moejax.errors import UserError
from moejax.evaluation.generate import generate
from moejax.evaluation.loglikelihood import _score, loglikelihoods
from moejax.hub.peft import load_adapter
from moejax.hub.weights import load_weights
from moejax.models.build import build
from moejax.models.config import LoRAConfig, from_hub_config


@pytest.fixture(scope="module")
def vectors():
    with np.load(VECTORS / "evaluation.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module", params=[pytest.param("base", marks=pytest.mark.long), "adapter"])
def case(request, mixtral_folder, reference_config):
    if request.param == "base":
        return "base", load_weights(build(reference_config, dtype=jnp.float32), mixtral_folder, jax.random.key(0))
    settings = json.loads((VECTORS / "peft_all/adapter_config.json").read_text())
    adapter = LoRAConfig(settings["r"], settings["lora_alpha"], 0.0, tuple(settings["target_modules"]))
    model = load_weights(build(reference_config, adapter=adapter, dtype=jnp.float32), mixtral_folder, jax.random.key(0))
    load_adapter(model, VECTORS / "peft_all")
    return "adapter", model


def numbered(vectors, name):
    return [vectors[f"{name}/{i}"].tolist() for i in range(sum(key.startswith(f"{name}/") for key in vectors))]


@pytest.fixture(scope="module")
def pairs(vectors):
    return list(zip(numbered(vectors, "context"), numbered(vectors, "continuation"), strict=True))


def test_loglikelihoods(case, vectors, pairs):
    """In batches that are full and not."""
    name, model = case
    seen = []
    scores = loglikelihoods(model, pairs, rows=3, progress=lambda done, total: seen.append((done, total)))
    np.testing.assert_allclose([s.loglikelihood for s in scores], vectors[f"{name}/loglikelihood"], rtol=0, atol=1e-4)
    assert [s.greedy for s in scores] == vectors[f"{name}/greedy"].tolist()
    assert seen[-1] == (len(pairs), len(pairs)) and [done for done, _ in seen] == sorted(done for done, _ in seen)


@pytest.mark.parametrize(("rows", "chunk"), [(1, 256), (8, 7)])
def test_batch_and_chunk_do_not_matter(case, vectors, pairs, rows, chunk, monkeypatch):
    """Alone; and more rows than pairs, with a chunk of logits that does not divide the places."""
    name, model = case
    monkeypatch.setattr("moejax.evaluation.loglikelihood.CHUNK", chunk)
    scores = loglikelihoods(model, pairs[:2], rows=rows)
    np.testing.assert_allclose([s.loglikelihood for s in scores], vectors[f"{name}/loglikelihood"][:2], rtol=0, atol=1e-4)


def test_one_program_per_bucket(case, pairs):
    model = case[1]
    loglikelihoods(model, [([1] * 5, [2] * 3)], rows=3)
    compiled = _score.jitted()._cache_size()
    loglikelihoods(model, [([1] * 3, [2] * 13), ([1] * 10, [2]), ([4], [2])], rows=3)
    assert _score.jitted()._cache_size() == compiled


def test_greedy_decoding(case, vectors):
    """Token for token: one batch of prompts of 1 to 21 tokens; an end token that two rows say, at once and in the middle."""
    name, model = case
    prompts = numbered(vectors, "prompt")
    for key, end in (("free", int(vectors["none"])), ("ended", int(vectors["end"]))):
        expected = [[t for t in row if t >= 0 and t != end] for row in vectors[f"{name}/{key}"].tolist()]
        assert generate(model, prompts, max_new_tokens=24, end=end, batch_size=5) == expected
        if (name, key) == ("base", "ended"):
            assert [len(e) for e in expected] == [0, 24, 7, 24, 24]


def test_blackmamba_loglikelihoods(blackmamba_folder, blackmamba_vectors):
    """Against the logits of the oracle's full pass."""
    config = from_hub_config(json.loads((blackmamba_folder / "config.json").read_text())).replace(experts_per_token=1)
    model = load_weights(build(config, dtype=jnp.float32), blackmamba_folder, jax.random.key(0))
    ids, mask, logits = (blackmamba_vectors[k] for k in ("ids", "mask", "top1/logits"))
    lengths, starts = mask.sum(1), (9, 10, 1)
    pairs = [(ids[r, :s].tolist(), ids[r, s : lengths[r]].tolist()) for r, s in enumerate(starts)]
    log_p = logits.astype(np.float64) - np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
    expected = [sum(log_p[r, t - 1, ids[r, t]] for t in range(s, lengths[r])) for r, s in enumerate(starts)]
    np.testing.assert_allclose([x.loglikelihood for x in loglikelihoods(model, pairs, rows=3)], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("pair", "rows", "message"),
    [
        (([], [1]), 2, "pair 0: its context is empty"),
        (([1], []), 2, "pair 0: its continuation is empty"),
        (([1] * 120, [1] * 10), 2, "pair 0 has 130 tokens, the model 128 positions"),
        (([1], [1]), 0, "rows = 0"),
    ],
)
def test_bad_pairs(case, pair, rows, message):
    with pytest.raises(UserError, match=message):
        loglikelihoods(case[1], [pair], rows=rows)


def test_a_pair_of_the_whole_length(case):
    """The last token is only predicted: 129 tokens fit 128 positions."""
    assert np.isfinite(loglikelihoods(case[1], [([1] * 120, [1] * 9)], rows=1)[0].loglikelihood)

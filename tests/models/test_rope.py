"""Scaled rotary positions against transformers 5 (tests/oracles/rope.py)."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import VECTORS

from moejax.models.config import PRESETS, from_hub_config
from moejax.models.config.rope import Rope, of_hub
from moejax.models.layers import rotate

CASES = ("gpt_oss", "qwen3_moe", "qwen3_moe_own", "deepseek_v2", "two_scales", "asked", "one_pair")
LONG = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


@pytest.fixture(scope="module")
def vectors():
    return dict(np.load(VECTORS / "rope.npz"))


@pytest.mark.parametrize("case", CASES)
def test_frequencies_and_scale(case, vectors):
    settings = json.loads(str(vectors[f"{case}/settings"]))
    rope = of_hub({"rope_parameters": settings}, settings["positions"], settings["rope_theta"])
    np.testing.assert_allclose(rope.frequencies(settings["size"]), vectors[f"{case}/frequencies"], rtol=3e-7)
    np.testing.assert_allclose(rope.scale, vectors[f"{case}/scale"], rtol=1e-12)


def test_plain_positions_are_those_of_layers():
    """Without scaling `rotate` computes its own frequencies: the same to fp32."""
    x = jnp.zeros((1, 2, 1, 8)).at[..., :4].set(1.0)
    found = np.asarray(rotate(x, jnp.array([[3, 5]]), Rope(1e4)))[0, :, 0]
    angle = np.array([[3], [5]]) * Rope(1e4).frequencies(8)
    np.testing.assert_allclose(found, np.concatenate([np.cos(angle), np.sin(angle)], 1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("rope", [Rope(1e4), of_hub({"rope_scaling": LONG}, 2048, 1e4)])
def test_without_halves_they_are_the_same(rope):
    """As a TPU turns heads."""
    x, positions = jax.random.normal(jax.random.key(0), (2, 5, 3, 8)), jnp.arange(10).reshape(2, 5) * 37
    found, expected = (rotate(x, positions, rope, whole) for whole in (True, False))
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-6)


def test_both_dialects_are_read_and_written():
    plain = PRESETS["qwen3-moe-tiny"].to_hub_config()
    four = from_hub_config(plain | {"rope_scaling": LONG})
    five = {k: v for k, v in plain.items() if k != "rope_theta"} | {"rope_parameters": LONG | {"rope_theta": plain["rope_theta"]}}
    assert from_hub_config(five) == four and four != PRESETS["qwen3-moe-tiny"]
    assert (four.rope_scaling.factor, four.rope_scaling.original, four.rope_scaling.truncate) == (4.0, 512, True)
    assert from_hub_config(four.to_hub_config()) == four
    assert from_hub_config(plain | {"rope_scaling": LONG}, ["rope_scaling"]) == PRESETS["qwen3-moe-tiny"]


@pytest.mark.parametrize(
    ("change", "message"),
    [({"factor": None}, r'rope_scaling\.rope_type = "yarn" lacks factor'), ({"factor": "4"}, 'factor = "4": expected a number'),
     ({"factor": 0.5}, "yarn: factor = 0.5: expected a number of at least 1"),
     ({"beta_fast": -1}, "beta_fast = -1: expected a number above 0"),
     ({"truncate": 2}, r"truncate = 2 \(expected false or true\)"), ({"short_factor": [1.0]}, r"short_factor = \[1.0\]: not known"),
     ({"original_max_position_embeddings": 0.5}, "original_max_position_embeddings = 0.5: expected a whole number")],
)  # fmt: skip
def test_settings_that_mean_nothing_here(change, message):
    with pytest.raises(ValueError, match=message):
        from_hub_config(PRESETS["qwen3-moe-tiny"].to_hub_config() | {"rope_scaling": LONG | change})


def test_two_settings_that_differ_and_an_override():
    with pytest.raises(ValueError, match="rope_parameters and rope_scaling say different things"):
        from_hub_config(PRESETS["qwen3-moe-tiny"].to_hub_config() | {"rope_scaling": LONG, "rope_parameters": LONG | {"factor": 2.0}})
    with pytest.raises(ValueError, match=r"rope_scaling = 4\.0: it is read from the config\.json"):
        PRESETS["qwen3-moe-tiny"].replace(rope_scaling=4.0)

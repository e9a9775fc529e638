"""A checkpoint's logits a layer at a time: those of the whole model, and of the adapter that was asked for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import ROOT, finished_run

from models.build import build
from models.config import LORA_TARGETS, LoRAConfig, Quantization
from moejax.hub import layerwise, peft, weights

TOKENS = np.arange(1, 41, dtype=np.int32)


def whole(folder, trained=None, **arguments):
    """The same by the model in one piece."""
    model = weights.load_weights(build(weights.read_config(folder), dtype=jnp.float32, **arguments), folder, jax.random.key(0))
    if trained is not None:
        peft.load_adapter(model, trained)
    hidden, _ = model(TOKENS[None], jnp.ones((1, len(TOKENS)), jnp.int32), jnp.arange(len(TOKENS))[None])
    return np.asarray(model.logits(hidden)[0])


@pytest.mark.parametrize("name", ["tiny-mixtral", "tiny-blackmamba"])
def test_a_checkpoint(name):
    folder = ROOT / "assets" / name
    (found,) = layerwise.logits(weights.read_config(folder), folder, TOKENS, param_dtype=jnp.bfloat16)
    expected = whole(folder, param_dtype=jnp.bfloat16)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_adapters_over_nf4_each_by_itself(tmp_path):
    folder = ROOT / "assets/tiny-mixtral"
    arguments = {"quantization": Quantization(), "adapter": LoRAConfig(2, 4.0, 0.0, LORA_TARGETS)}
    finished_run(tmp_path / "run")
    first, second = tmp_path / "run/adapter", tmp_path / "other"
    model = build(weights.read_config(folder), **arguments)
    peft.load_adapter(model, first)
    last = model.layers.moe.w2.lora.b  # of the last layer only, so that a layer that is mistaken for another shows
    last.set_value(last.get_value().at[-1].multiply(2))
    peft.save_adapter(model, second, "base")
    found = layerwise.logits(weights.read_config(folder), folder, TOKENS, adapters=[first, second], **arguments)
    for logits, adapter in zip(found, (first, second), strict=True):
        expected = whole(folder, adapter, **arguments)
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    assert np.abs(found[0] - found[1]).max() > 0.01


def test_no_more_than_a_layer_is_held(monkeypatch):
    """Live arrays after each layer: less than two layers and the embedding, of a model of four."""
    folder = ROOT / "assets/tiny-mixtral"
    sizes = weights.read_config(folder)
    held = []
    before = {id(a) for a in jax.live_arrays()}

    def look():
        held.append(sum(a.nbytes for a in jax.live_arrays() if id(a) not in before))

    layerwise.logits(sizes, folder, TOKENS, param_dtype=jnp.bfloat16, advance=look)
    layer = sum(
        v.get_value().size * 2 for name, v in weights.base_variables(build(sizes)) if name.startswith("layers.")
    ) // sizes.num_layers
    assert len(held) == sizes.num_layers and max(held) < 2 * layer + 4 * sizes.vocab_size * sizes.hidden_size

"""What a step takes of each weight: the schedule's rate, the decay and where it belongs."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from support import TINY

from moejax.config import TrainingConfig
from moejax.models.build import build
from moejax.models.config import LORA_TARGETS, PRESETS, LoRAConfig
from moejax.training.optimizer import is_decayed, make_optimizer
from moejax.training.program import split

RATE, DECAY, STEPS = 0.01, 2.0, 3
MODELS = {
    "mixtral": build(PRESETS["mixtral-tiny"].replace(vocab_size=16, **TINY)),
    "blackmamba": build(PRESETS["blackmamba-tiny"].replace(vocab_size=16, hidden_size=32, intermediate_size=32, num_layers=4)),
}
ADAPTED = build(PRESETS["mixtral-tiny"].replace(vocab_size=16, **TINY), adapter=LoRAConfig(2, 4.0, 0.0, LORA_TARGETS))
LEFT_ALONE = {
    "mixtral": {"attention_norm.weight", "moe_norm.weight", "norm.weight"},
    "blackmamba": {
        "mamba_norm.weight", "moe_norm.weight", "norm.weight", "norm.bias", "conv.bias", "router.bias",
        "mamba.dt_bias", "mamba.a_log", "mamba.d",
    },
}  # fmt: skip


def ones(model, full=True):
    """In the places of the model's weights, one number each: the rules do not ask for more."""
    return jax.tree.map(lambda a: jnp.ones(1), split(model, full=full)[1])


def by_name(state):
    """The last two names of a weight's path -> its value."""
    return {".".join(path[-2:]): np.unique(np.asarray(v.get_value())) for path, v in nnx.to_flat_state(state)}


def after(optimizer, weights):
    """The weights after some steps whose gradients are zero: nothing but the decay changes them."""
    state, nothing = optimizer.init(weights), jax.tree.map(jnp.zeros_like, weights)
    for _ in range(STEPS):
        updates, state = optimizer.update(nothing, state, weights)
        weights = optax.apply_updates(weights, updates)
    return by_name(weights)


@pytest.mark.parametrize("rule", ["adamw", "adamw_8bit", "adafactor", "lion"])
@pytest.mark.parametrize("on", ["matrices", "all"])
@pytest.mark.parametrize("family", MODELS)
def test_decay(family, on, rule):
    config = TrainingConfig(steps=STEPS, optimizer=rule, weight_decay=DECAY, weight_decay_on=on)
    found = after(make_optimizer(config, optax.constant_schedule(RATE)), ones(MODELS[family]))
    assert set(found) > LEFT_ALONE[family]
    for name, values in found.items():
        expected = 1.0 if on == "matrices" and name in LEFT_ALONE[family] else (1 - RATE * DECAY) ** STEPS
        np.testing.assert_allclose(values, expected, rtol=1e-6, err_msg=name)


def test_adapters_are_decayed_as_peft_does():
    """transformers' Trainer leaves out norms and biases: an adapter has neither."""
    found = after(
        make_optimizer(TrainingConfig(steps=STEPS, weight_decay=DECAY), optax.constant_schedule(RATE)), ones(ADAPTED, full=False)
    )
    assert set(found) == {"lora.a", "lora.b"}
    for values in found.values():
        np.testing.assert_allclose(values, (1 - RATE * DECAY) ** STEPS, rtol=1e-6)


@pytest.mark.parametrize("family", MODELS)
def test_the_names_agree_with_the_axes(family):
    """A new weight with one axis a layer, or along Mamba's states, is named so that it is left alone."""
    for path, variable in nnx.to_flat_state(split(MODELS[family], full=True)[1]):
        axes = [axis for axis in variable.get_metadata("axes") if axis != "layers"]
        assert is_decayed(path) == (len(axes) > 1 and "state" not in axes), path


@pytest.mark.parametrize(
    ("rule", "reference"),
    [
        ("adamw", optax.adamw(RATE, 0.9, 0.999, 1e-8, weight_decay=0.0)),
        ("lion", optax.lion(RATE, 0.9, 0.999, weight_decay=0.0)),
        ("adafactor", optax.adafactor(RATE, multiply_by_parameter_scale=False)),
    ],
)
def test_it_is_the_rule_of_optax(rule, reference):
    """Its updates, and its state by the same paths: that is how a checkpoint finds it."""
    optimizer = make_optimizer(TrainingConfig(steps=1, optimizer=rule, clip_norm=None), optax.constant_schedule(RATE))
    weights = {"w": jnp.ones((3, 4)), "norm": jnp.ones(4)}
    expected, found = reference.init(weights), optimizer.init(weights)
    for step in range(2):
        gradients = {name: jnp.cos(step + jnp.arange(w.size, dtype=jnp.float32)).reshape(w.shape) for name, w in weights.items()}
        updates, expected = reference.update(gradients, expected, weights)
        ours, found = optimizer.update(gradients, found, weights)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(updates), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-6)

    def moments(state):
        flat = {jax.tree_util.keystr(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}
        return {path: leaf for path, leaf in flat.items() if "[2]" not in path}  # a constant rate has no count in optax

    assert moments(found).keys() == moments(expected).keys()


@pytest.mark.parametrize("rule", ["adamw", "adamw_8bit", "adafactor", "lion"])
def test_a_gradient_is_clipped_by_the_norm_of_all_its_parts(rule):
    """Before the rule sees it: which would hardly show in one step, but does in its moments."""
    optimizer, plain = (
        make_optimizer(TrainingConfig(steps=1, optimizer=rule, clip_norm=limit), optax.constant_schedule(RATE)) for limit in (0.5, None)
    )
    weights = {"w": jnp.ones(3), "v": jnp.ones(2)}
    state, expected = optimizer.init(weights), plain.init(weights)
    for size in (10.0, 0.01, 3.0):
        gradients = {"w": size * jnp.arange(3.0), "v": -size * jnp.ones(2)}
        scale = min(1.0, 0.5 / (size * 7**0.5))
        ours, state = optimizer.update(gradients, state, weights)
        by_hand, expected = plain.update(jax.tree.map(lambda g, s=scale: s * g, gradients), expected, weights)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(by_hand), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)

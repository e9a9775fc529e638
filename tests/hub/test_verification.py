"""What was written against what was trained: a routing tie is no fault, and a fault is none of rounding's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import walked_logits

from moejax.hub import merge, peft, verification
from moejax.hub.layerwise import Checkpoint
from moejax.hub.names import tensors
from moejax.hub.save import save_weights
from moejax.models.build import build
from moejax.models.config import PRESETS, BlackMambaConfig, LoRAConfig, Quantization

SMALL = PRESETS["mixtral-tiny"].replace(
    vocab_size=32, hidden_size=32, intermediate_size=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, num_experts=4
)
MAMBA = BlackMambaConfig(vocab_size=32, hidden_size=32, intermediate_size=32, num_layers=4, num_experts=4, experts_per_token=2)
TOKENS = np.arange(48, dtype=np.int32) % 31
LORA = LoRAConfig(2, 4.0, 0.0, ("q_proj", "gate", "w1", "w2", "w3"))
LIMIT = 0.05


def written_in(dtype, model, folder):
    save_weights(model, folder, dtype)
    return Checkpoint(model.config, folder, (), {"param_dtype": dtype})


@pytest.mark.parametrize("sizes", [pytest.param(SMALL, id="mixtral"), pytest.param(MAMBA, id="blackmamba", marks=pytest.mark.long)])
def test_a_routing_tie_is_no_fault(sizes, tmp_path):
    """Two experts' scores differ by less than bf16 holds, in every layer: tokens go elsewhere, and the logits by themselves are far off."""
    model = build(sizes, key=jax.random.key(0), dtype=jnp.float32)
    router = model.layers.moe.router.weight
    near = router.get_value()[:, 0] * (1 + 1e-3 * jax.random.normal(jax.random.key(1), router.get_value()[:, 0].shape))
    router.set_value(router.get_value().at[:, 1].set(near) * 8)
    trained, written = written_in(jnp.float32, model, tmp_path / "fp32"), written_in(jnp.bfloat16, model, tmp_path / "bf16")
    found = verification.compare([trained, written], TOKENS, LIMIT)
    assert found.rerouted > 0 and found.gap < 0.01 and found.share < LIMIT and found.tokens == len(TOKENS)
    if sizes is MAMBA:
        return
    expected, alone = (walked_logits(c.sizes, c.folder, TOKENS, **c.arguments)[0] for c in (trained, written))
    assert np.abs(expected - alone).max() > 2 * found.largest


def test_a_dense_model_has_nothing_to_choose(tmp_path):
    model = build(SMALL.replace(experts_per_token=4), key=jax.random.key(0), dtype=jnp.float32)
    checkpoints = [written_in(dtype, model, tmp_path / str(dtype)) for dtype in (jnp.float32, jnp.bfloat16)]
    found = verification.compare(checkpoints, TOKENS, LIMIT)
    assert found.share < LIMIT and found.rerouted == 0
    sparse = Checkpoint(SMALL, *checkpoints[1][1:])
    with pytest.raises(verification.Different, match=r"config\.json says experts_per_token = 2, and 4 was trained"):
        verification.compare([checkpoints[0], sparse], TOKENS, LIMIT)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """An adapter over NF4 after a few small steps: its deltas are a percent of the weights."""
    folder = tmp_path_factory.mktemp("trained")
    save_weights(build(SMALL, key=jax.random.key(0), dtype=jnp.float32), folder / "base")
    arguments = {"quantization": Quantization(), "adapter": LORA}
    model = build(SMALL, **arguments)
    for index, (_, lora) in enumerate(peft.adapted(model).values()):
        lora.a.set_value(jax.random.uniform(jax.random.key(index), lora.a.get_value().shape, minval=-0.2, maxval=0.2))
        lora.b.set_value(0.004 * jax.random.normal(jax.random.key(100 + index), lora.b.get_value().shape))
    peft.save_adapter(model, folder / "adapter", "base")
    return model, Checkpoint(SMALL, folder / "base", (folder / "adapter",), arguments)


def merged(trained, folder):
    model, checkpoint = trained
    merge.save_merged(model, checkpoint.folder, folder)
    return verification.compare([checkpoint, Checkpoint(model.config, folder, (), {"param_dtype": jnp.bfloat16})], TOKENS, LIMIT)


def test_a_right_merge(trained, tmp_path):
    assert merged(trained, tmp_path / "m").share < 0.02


W1 = "model.layers.1.block_sparse_moe.experts.3.w1.weight"


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ("one expert's delta", W1),
        ("w1 and w3", "model.layers.0.block_sparse_moe.experts.0.w1.weight"),
        ("a layer", "model.layers.1.self_attn.q_proj.weight"),
        ("the scale", "model.layers.0.self_attn.q_proj.weight"),
        ("the router", "model.layers.0.block_sparse_moe.gate.weight"),
        ("the head", "lm_head.weight"),
    ],
)
def test_a_wrong_merge_is_named(fault, name, trained, tmp_path, monkeypatch):
    right = merge.merged_tensor

    def wrong(model, tensor, files, base):
        value = right(model, tensor, files, base)
        place = tensors(model.config)[tensor][0]
        lora = dict(peft.adapted(model)).get(tensor.removesuffix(".weight"), (None, None))[1]
        delta = 0 if lora is None else lora.scale * np.asarray(
            lora.b.get_value()[merge.index_of(place)] @ lora.a.get_value()[merge.index_of(place)]
        )  # fmt: skip
        match fault:
            case "one expert's delta":
                return value - delta * (tensor == W1)
            case "w1 and w3":
                other = {"w1": "w3", "w3": "w1"}.get(tensor.split(".")[-2])
                return value if other is None else right(model, tensor.replace(tensor.split(".")[-2], other), files, base)
            case "a layer":
                return value - delta * (".layers.1." in tensor)
            case "the scale":
                return value - delta / 2
            case "the router":
                return value - delta * ("gate" in tensor)
            case "the head":
                return value * (1.02 if tensor == "lm_head.weight" else 1)

    monkeypatch.setattr(merge, "merged_tensor", wrong)
    with pytest.raises(verification.Different, match=rf"^{name} differs from what was trained by .* rounding left out"):
        merged(trained, tmp_path / "m")


def test_another_choice_that_is_no_tie():
    p = np.array([[0.4, 0.3, 0.2, 0.1], [0.4, 0.3, 0.29, 0.01]], np.float32)
    right, second = np.array([[0, 1], [1, 0]], np.int32), np.array([[1, 0], [0, 2]], np.int32)
    changed, apart = verification._changed_places(verification.Routing(p, p, right), verification.Routing(p, p, second), LIMIT, 0)
    assert changed.tolist() == [False, True] and apart == pytest.approx(0.01, rel=1e-5)
    with pytest.raises(verification.Different, match=r"layer 3 token 0 goes to experts \[0, 3\] instead of \[0, 1\], .*0\.3 and 0\.2"):
        verification._changed_places(verification.Routing(p, p, right), verification.Routing(p, p, np.array([[0, 3], [0, 1]])), LIMIT, 3)


def test_an_adapter_that_lost_an_expert_is_named(trained, tmp_path):
    """Where no token of the prompt may visit that expert."""
    model, checkpoint = trained
    other = build(model.config, **checkpoint.arguments)
    peft.load_adapter(other, checkpoint.adapters[0])
    b = other.layers.moe.w2.lora.b
    b.set_value(b.get_value().at[1, 3].set(0.0))
    peft.save_adapter(other, tmp_path / "lost", "base")
    with pytest.raises(verification.Different, match=r"^model\.layers\.1\.block_sparse_moe\.experts\.3\.w2\.weight differs"):
        verification.compare([checkpoint._replace(adapters=(*checkpoint.adapters, tmp_path / "lost"))], TOKENS, 1e-5)

"""Families of attention and experts in fp32 against transformers 5.24 (tests/oracles/families.py)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles.drawn import weight
from safetensors.numpy import load_file, save_file
from support import (
    VECTORS,
    assert_close_to_largest,
    assert_trains_as_fused,
    decoder,
    full_logits,
    hub_tensor,
    loss_and_gradients,
)

from moejax.data.batch import Batch
from moejax.errors import UserError
from moejax.hub import peft
from moejax.hub.names import stacked, tensors
from moejax.hub.save import save_weights, stored_shapes
from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build, materialize_lora
from moejax.models.cache import init_cache
from moejax.models.config import PRESETS, LoRAConfig, Quantization
from moejax.models.families.qwen3_moe import Qwen3MoeConfig
from moejax.models.ops.quantized import QuantizedTensor, quantize

CASES = (
    "qwen3_moe", "qwen3_moe_dense", "qwen3_moe_raw_tied", "qwen3_moe_yarn", "olmoe", "olmoe_summed", "flex_olmo", "flex_olmo_dense",
    "gpt_oss", "gpt_oss_dense", "gpt_oss_layers", "deepseek_v3", "deepseek_v3_dense", "deepseek_v3_halves", "glm4_moe_lite",
    "glm4_moe_lite_halves", "deepseek_v2",
)  # fmt: skip
SLOW = ("flex_olmo_dense", "gpt_oss_dense", "deepseek_v3_dense", "glm4_moe_lite_halves")  # qwen3_moe_dense and deepseek_v3_halves are quick
LATENT = ("deepseek_v3", "glm4_moe_lite", "deepseek_v2")
EACH = ("qwen3_moe", "olmoe", "flex_olmo", "gpt_oss", *LATENT)
SMALL = (
    ("qwen3-moe-tiny", 24), ("olmoe-tiny",), ("flex-olmo-tiny",), ("gpt-oss-tiny",), ("deepseek-v3-tiny",), ("glm4-moe-lite-tiny",),
    ("deepseek-v2-tiny",),
)  # heads that are not D/H wide; D/H  # fmt: skip


@pytest.fixture(scope="module")
def vectors():
    files = (np.load(VECTORS / f"{name}.npz") for name in ("families", "gpt_oss", "latent"))
    return {name: value for file in files for name, value in file.items()}


class Made(dict):
    """case -> what `make(case)` gives when it is first asked for."""

    def __init__(self, make):
        super().__init__()
        self.make = make

    def __missing__(self, case):
        self[case] = self.make(case)
        return self[case]


@pytest.fixture(scope="module")
def folders(vectors, tmp_path_factory):
    """case -> the reference's weights in the Hub's layout, with the config.json that transformers 5 wrote."""

    def make(case):
        folder = tmp_path_factory.mktemp(case)
        (folder / "config.json").write_text(str(vectors[f"{case}/config"]))
        shapes = stored_shapes(build(read_config(folder)))
        save_file({name: weight(name, shape) for name, shape in shapes.items()}, str(folder / "model.safetensors"))
        return folder

    return Made(make)


@pytest.fixture(scope="module")
def models(folders):
    def make(case):
        return load_weights(build(read_config(folders[case]), dtype=jnp.float32), folders[case], jax.random.key(0))

    return Made(make)


@pytest.fixture(scope="module")
def batch(vectors):
    ids, mask, labels = (vectors[k] for k in ("ids", "mask", "labels"))
    targets, loss_mask = np.zeros_like(ids), np.zeros(ids.shape, np.float32)
    targets[:, :-1], loss_mask[:, :-1] = ids[:, 1:], labels[:, 1:] != -100
    arrays = (ids, targets, loss_mask, mask, np.arange(ids.shape[1])[None] * mask)
    return Batch(*(jnp.asarray(a, jnp.float32 if a is loss_mask else jnp.int32) for a in arrays))


@pytest.mark.parametrize("case", [pytest.param(c, marks=pytest.mark.long) if c in SLOW else c for c in CASES])
def test_logits_loss_gradients_and_counts(case, models, batch, vectors):
    model = models[case]
    real = np.asarray(batch.segment_ids) > 0
    logits = full_logits(model, batch.tokens, batch.segment_ids, batch.positions)
    np.testing.assert_allclose(logits[real], vectors[f"{case}/logits"][real], rtol=0, atol=2e-5)
    loss, stats, gradients = loss_and_gradients(model, batch, remat="full")
    np.testing.assert_allclose(loss, vectors[f"{case}/loss"], rtol=1e-6)
    np.testing.assert_array_equal(stats.counts, vectors[f"{case}/counts"])
    parts = {part.name: (name, part) for name, several in stacked(model.config).items() for part in several}
    for name, (place,) in tensors(model.config).items():
        if (*place.path, place.attr) in model.config.buffers:
            continue
        expected = vectors.get(f"{case}/grad/{name}")
        if expected is None:  # files have the tensor of all experts, on its side
            whole, part = parts[name]
            of_expert = vectors[f"{case}/grad/{whole}"][part.expert]
            expected = of_expert[..., part.rows(of_expert.shape[-1])].T
        assert_close_to_largest(hub_tensor(gradients, place), expected, 2e-5, name)


@pytest.mark.parametrize("case", EACH)
def test_cache_and_packed_rows_equal_the_full_pass(case, models, batch):
    model, tokens = models[case], batch.tokens[:2]
    alone = full_logits(model, tokens, batch.segment_ids[:2], batch.positions[:2])
    packed, segments, positions = (jnp.concatenate([*a])[None] for a in (tokens, jnp.array([[1] * 13, [2] * 13]), [jnp.arange(13)] * 2))
    both = full_logits(model, packed, segments, positions)[0]
    np.testing.assert_allclose(both[:13], alone[0], atol=1e-5)
    np.testing.assert_allclose(both[13:22], alone[1, :9], atol=1e-5)
    begin, go_on = decoder(model)
    logits, cache = begin(tokens[:, :4], jnp.array([4, 4]), init_cache(model, 2, 16))
    for i in range(4, 9):
        np.testing.assert_allclose(logits, alone[:, i - 1], atol=1e-5)
        logits, cache = go_on(tokens[:, i], cache)


@pytest.mark.parametrize("case", [*LATENT, pytest.param("deepseek_v3_halves", marks=pytest.mark.long)])
def test_generated_token_for_token(case, models, batch, vectors):
    """As `generate` of transformers 5 with its own cache; both prompts in one batch here."""
    begin, go_on = decoder(models[case])
    logits, cache = begin(batch.tokens[:2, :7], jnp.array([7, 3]), init_cache(models[case], 2, 16))
    said = []
    for _ in vectors[f"{case}/generated/0"]:
        said.append(jnp.argmax(logits, axis=-1).astype(jnp.int32))
        logits, cache = go_on(said[-1], cache)
    np.testing.assert_array_equal(np.stack(said, axis=1), np.stack([vectors[f"{case}/generated/{row}"] for row in (0, 1)]))


@pytest.mark.parametrize(
    ("preset", "total"),
    [("qwen3-30b-a3b", 30_532_122_624), ("qwen3-235b-a22b", 235_093_634_560), ("olmoe-1b-7b", 6_919_161_856),
     ("flex-olmo-7x7b", 33_270_665_216), ("flex-olmo-2x7b", 11_627_401_216), ("gpt-oss-20b", 20_914_757_184),
     ("gpt-oss-120b", 116_829_156_672), ("deepseek-v2-lite", 15_706_484_224), ("moonlight-16b-a3b", 15_960_108_544),
     ("glm-4.7-flash", 29_943_390_976)],
)  # fmt: skip
def test_counts_to_the_digit(preset, total):
    assert sum(v.get_value().size for _, v in nnx.to_flat_state(nnx.state(build(PRESETS[preset]), nnx.Param))) == total
    assert PRESETS[preset].parameters[0] == total


class InTwo(Qwen3MoeConfig):
    """The same model in two stacks, as one with a first layer of another kind would have."""

    @property
    def stacks(self):
        (stack,) = super().stacks
        return (dataclasses.replace(stack, repeats=1, name="first"), dataclasses.replace(stack, repeats=self.num_layers - 1))

    @property
    def names(self):
        names = super().names
        return dataclasses.replace(names, blocks=names.blocks * 2)


def test_several_stacks_are_one_model(models, folders, batch, vectors, tmp_path):
    """Weights read into two stacks: loss, counts, decoding and adapters as of one."""
    whole = models["qwen3_moe"]
    fields = {name: getattr(whole.config, name) for name in whole.config.fields()}
    model = load_weights(build(InTwo(**fields), dtype=jnp.float32), folders["qwen3_moe"], jax.random.key(0))
    loss, stats, _ = loss_and_gradients(model, batch, remat="full")
    np.testing.assert_allclose(loss, vectors["qwen3_moe/loss"], rtol=1e-6)
    np.testing.assert_array_equal(stats.counts, vectors["qwen3_moe/counts"])
    begin, go_on = decoder(model)
    _, cache = begin(batch.tokens[:, :4], jnp.array([4, 4, 4]), init_cache(model, 3, 8))
    np.testing.assert_allclose(go_on(batch.tokens[:, 4], cache)[0], vectors["qwen3_moe/logits"][:, 4], atol=2e-5)
    adapter = LoRAConfig({"experts": 2, "attention": 4}, 4.0)
    adapted = [filled(build(config, adapter=adapter)) for config in (model.config, whole.config)]
    peft.save_adapter(adapted[0], tmp_path, "org/base", fused=True)
    peft.load_adapter(adapted[1], tmp_path)
    first, rest, both = (m.w2.lora.a.get_value() for m in (adapted[0].first.moe, adapted[0].layers.moe, adapted[1].layers.moe))
    np.testing.assert_array_equal(np.concatenate([first, rest]), both)


class TestAdaptersAndStorage:
    """Small sizes, drawn here: 2 layers of 4 experts, and a dense one where the family has such."""

    def config(self, preset, head_dim=16):
        latent = dict(num_layers=3, num_kv_heads=2, dense_size=21) if hasattr(PRESETS[preset], "dense_size") else {}
        sizes = dict(
            vocab_size=32, hidden_size=32, intermediate_size=16, num_layers=2, num_heads=2, num_kv_heads=1, num_experts=4,
            experts_per_token=2, head_dim=head_dim,
        )  # fmt: skip
        return PRESETS[preset].replace(**(sizes | latent))

    def test_defaults(self):
        """Attention and experts are adapted and quantized; the router is neither."""
        model = build(self.config("qwen3-moe-tiny"), quantization=Quantization(), adapter=LoRAConfig(rank=2))
        names = {path[-3] for path, _ in nnx.to_flat_state(nnx.state(model, nnx.LoRAParam))}
        assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"}
        quantized = {path[-2] for path, v in nnx.to_flat_state(nnx.state(model)) if isinstance(v.get_value(), QuantizedTensor)}
        assert quantized == names and model.layers.moe.router.weight.get_value().dtype == jnp.bfloat16

    @pytest.mark.parametrize(
        ("targets", "expected"),
        [(("gate_proj", "up_proj"), ("w1", "w3")), (("w1", "gate_proj"), "w1 and gate_proj are the same"),
         (("gate", "up_proj", "down_proj"), "gate is the router"),
         (("c_attn",), r"'c_attn' does not exist in a Qwen3-MoE: .* gate, gate_proj \(w1\), down_proj \(w2\), up_proj \(w3\)$")],
    )  # fmt: skip
    def test_targets_by_either_name(self, targets, expected):
        config = self.config("qwen3-moe-tiny")
        if isinstance(expected, tuple):
            assert config.resolve_targets(targets) == expected
        else:
            with pytest.raises(ValueError, match=expected):
                build(config, adapter=LoRAConfig(2, 4.0, 0.0, targets))

    @pytest.mark.parametrize("case", SMALL[:3])
    def test_files_of_both_layouts(self, case, tmp_path):
        """One tensor an expert, or one over all of them: read to the bit, and to the same codes, from the cache too."""
        config = self.config(*case)
        model = build(config, key=jax.random.key(1), dtype=jnp.float32)
        one, whole = tmp_path / "one", tmp_path / "whole"
        save_weights(model, one, jnp.float32)
        assert read_config(one) == config
        held = load_file(str(one / "model.safetensors"))
        assert held.keys() == tensors(config).keys()
        for name, parts in stacked(config).items():
            experts = [np.concatenate([held.pop(p.name) for p in parts if p.expert == e]) for e in range(config.num_experts)]
            held[name] = np.stack(experts)
        whole.mkdir()
        (whole / "config.json").write_bytes((one / "config.json").read_bytes())
        save_file(held, str(whole / "model.safetensors"))
        arguments = dict(quantization=Quantization(), dtype=jnp.float32)
        expected = load_weights(build(config, **arguments), one, jax.random.key(0))
        for cache in (None, tmp_path / "cache", tmp_path / "cache"):
            again = load_weights(build(config, **arguments), whole, jax.random.key(0), cache=cache)
            jax.tree.map(np.testing.assert_array_equal, nnx.state(again), nnx.state(expected))
        w1 = expected.layers.moe.w1.weight.get_value()
        by_itself = quantize("nf4-double", model.layers.moe.w1.weight.get_value()[1, 2])
        np.testing.assert_array_equal(w1.codes[1, 2], by_itself.codes)

    @pytest.mark.parametrize("fused", [False, True])
    @pytest.mark.parametrize("case", SMALL)
    def test_adapters_round_trip(self, case, fused, tmp_path):
        config = self.config(*case)
        names = {t: n for t, n in config.target_names.items() if not fused or "." not in n}
        arguments = dict(adapter=LoRAConfig(2, 4.0, 0.0, tuple(names)), dtype=jnp.float32)
        model = filled(build(config, **arguments))
        peft.save_adapter(model, tmp_path, "org/base", fused=fused)
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        on_parameters = {"down_proj", names["gate"], "gate_proj", "up_proj"} if fused or case == ("gpt-oss-tiny",) else set()
        assert settings["target_modules"] == sorted(set(names.values()) - on_parameters) and "exclude_modules" not in settings
        again = build(config, **arguments)
        peft.load_adapter(again, tmp_path)
        for ours, theirs in zip(adapters(again), adapters(model), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    @pytest.mark.parametrize("fused", [False, True])
    def test_a_rank_for_each_group(self, fused, tmp_path):
        """PEFT's patterns, out and in; the experts' are r and lora_alpha."""
        config = self.config("qwen3-moe-tiny")
        ranks, alphas = {"experts": 2, "attention": 4, "gate": 1}, {"experts": 2.0, "attention": 8.0, "router": 3.0}
        arguments = dict(adapter=LoRAConfig(ranks, alphas, 0.0, tuple(config.targets)), dtype=jnp.float32)
        model = filled(build(config, **arguments))
        assert model.layers.moe.w1.lora.scale == 1.0 and model.layers.attention.q_proj.lora.a.get_value().shape[-2] == 4
        peft.save_adapter(model, tmp_path, "org/base", fused=fused)
        settings = json.loads((tmp_path / "adapter_config.json").read_text())
        others = {"gate_up_proj": 4, "gate.weight": 1} if fused else {r"gate(\.weight)?": 1}
        assert (settings["r"], settings["lora_alpha"]) == (2, 2.0)
        assert settings["rank_pattern"] == dict.fromkeys(("q_proj", "k_proj", "v_proj", "o_proj"), 4) | others
        again = materialize_lora(build(config, **arguments), jax.random.key(0))
        peft.load_adapter(again, tmp_path)
        for ours, theirs in zip(adapters(again), adapters(model), strict=True):
            np.testing.assert_array_equal(ours, theirs)
        with pytest.raises(UserError, match=r"has rank .*set adapter\.rank and adapter\.alpha|expected rank 4, alpha 8"):
            peft.load_adapter(build(config, adapter=LoRAConfig(4, 8.0, 0.0, tuple(config.targets))), tmp_path)

    @pytest.mark.parametrize(
        ("rank", "message"),
        [({"experts": 4}, "rank has none for q_proj: add q_proj, or its group attention"),
         ({"experts": 4, "attention": 8, "mlp": 2}, "rank of 'mlp': nothing of that name is adapted, expected some of attention"),
         ({"experts": 0, "attention": 8}, "rank of experts = 0: expected at least 1"),
         ({"experts": 2, "attention": 8, "w1": 4, "gate_proj": 8}, "gate_proj has no target that w1 does not say: leave one"),
         ({"experts": 2, "attention": 8, "w1": 4, "w2": 4, "w3": 4}, "rank of experts has no target that w1, w2, w3 does not say")],
    )  # fmt: skip
    def test_ranks_that_match_nothing(self, rank, message):
        with pytest.raises(ValueError, match=message):
            build(self.config("qwen3-moe-tiny"), adapter=LoRAConfig(rank))

    @pytest.mark.parametrize(
        ("changes", "message"),
        [({"share": ("gate_proj", "down_proj")}, r"share \[gate_proj, down_proj\]: expected \[gate_proj, up_proj\], the two matrices"),
         ({"share": ("q_proj", "k_proj", "v_proj")}, r"share \[q_proj, k_proj, v_proj\]: expected \[gate_proj, up_proj\]"),
         ({"share": ("w1",)}, r"share \[w1\]: expected"), ({"share": ("w1", "w1")}, r"share \[w1, w1\]: expected"),
         ({"share": ()}, r"share \[\]: expected"), ({"share": ("w1", "w4")}, "share 'w4' does not exist in a Qwen3-MoE"),
         ({"share": ("w1", "w3"), "targets": ("w1", "w2")}, "share has up_proj, which is not adapted"),
         ({"share": ("w1", "w3"), "rank": {"experts": 2, "attention": 2, "w3": 4}}, r"gate_proj \(rank 2, alpha 32\) for up_proj \(rank 4"),
         ({"share": ("w1", "w3"), "alpha": {"experts": 2, "attention": 2, "up_proj": 4}}, r"alpha 2\) for up_proj \(rank 16, alpha 4\)")],
    )  # fmt: skip
    def test_an_a_that_cannot_be_shared(self, changes, message):
        with pytest.raises(ValueError, match=message):
            build(self.config("qwen3-moe-tiny"), adapter=LoRAConfig(**changes))

    def test_an_adapter_of_another_family_is_refused(self, tmp_path):
        mixtral = self.config("mixtral-tiny")
        peft.save_adapter(filled(build(mixtral, adapter=LoRAConfig(2))), tmp_path, "org/base")
        with pytest.raises(UserError, match=r"adapts w1, w2, w3, which a Qwen3-MoE does not have: an adapter of another family\?"):
            peft.load_adapter(build(self.config("qwen3-moe-tiny"), adapter=LoRAConfig(2)), tmp_path)


def adapters(model):
    return jax.tree.leaves(nnx.state(model, nnx.LoRAParam))


def filled(model):
    """Numbers that matter in every pair."""
    state = nnx.state(model, nnx.LoRAParam)
    leaves, tree = jax.tree.flatten(state)
    rng = np.random.default_rng(3)
    nnx.update(model, jax.tree.unflatten(tree, [jnp.asarray(0.1 * rng.normal(size=leaf.shape), jnp.float32) for leaf in leaves]))
    return model


def write_pefts_own(case, vectors, folder):
    (folder / "adapter_config.json").write_text(str(vectors[f"{case}/peft/adapter_config"]))
    (folder / "adapter_model.safetensors").write_bytes(vectors[f"{case}/peft/adapter_model"].tobytes())


LIKE_ANOTHER = ("flex_olmo", "glm4_moe_lite", "deepseek_v2")  # in their names: like olmoe and deepseek_v3


@pytest.mark.parametrize("case", [pytest.param(case, marks=pytest.mark.long) if case in LIKE_ANOTHER else case for case in EACH])
def test_an_adapter_of_pefts_own(case, folders, batch, vectors, tmp_path):
    """PEFT 0.21's pair over all experts, read here: the logits that PEFT computes."""
    write_pefts_own(case, vectors, tmp_path)
    model = build(read_config(folders[case]), dtype=jnp.float32, adapter=LoRAConfig(2, 4.0))
    model = load_weights(model, folders[case], jax.random.key(0))
    peft.load_adapter(model, tmp_path)
    logits, real = full_logits(model, batch.tokens, batch.segment_ids, batch.positions), np.asarray(batch.segment_ids) > 0
    np.testing.assert_allclose(logits[real], vectors[f"{case}/peft/logits"][real], rtol=0, atol=2e-5)


ONE_A = ("qwen3_moe", "qwen3_moe_dense", "olmoe", "flex_olmo", "gpt_oss", "gpt_oss_dense", *LATENT)
QUICK = ("qwen3_moe", "gpt_oss")


@pytest.mark.parametrize("case", [case if case in QUICK else pytest.param(case, marks=pytest.mark.long) for case in ONE_A])
def test_one_a_for_both_is_trained_as_by_peft(case, folders, batch, vectors, tmp_path):
    """PEFT 0.21's adapter over fused experts, with share: its logits, loss, and every gradient in its layout."""
    write_pefts_own(case.removesuffix("_dense"), vectors, tmp_path)
    adapter = LoRAConfig(2, 4.0, share=("gate_proj", "up_proj"))
    model = load_weights(build(read_config(folders[case]), dtype=jnp.float32, adapter=adapter), folders[case], jax.random.key(0))
    peft.load_adapter(model, tmp_path)
    assert_trains_as_fused(model, batch, case, tmp_path / "gradients")

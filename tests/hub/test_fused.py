"""The fused adapter format: what PEFT 0.21 wrote is read, what is written is read back to the bit, and misfits are refused."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import VECTORS, finished_run, full_logits

from moejax import cli
from moejax.errors import UserError
from moejax.hub import peft, weights
from moejax.models.build import build
from moejax.models.config import LORA_TARGETS, LoRAConfig

MLP = "base_model.model.model.layers.0.mlp."
UP_A, UP_B = (f"{MLP}experts.base_layer.lora_{letter}.weight" for letter in "AB")
DOWN_A = f"{MLP}experts.lora_A.weight"


@pytest.fixture
def folder(tmp_path):
    """What PEFT 0.21 wrote, to be changed."""
    shutil.copytree(VECTORS / "peft_fused", tmp_path / "adapter")
    return tmp_path / "adapter"


def make_model(config, targets=LORA_TARGETS, rank=4, filled=False, share=None):
    alpha = {target: 2.0 * r for target, r in rank.items()} if isinstance(rank, dict) else 2.0 * rank
    adapter = LoRAConfig(rank=rank, alpha=alpha, targets=targets, share=share)
    model = build(config, adapter=adapter, dtype=jnp.float32, key=jax.random.key(0))
    for index, lora in enumerate({id(lora): lora for _, lora in peft.adapted(model).values()}.values()):
        if filled:
            lora.b.set_value(0.3 * jax.random.normal(jax.random.key(index), lora.b.get_value().shape))
    return model


def pairs(model):
    return {
        (name, letter): np.asarray(value.get_value())
        for name, (place, lora) in peft.adapted(model).items()
        for letter, value in peft.variables(model, place, lora).items()
    }


def files(folder):
    return load_file(str(folder / "adapter_model.safetensors"))


def test_what_peft_wrote_gives_its_logits(mixtral_folder, mixtral_vectors, reference_config):
    model = weights.load_weights(make_model(reference_config), mixtral_folder, jax.random.key(0))
    ids, mask = mixtral_vectors["ids"].astype(np.int32), mixtral_vectors["mask"].astype(np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape) * mask
    base = full_logits(model, ids, mask, positions)  # B is zero
    peft.continue_from(model, VECTORS / "peft_fused", "org/base")
    with np.load(VECTORS / "peft_fused" / "logits.npz") as file:
        expected = file["logits"]
    real = mask.astype(bool)
    np.testing.assert_allclose(full_logits(model, ids, mask, positions)[real], expected[real], atol=2e-5, rtol=0)
    assert np.abs(expected - base)[real].max() > 0.1


@pytest.mark.parametrize("share", [None, ("w1", "w3")])
def test_pefts_adapter_goes_in_and_comes_out_to_the_bit(share, folder, reference_config, tmp_path):
    """Its gate_up_proj has one A for w1 and w3, so the rank stays."""
    model = make_model(reference_config, share=share)
    peft.load_adapter(model, folder)
    peft.save_adapter(model, tmp_path / "out", "base", fused=True)
    theirs, ours = files(folder), files(tmp_path / "out")
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in theirs)
    settings = [json.loads((f / "adapter_config.json").read_text()) for f in (folder, tmp_path / "out")]
    for name in ("r", "lora_alpha", "target_modules", "rank_pattern", "alpha_pattern"):
        assert settings[0][name] == settings[1][name]
    assert set(settings[0]["target_parameters"]) == set(settings[1]["target_parameters"])


@pytest.mark.parametrize(
    "targets",
    [LORA_TARGETS, ("w1", "w2", "w3"), ("w1", "w3"), ("w2",), ("gate",), ("q_proj", "w2", "gate")],
)
def test_a_round_trip_is_exact_to_the_bit(targets, reference_config, tmp_path):
    model = make_model(reference_config, targets, filled=True)
    peft.save_adapter(model, tmp_path / "out", "base", fused=True)
    again = make_model(reference_config, targets)
    peft.continue_from(again, tmp_path / "out", "base")
    before, after = pairs(model), pairs(again)
    assert before.keys() == after.keys() and all(np.array_equal(before[name], after[name]) for name in before)


def test_one_a_goes_out_and_in_to_the_bit(reference_config, tmp_path):
    """Per expert it is written for w1 and for w3; fused, gate_up_proj has the rank of the others. Read by a model that has two, they are
    equal."""
    model = make_model(reference_config, filled=True, share=("w1", "w3"))
    first, again = pairs(model), f"{MLP.replace('mlp', 'block_sparse_moe')}experts.0."
    for fused in (False, True):
        peft.save_adapter(model, tmp_path / str(fused), "base", fused=fused)
        for share in (("w1", "w3"), None):
            other = make_model(reference_config, share=share)
            peft.continue_from(other, tmp_path / str(fused), "base")
            after = pairs(other)
            assert first.keys() == after.keys() and all(np.array_equal(first[name], after[name]) for name in first)
    assert files(tmp_path / "True")[UP_A].shape == (4 * reference_config.num_experts, reference_config.hidden_size)
    assert not json.loads((tmp_path / "True" / "adapter_config.json").read_text())["rank_pattern"]
    written = files(tmp_path / "False")
    np.testing.assert_array_equal(written[f"{again}w1.lora_A.weight"], written[f"{again}w3.lora_A.weight"])


@pytest.mark.parametrize("fused", [False, True])
def test_two_as_are_not_one(fused, reference_config, tmp_path):
    """One of twice the rank holds both: that is read as it is, and computes the same."""
    apart = make_model(reference_config, ("w1", "w3"), filled=True)
    peft.save_adapter(apart, tmp_path, "base", fused=fused)
    told = r"w1 has rank 8, alpha 16; .*rank 4, alpha 8: set adapter\.rank" if fused else r"the A of .*w3 is another than .*w1.*leave"
    with pytest.raises(UserError, match=told):
        peft.continue_from(make_model(reference_config, ("w1", "w3"), share=("w1", "w3")), tmp_path, "base")
    if fused:
        wide = make_model(reference_config, ("w1", "w3"), rank=8, share=("w1", "w3"))
        peft.continue_from(wide, tmp_path, "base")
        one, two = pairs(apart), pairs(wide)
        for name in {name for name, _ in one}:
            np.testing.assert_allclose(two[name, "B"] @ two[name, "A"], one[name, "B"] @ one[name, "A"], atol=1e-6)


def test_the_layout_is_pefts(reference_config, tmp_path):
    """Delta of expert e by PEFT's reshapes is alpha/rank · B A of w1 above that of w3: gate_up_proj's rows."""
    model = make_model(reference_config, filled=True)
    peft.save_adapter(model, tmp_path / "out", "base", fused=True)
    tensors, ours, experts = files(tmp_path / "out"), pairs(model), reference_config.num_experts
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert settings["rank_pattern"] == {"gate_up_proj": 8} and settings["alpha_pattern"] == {"gate_up_proj": 16}
    a, b = tensors[UP_A], tensors[UP_B]
    delta = np.einsum("ore,eri->eoi", b.reshape(b.shape[0], -1, experts), a.reshape(experts, -1, a.shape[1]))
    for e in range(experts):
        name = f"model.layers.0.block_sparse_moe.experts.{e}."
        expected = [ours[f"{name}{w}", "B"][0, e] @ ours[f"{name}{w}", "A"][0, e] for w in ("w1", "w3")]
        np.testing.assert_allclose(delta[e], np.concatenate(expected), atol=1e-6)


def test_one_of_w1_and_w3_cannot_be_fused(reference_config, tmp_path):
    with pytest.raises(UserError, match=r"adapts w1 and w3 together.*use --format peft"):
        peft.save_adapter(make_model(reference_config, ("w1", "w2")), tmp_path / "out", "base", fused=True)
    assert not (tmp_path / "out").exists()


def widened(tensors):
    """Rank 8 for gate_up_proj, w1's rows using all of it."""
    for name in [n for n in tensors if ".base_layer." in n]:
        axis = 0 if ".lora_A." in name else 1
        tensors[name] = np.concatenate([tensors[name]] * 2, axis=axis)


TWICE = {"rank_pattern": {"gate_up_proj": 8}, "alpha_pattern": {"gate_up_proj": 16}}


@pytest.mark.parametrize(
    ("change", "edit", "message"),
    [
        ({}, lambda t: t.pop(UP_A), r"base_layer\.lora_A\.weight' is missing"),
        ({}, lambda t: t.pop(UP_B), r"base_layer\.lora_B\.weight' is missing"),
        (
            {},
            lambda t: t.update({UP_A: t[UP_A][:, 1:].copy()}),
            r"has shape \[32, 63\], expected \[32, 64\]: another base model or rank",
        ),
        ({}, lambda t: t.update({UP_A: t[UP_A][:16].copy()}), r"has shape \[16, 64\], expected \[32, 64\]"),
        ({}, lambda t: t[DOWN_A].fill(np.nan), r"experts\.lora_A\.weight' holds numbers that are not finite"),
        (
            {},
            lambda t: t.update({UP_A.replace("layers.0", "layers.9"): t[UP_A], UP_B.replace("layers.0", "layers.9"): t[UP_B]}),
            r"no place",
        ),
        (TWICE, widened, r"of rank 8 mixes w1 and w3.*Rank 8 and alpha 16 of w1 and w3 .*read it as it is"),
        (
            {"rank_pattern": {"gate_up_proj": 8}},
            None,
            r"gate_up_proj has rank 8, alpha 8 by rank_pattern.*expected rank 4, alpha 8",
        ),
        ({"rank_pattern": {"down_proj": 8}}, None, r"down_proj has rank 8"),
        ({"rank_pattern": {"gate_up_proj": "8"}}, None, r"config\.json: rank_pattern has 'gate_up_proj': '8': expected a whole"),
        ({"rank_pattern": {"(": 8}}, None, r"no regular expression"),
        ({"target_parameters": ["lm_head.weight"]}, None, r"target_parameters has 'lm_head\.weight': expected some of"),
        ({"r": 5, "lora_alpha": 10}, None, r"expected \[40, 64\]: another base model or rank"),
        ({"target_parameters": None}, None, r"adapter_config\.json has no target_parameters"),
        ({"base_model_name_or_path": "other/Model"}, None, r"is an adapter of 'other/Model'"),
    ],
)
def test_what_does_not_fit(change, edit, message, folder, reference_config):
    path, tensors = folder / "adapter_config.json", files(folder)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    if edit:
        edit(tensors)
        save_file(tensors, str(folder / "adapter_model.safetensors"))
    with pytest.raises(UserError, match=message):
        peft.continue_from(make_model(reference_config), folder, "org/base")


def test_what_peft_trained_on_at_twice_the_rank_is_read_as_it_is(folder, reference_config):
    """w1 and w3 with one A of rank 2r and every number of B: the deltas by PEFT's reshapes; the other targets unchanged."""
    path, tensors, experts = folder / "adapter_config.json", files(folder), reference_config.num_experts
    path.write_text(json.dumps(json.loads(path.read_text()) | TWICE))
    narrow = make_model(reference_config)
    peft.load_adapter(narrow, VECTORS / "peft_fused")
    rng = np.random.default_rng(0)
    for name in [n for n in tensors if ".base_layer." in n]:
        shape = np.array(tensors[name].shape) * ([2, 1] if ".lora_A." in name else [1, 2])
        tensors[name] = rng.standard_normal(shape, np.float32)
    save_file(tensors, str(folder / "adapter_model.safetensors"))
    model = make_model(reference_config, rank=dict.fromkeys(LORA_TARGETS, 4) | {"w1": 8, "w3": 8})
    peft.continue_from(model, folder, "org/base")
    before, ours = pairs(narrow), pairs(model)
    a, b = tensors[UP_A], tensors[UP_B]
    delta = np.einsum("ore,eri->eoi", b.reshape(b.shape[0], -1, experts), a.reshape(experts, -1, a.shape[1]))
    for e in range(experts):
        name = f"model.layers.0.block_sparse_moe.experts.{e}."
        found = [ours[f"{name}{w}", "B"][0, e] @ ours[f"{name}{w}", "A"][0, e] for w in ("w1", "w3")]
        np.testing.assert_allclose(np.concatenate(found), delta[e], atol=1e-5)
    for (name, letter), value in before.items():
        if name.rpartition(".")[2] not in ("w1", "w3"):
            np.testing.assert_array_equal(ours[name, letter], value)


def test_another_rank_or_targets_than_the_models(folder, reference_config):
    with pytest.raises(UserError, match=r"rank 4, alpha 8; the model's adapter has rank 2.*set adapter\.rank"):
        peft.continue_from(make_model(reference_config, rank=2), folder, None)
    with pytest.raises(UserError, match=r"the model's adapter gate, w2: set adapter\.targets"):
        peft.continue_from(make_model(reference_config, ("gate", "w2")), folder, None)


def test_a_run_is_exported_fused(tmp_path, capsys):
    finished_run(tmp_path / "run")
    assert cli.main(["export", str(tmp_path / "run"), "--out", str(tmp_path / "a"), "--format", "fused"]) == 0
    assert "largest logit difference 0 " in capsys.readouterr().out
    assert json.loads((tmp_path / "a" / "adapter_config.json").read_text())["target_parameters"]

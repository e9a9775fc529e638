"""Adapters that were trained elsewhere: continued, or refused with what differs."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import VECTORS, save_torch

from moejax.errors import UserError
from moejax.hub import peft
from moejax.models.build import build
from moejax.models.config import LORA_TARGETS, LoRAConfig

FIRST = "base_model.model.model.layers.0.block_sparse_moe.gate.lora_A.weight"


@pytest.fixture
def folder(tmp_path):
    """What PEFT wrote, to be changed."""
    shutil.copytree(VECTORS / "peft_all", tmp_path / "adapter")
    return tmp_path / "adapter"


def model_like(folder, reference_config, **changes):
    settings = json.loads((folder / "adapter_config.json").read_text())
    arguments = dict(rank=settings["r"], alpha=settings["lora_alpha"], targets=LORA_TARGETS) | changes
    return build(reference_config, adapter=LoRAConfig(**arguments), dtype=jnp.float32)


def test_pefts_adapter_goes_in_and_comes_out_to_the_bit(folder, reference_config, tmp_path):
    model = model_like(folder, reference_config)
    peft.continue_from(model, folder, "org/base")
    peft.save_adapter(model, tmp_path / "out", "base")
    theirs, ours = (load_file(str(f / "adapter_model.safetensors")) for f in (folder, tmp_path / "out"))
    assert theirs.keys() == ours.keys() and all(np.array_equal(theirs[name], ours[name]) for name in theirs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_dora": True}, r"use_dora = true: only plain LoRA"),
        ({"use_rslora": True}, r"rank 4, alpha 16; the model's adapter has rank 4, alpha 8: set adapter\.rank and adapter\.alpha"),
        ({"use_rslora": "yes"}, r'use_rslora = "yes" \(expected false or true\)'),
        ({"rank_pattern": {"gate": True}}, r"adapter_config\.json: rank_pattern has 'gate': True: expected a whole number above 0"),
        ({"alpha_pattern": {"gate": float("inf")}}, r"inf: expected a number above 0"),
        ({"rank_pattern": {"gate": 2}}, r"gate has rank 2, alpha 8; the model's adapter has rank 4"),
        ({"alpha_pattern": {"w[13]": 2, "gates": 3}}, r"alpha_pattern has 'gates', which matches nothing that the adapter is on"),
        ({"modules_to_save": ["lm_head"]}, r"modules_to_save = \[\"lm_head\"\]"),
        ({"peft_type": "IA3"}, r"peft_type = \"IA3\" \(expected \"LORA\"\)"),
        ({"bias": "lora_only"}, r"bias = \"lora_only\" \(expected \"none\"\)"),
        ({"alora_invocation_tokens": [4]}, r"config\.json has alora_invocation_tokens = \[4\]: only plain LoRA over .* take it out"),
        ({"new_rank": 0}, r"new_rank = 0: only plain LoRA"),
        ({"arrow_config": {"top_k": 2}, "use_new": 1.5}, r"has arrow_config = \{\"top_k\": 2\}, use_new = 1\.5: only plain LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, r"init_lora_weights = \"pissa_niter_4\" .*only plain LoRA over the base's own weights"),
        ({"init_lora_weights": "lora_ga"}, r"init_lora_weights = \"lora_ga\""),
        ({"base_model_name_or_path": "/models/base", "r": 5}, r"set adapter\.rank"),
        ({"base_model_name_or_path": 5}, r"base_model_name_or_path = 5: expected a name"),
        ({"r": None}, r"r = null: expected a whole number above 0"),
        ({"r": "4"}, r"r = \"4\": expected a whole number above 0"),
        ({"lora_alpha": True}, r"lora_alpha = true: expected a number above 0"),
        ({"lora_alpha": 0}, r"lora_alpha = 0: expected a number above 0"),
        ({"target_parameters": "mlp.gate.weight"}, r"target_parameters = \"mlp\.gate\.weight\": expected a list of names"),
        ({"r": 5}, r"rank 5, alpha 8; the model's adapter has rank 4.*set adapter\.rank"),
        ({"base_model_name_or_path": "other/Model"}, r"is an adapter of 'other/Model', model\.source = 'org/base': another base"),
    ],
)
def test_settings_that_do_not_fit(change, message, folder, reference_config):
    model = model_like(folder, reference_config)
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"base_model_name_or_path": "org/base"} | change))
    with pytest.raises(UserError, match=message):
        peft.continue_from(model, folder, "org/base")


@pytest.mark.parametrize(
    "change",
    [
        {"init_lora_weights": "eva", "eva_config": {"rho": 2.0}, "target_modules": ".*(gate|w[123]|_proj)", "exclude_modules": "lm_head"},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1, "auto_mapping": {"parent_library": "x"}, "qalora_group_size": 32},
        {"use_new": False, "new_config": None, "new_pattern": {}, "new_tokens": [], "new_name": ""},
    ],
)
def test_settings_that_change_nothing(change, folder, reference_config):
    """Those of vectors/peft_all and vectors/peft_fused are all that PEFT 0.18.1 and 0.21.2 write by default: other tests read these."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    peft.continue_from(model_like(folder, reference_config), folder, "org/base")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop(FIRST), r"layers\.0\.block_sparse_moe\.gate\.lora_A\.weight' is missing"),
        (lambda t: t.update({FIRST: t[FIRST][:, 1:].copy()}), r"has shape \[4, 63\], expected \[4, 64\]: another base model"),
        (lambda t: t[FIRST].fill(np.nan), r"gate\.lora_A\.weight' holds numbers that are not finite"),
        (lambda t: t.update({FIRST.replace("gate", "norm"): t[FIRST].copy()}), r"adapts norm, which a Mixtral does not have"),
        (lambda t: t.update({FIRST.replace("0", "9"): t[FIRST].copy()}), r"1 tensors have no place"),
        (lambda t: t.update({FIRST.replace("block_sparse_moe.gate", "mlp.experts"): t[FIRST].copy()}), r"format of transformers 5"),
    ],
)
def test_tensors_that_do_not_fit(edit, message, folder, reference_config):
    path = str(folder / "adapter_model.safetensors")
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path)
    with pytest.raises(UserError, match=message):
        peft.continue_from(model_like(folder, reference_config), folder, None)


def test_files_that_cannot_be_read(folder, reference_config):
    model = model_like(folder, reference_config)
    whole = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").write_bytes(whole[:-7])
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read"):
        peft.continue_from(model, folder, None)
    (folder / "adapter_model.safetensors").unlink()
    (folder / "adapter_model.safetensors").mkdir()
    with pytest.raises(UserError, match=r"adapter_model\.safetensors cannot be read \(Is a directory\)"):
        peft.continue_from(model, folder, None)
    for content, message in (
        ("{", "adapter_config.json, line 1: no whole JSON"),
        ("[]", "expected a JSON object, got list"),
        ("", "adapter_config.json is empty"),
    ):
        (folder / "adapter_config.json").write_text(content)
        with pytest.raises(UserError, match=message):
            peft.continue_from(model, folder, None)


def test_the_bin_that_older_peft_wrote(folder, reference_config):
    path = folder / "adapter_model.safetensors"
    save_torch(folder / "adapter_model.bin", load_file(str(path)))
    path.unlink()
    model, expected = (model_like(folder, reference_config) for _ in range(2))
    peft.load_adapter(model, folder)
    peft.load_adapter(expected, VECTORS / "peft_all")
    for (_, ours), (_, theirs) in zip(peft.adapted(model).values(), peft.adapted(expected).values(), strict=True):
        np.testing.assert_array_equal(ours.b.get_value(), theirs.b.get_value())


def test_half_precision_is_widened_exactly(folder, reference_config):
    path = str(folder / "adapter_model.safetensors")
    halves = {name: value.astype(jnp.bfloat16) for name, value in load_file(path).items()}
    save_file(halves, path)
    model = model_like(folder, reference_config)
    peft.continue_from(model, folder, None)
    a = model.layers.moe.router.lora.a.get_value()
    assert a.dtype == jnp.float32
    np.testing.assert_array_equal(a[0], jax.device_get(halves[FIRST]).astype(np.float32))


def test_a_base_of_the_same_name_with_other_weights_is_refused(folder, reference_config, tmp_path):
    model = model_like(folder, reference_config)
    first, other = ({peft.BASE: digit * 64, peft.STORED: "cpu 1"} for digit in "ab")
    peft.continue_from(model, folder, "org/base", other)  # of another tool, which says nothing of its base
    peft.save_adapter(model, tmp_path / "out", "org/base", base=first)
    peft.continue_from(model, tmp_path / "out", "base", first)
    peft.continue_from(model, tmp_path / "out", "base", other | {peft.STORED: "gpu 1"})  # whose hashes cannot be compared
    with pytest.raises(UserError, match=r"out was trained on org/base with other weights \(sha256 a{16}…\) than .* 'base' has \(b{16}…"):
        peft.continue_from(model, tmp_path / "out", "base", other)

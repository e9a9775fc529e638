"""Rows of added tokens: against PEFT's `trainable_token_indices` (tests/oracles/token_rows.py), in and out, and in merged models."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
from oracles.drawn import weight
from safetensors.numpy import load_file, save_file
from support import assert_close_to_largest, full_logits, loss_and_gradients, read_vectors

from moejax import hub
from moejax.config import Experiment
from moejax.data.batch import Batch
from moejax.errors import UserError
from moejax.hub import merge, peft
from moejax.hub.names import tensors
from moejax.hub.streaming import whole_shape
from moejax.hub.weights import read_config
from moejax.models.build import build
from moejax.models.config import from_hub_config

QUICK = (("token_rows", "enlarged"), ("token_rows_5", "tied"))
CASES = [
    pytest.param(file, case, marks=[] if (file, case) in QUICK else pytest.mark.long)
    for file in ("token_rows", "token_rows_5") for case in ("enlarged", "tied", "tied, enlarged", "embedding alone")
]  # fmt: skip


def of_case(file, case):
    return {name.removeprefix(f"{case}/"): value for name, value in read_vectors(file).items() if name.startswith(f"{case}/")}


def folders(known, folder):
    """The base as the oracle wrote it, and PEFT's adapter."""
    base, adapter = folder / "base", folder / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "config.json").write_text(str(known["config"]))
    model = build(from_hub_config(json.loads(str(known["config"]))))
    drawn = {name: weight(name, whole_shape(model, places)) for name, places in tensors(model.config).items()}
    save_file(drawn, base / "model.safetensors", metadata={"format": "pt"})
    (adapter / "adapter_config.json").write_text(str(known["adapter_config"]))
    (adapter / "adapter_model.safetensors").write_bytes(known["adapter_model"].tobytes())
    return base, adapter


def experiment_of(base, **adapter):
    content = {
        "name": "x", "model": {"source": str(base)},
        "adapter": {"rank": 2, "alpha": 4.0, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"], **adapter},
        "data": {"batching": "fixed", "row_tokens": 16, "max_length": 16}, "training": {"steps": 1, "compute_dtype": "float32"},
    }  # fmt: skip
    return Experiment.model_validate(content)


def batch_of(tokens):
    shape = tokens.shape
    targets, mask = np.roll(tokens, -1, 1), np.ones(shape, np.float32)
    mask[:, -1] = 0
    positions = np.broadcast_to(np.arange(shape[1]), shape)
    tokens, targets, segments, positions = (jnp.asarray(a, jnp.int32) for a in (tokens, targets, np.ones(shape), positions))
    return Batch(tokens, targets, jnp.asarray(mask), segments, positions)


@pytest.mark.parametrize(("file", "case"), CASES)
def test_pefts_rows_are_read_trained_and_written(file, case, tmp_path):
    """Logits and gradients of PEFT's, in PEFT's layout; what comes out again is what came in, but for whole tables."""
    known = of_case(file, case)
    base, adapter = folders(known, tmp_path)
    model = hub.load(str(base), experiment_of(base, init_from=str(adapter)))
    batch = batch_of(known["tokens"])
    np.testing.assert_allclose(full_logits(model, batch.tokens), known["logits"], rtol=0, atol=2e-5)
    loss, _, gradients = loss_and_gradients(model, batch, full=False, remat="full")
    np.testing.assert_allclose(loss, known["losses"][0], rtol=1e-6)
    for name, tree in (("grad", gradients), ("out", model)):
        peft.save_adapter(tree, tmp_path / name, "base")
    found, out = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("grad", "out"))
    expected = {name.removeprefix("grad/"): value for name, value in known.items() if name.startswith("grad/")}
    order = np.argsort(indices_of(known))
    for name, value in expected.items():
        assert_close_to_largest(found[name], value[order] if "token_adapter" in name else value, 2e-5, name)
    assert sum("token_adapter" in name for name in found) == (1 if "tied" in case else 2)
    for name, value in load_file(adapter / "adapter_model.safetensors").items():
        if name in expected:
            np.testing.assert_array_equal(out[name], value[order] if "token_adapter" in name else value)
    settings = json.loads((tmp_path / "out" / "adapter_config.json").read_text())["trainable_token_indices"]
    assert settings == dict.fromkeys(["embed_tokens"] if "tied" in case else ["embed_tokens", "lm_head"], sorted(indices_of(known)))


def indices_of(known):
    given = json.loads(str(known["adapter_config"]))["trainable_token_indices"]
    return given if isinstance(given, list) else given["embed_tokens"]


@pytest.mark.parametrize("case", ["enlarged", "tied, enlarged"])
def test_new_rows_begin_as_the_mean(case, tmp_path):
    """As transformers' resize_token_embeddings draws them: around the mean, with a deviation of some 3e-5 of the rows'."""
    known = of_case("token_rows", case)
    base, _ = folders(known, tmp_path)
    new = tuple(i for i in sorted(indices_of(known)) if i >= 40)
    experiment = experiment_of(base, token_rows=new).changed("model", vocabulary=40 + len(new))
    model = hub.load(str(base), experiment)
    np.testing.assert_allclose(model.head_weight.get_value()[40:], known["new"], atol=1e-4)
    rows = [model.embed_rows] if model.config.tie_word_embeddings else [model.embed_rows, model.head_rows]
    tables = [model.embed.weight] if model.config.tie_word_embeddings else [model.embed.weight, model.head.weight]
    for trained, table in zip(rows, tables, strict=True):
        np.testing.assert_array_equal(trained.rows.get_value(), table.get_value()[jnp.asarray(new)])


@pytest.mark.parametrize("case", ["enlarged", "tied"])
def test_a_merged_model_has_the_rows(case, tmp_path):
    """In bf16, config.json with the larger vocabulary: as the adapter's model computes, whose rows are rounded too."""
    known = of_case("token_rows", case)
    base, adapter = folders(known, tmp_path)
    model = hub.load(str(base), experiment_of(base, init_from=str(adapter)))
    merge.save_merged(model, base, tmp_path / "merged")
    sizes = read_config(tmp_path / "merged")
    assert (sizes.vocab_size, sizes.new_rows) == (model.config.vocab_size, 0) == ({"enlarged": 42, "tied": 40}[case], 0)
    written = load_file(tmp_path / "merged" / "model.safetensors")
    ids = sorted(indices_of(known))
    trained = load_file(adapter / "adapter_model.safetensors")
    for table, module in (("model.embed_tokens", "model.embed_tokens"), ("lm_head", "lm_head"))[: 1 if case == "tied" else 2]:
        rows = trained[f"base_model.model.{module}.token_adapter.trainable_tokens_delta"][np.argsort(indices_of(known))]
        np.testing.assert_array_equal(written[f"{table}.weight"][ids], rows.astype(written[f"{table}.weight"].dtype))
        kept = np.setdiff1d(np.arange(40), ids)
        np.testing.assert_array_equal(written[f"{table}.weight"][kept], weight(f"{table}.weight", (40, 16))[kept].astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"trainable_token_indices": {"embed_tokens": [37], "lm_head": [38]}}, r"trains rows of lm_head: expected embed_tokens"),
        ({"trainable_token_indices": [39]}, r"trains the rows of tokens \[39\]; .* adapter the rows of tokens \[37, 38\]: set added"),
        ({"trainable_token_indices": None}, r"trains no rows of tokens; the model's adapter the rows of tokens \[37, 38\]"),
        ({"trainable_token_indices": [-1]}, r"trainable_token_indices = \[-1\]: expected a list of ids, or one for each table"),
        ({"trainable_token_indices": {"wte": [37, 38]}}, r"trains rows of wte: expected embed_tokens"),
        ({"trainable_token_indices": "all"}, r'trainable_token_indices = "all": expected'),
    ],
)
def test_rows_that_do_not_fit(change, message, tmp_path):
    base, adapter = folders(of_case("token_rows", "tied"), tmp_path)
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        hub.load(str(base), experiment_of(base, init_from=str(adapter), token_rows=[37, 38]))


def test_a_table_that_was_trained_whole_is_refused(tmp_path):
    """PEFT writes tables whole where the base was enlarged: their other rows must be the base's."""
    base, adapter = folders(of_case("token_rows", "enlarged"), tmp_path)
    held = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in held if name.endswith("embed_tokens.token_adapter.base_layer.weight"))
    held[name][7, 3] += 0.25
    save_file(held, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"embed_tokens\.token_adapter\.base_layer\.weight' is another table than the base's"):
        hub.load(str(base), experiment_of(base, init_from=str(adapter)))


def test_rows_that_are_not_finite_or_missing(tmp_path):
    base, adapter = folders(of_case("token_rows", "tied"), tmp_path)
    held = load_file(adapter / "adapter_model.safetensors")
    name = next(name for name in held if name.endswith("trainable_tokens_delta"))
    for value, message in ((np.full((2, 16), np.nan, np.float32), "not finite"), (np.zeros((3, 16), np.float32), r"\[3, 16\]")):
        save_file(held | {name: value}, adapter / "adapter_model.safetensors")
        with pytest.raises(UserError, match=message):
            hub.load(str(base), experiment_of(base, init_from=str(adapter)))

"""A gpt-oss with files as the released ones: what transformers computes of them, and what is trained over them."""

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from oracles import drawn
from safetensors.numpy import load_file, save_file
from support import batch_of, full_logits, loss_and_gradients, read_vectors

from moejax import cli
from moejax.hub.save import save_weights, stored_shapes
from moejax.hub.weights import load_weights, read_config
from moejax.models.build import build
from moejax.models.config import LoRAConfig


@pytest.fixture(scope="module")
def known():
    return read_vectors("mxfp4")


@pytest.fixture(scope="module")
def folder(known, tmp_path_factory):
    made = tmp_path_factory.mktemp("gpt_oss")
    (made / "config.json").write_text(str(known["model/config"]))
    shapes = stored_shapes(build(read_config(made)))
    save_file(drawn.in_mxfp4(shapes), str(made / "model.safetensors"))
    return made


@pytest.fixture(scope="module")
def numbers(folder, tmp_path_factory):
    """The same model in the files of one that is not quantized."""
    made = tmp_path_factory.mktemp("numbers")
    sizes = read_config(folder)
    save_weights(load_weights(build(sizes, dtype=jnp.float32), folder, jax.random.key(0)), made, jnp.float32)
    return made


def adapted(folder):
    """With an adapter on everything, B drawn."""
    adapter = LoRAConfig(rank=2, targets=("q_proj", "o_proj", "gate", "w1", "w2", "w3"))
    model = load_weights(build(read_config(folder), adapter=adapter, dtype=jnp.float32), folder, jax.random.key(0))
    for index, target in enumerate(("w1", "w2", "w3")):
        b = getattr(model.layers.moe, target).lora.b
        b.set_value(0.1 * jax.random.normal(jax.random.key(index), b.get_value().shape))
    return model


def batch(known):
    ids = known["model/ids"].astype(np.int32)
    return batch_of({"ids": ids, "mask": np.ones_like(ids), "labels": ids})


def test_logits_and_loss_are_those_of_transformers(known, folder):
    model = load_weights(build(read_config(folder), adapter=LoRAConfig(rank=2), dtype=jnp.float32), folder, jax.random.key(0))
    assert {getattr(model.layers.moe, w).weight.get_value().kind for w in ("w1", "w2", "w3")} == {"mxfp4"}
    ids = known["model/ids"].astype(np.int32)
    positions = np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape)
    logits = full_logits(model, ids, np.ones_like(ids), positions)
    np.testing.assert_allclose(logits, known["model/logits"], atol=5e-6 * np.abs(logits).max())  # of 9.3
    likelihoods = np.take_along_axis(jax.nn.log_softmax(logits[:, :-1]), ids[:, 1:, None], axis=-1)
    np.testing.assert_allclose(-np.mean(likelihoods), known["model/loss"], rtol=1e-6)


@pytest.mark.long
def test_loss_and_gradients_are_those_of_the_numbers(known, folder, numbers):
    """Those of every adapter, in full rematerialization: nothing but the codes is kept."""
    (loss, stats, gradients), (expected, same, slopes) = (
        loss_and_gradients(adapted(path), batch(known), full=False, remat="full") for path in (folder, numbers)
    )
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(stats.counts, same.counts)
    pairs = [jax.tree.leaves(nnx.state(model, nnx.LoRAParam)) for model in (gradients, slopes)]
    assert len(pairs[0]) == 12
    for one, other in zip(*pairs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5 * np.abs(other).max())


@pytest.mark.long
def test_a_run_trains_over_them_and_is_merged_into_bf16(folder, tmp_path, capsys):
    """Everything but the experts in bf16, as released."""
    base = tmp_path / "base"
    shutil.copytree(folder, base)
    files = load_file(str(base / "model.safetensors"))
    save_file({n: v if v.dtype == np.uint8 else v.astype(jnp.bfloat16) for n, v in files.items()}, str(base / "model.safetensors"))
    config = {
        "name": "run", "runs_dir": str(tmp_path), "model": {"source": str(base)},
        "adapter": {"rank": 2, "targets": ["gate_proj", "up_proj", "down_proj"]},
        "data": {"batching": "fixed", "row_tokens": 16, "batch_rows": 2},
        "training": {"steps": 40, "learning_rate": 0.02, "compute_dtype": "float32"},
    }  # fmt: skip
    (tmp_path / "run.yaml").write_text(json.dumps(config))
    assert cli.main(["train", "--config", str(tmp_path / "run.yaml")]) == 0
    assert "MXFP4" in capsys.readouterr().out
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines() if '"loss"' in line]
    assert np.mean(losses[-5:]) < 0.9 * np.mean(losses[:5])  # of random tokens: what is learned is to be unsure
    assert cli.main(["export", str(tmp_path / "run"), "--format", "merged", "--out", str(tmp_path / "merged")]) == 0
    told = capsys.readouterr().out
    assert "its experts are in bf16: those of the base are in MXFP4" in told and "verified on" in told
    written = load_file(str(tmp_path / "merged" / "model.safetensors"))
    assert written["model.layers.1.mlp.experts.gate_up_proj"].dtype == jnp.bfloat16
    assert "quantization_config" not in json.loads((tmp_path / "merged" / "config.json").read_text())

"""A checkpoint's logits a layer at a time: those of the whole model, and of the adapter that was asked for."""

import dataclasses
import shutil
from contextlib import ExitStack

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import ROOT, finished_run, full_logits, walked_logits

from moejax.errors import UserError
from moejax.hub import layerwise, peft, save, weights
from moejax.hub.quantized_cache import Content
from moejax.models.build import build
from moejax.models.config import LORA_TARGETS, PRESETS, LoRAConfig, MixtralConfig, Quantization
from moejax.models.config.specs import Stack

TOKENS = np.arange(1, 41, dtype=np.int32)


class TwoKinds(MixtralConfig):
    """A first block with narrow experts, in a stack of its own."""

    @property
    def stacks(self):
        (stack,) = super().stacks
        narrow = dataclasses.replace(stack.block.feed_forward, hidden=96)
        first = Stack(dataclasses.replace(stack.block, feed_forward=narrow), 1, "first")
        return first, dataclasses.replace(stack, repeats=self.num_layers - 1)

    @property
    def names(self):
        return dataclasses.replace(super().names, blocks=super().names.blocks * 2)


TWO_KINDS = TwoKinds(**{name: getattr(PRESETS["mixtral-tiny"], name) for name in MixtralConfig.fields()})


def whole(folder, trained=None, sizes=None, **arguments):
    """The same by the model in one piece."""
    model = weights.load_weights(build(sizes or weights.read_config(folder), dtype=jnp.float32, **arguments), folder, jax.random.key(0))
    if trained is not None:
        peft.load_adapter(model, trained)
    return full_logits(model, TOKENS[None], np.ones((1, len(TOKENS)), np.int32), np.arange(len(TOKENS))[None])[0]


@pytest.mark.parametrize(
    "name", ["tiny-blackmamba", *(pytest.param(name, marks=pytest.mark.long) for name in ("tiny-mixtral", "tiny-qwen3-moe"))]
)
def test_a_checkpoint(name):
    folder = ROOT / "assets" / name
    (found,) = walked_logits(weights.read_config(folder), folder, TOKENS, param_dtype=jnp.bfloat16)
    expected = whole(folder, param_dtype=jnp.bfloat16)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


@pytest.mark.long
def test_several_stacks(tmp_path):
    """Each layer by its own stack's program, with its own adapter and its own tensors, and the hash that the whole has."""
    arguments = {"quantization": Quantization(), "adapter": LoRAConfig(2, 4.0, 0.0, LORA_TARGETS), "frozen_dtype": jnp.float32}
    weights_of = build(TWO_KINDS, key=jax.random.key(1), dtype=jnp.float32)
    save.save_weights(weights_of, tmp_path / "base")
    model = build(TWO_KINDS, key=jax.random.key(2), **arguments)
    for index, stack in enumerate((model.first, model.layers)):
        for number, module in enumerate((stack.moe.w1, stack.moe.w2, stack.attention.q_proj)):
            b = module.lora.b
            b.set_value(0.1 * jax.random.normal(jax.random.key(10 * index + number), b.get_value().shape))
    peft.save_adapter(model, tmp_path / "adapter", "base")
    found = walked_logits(TWO_KINDS, tmp_path / "base", TOKENS, adapters=[tmp_path / "adapter"], **arguments)[0]
    expected = whole(tmp_path / "base", tmp_path / "adapter", TWO_KINDS, **arguments)
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    both, read = Content(), Content()
    weights.load_weights(build(TWO_KINDS, **arguments), tmp_path / "base", jax.random.key(0), content=both)
    with ExitStack() as stack:
        walk = layerwise.Walk(layerwise.Checkpoint(TWO_KINDS, tmp_path / "base", (), arguments, read), TOKENS, stack)
        names = []
        for layer in range(walk.layers):
            walk.read(layer)
            names += [matrix.name for matrix in walk.matrices() if ".layers." in matrix.name]
        walk.end()
    assert read.finish() == both.value
    assert sorted(names) == sorted(name for name in load_file(tmp_path / "base/model.safetensors") if ".layers." in name)


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
    found = walked_logits(weights.read_config(folder), folder, TOKENS, adapters=[first, second], **arguments)
    for logits, adapter in zip(found, (first, second), strict=True):
        expected = whole(folder, adapter, **arguments)
        np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)
    assert np.abs(found[0] - found[1]).max() > 0.01


@pytest.mark.parametrize(
    ("name", "quantization"),
    [("tiny-mixtral", Quantization()), ("tiny-blackmamba", None), pytest.param("tiny-qwen3-moe", Quantization(), marks=pytest.mark.long)],
)
def test_the_hash_of_what_is_read_is_that_of_the_whole(name, quantization):
    folder, whole, read = ROOT / "assets" / name, Content(), Content()
    sizes = weights.read_config(folder)
    arguments = {"quantization": quantization, "param_dtype": jnp.bfloat16, "frozen_dtype": jnp.bfloat16}
    weights.load_weights(build(sizes, **arguments), folder, jax.random.key(0), content=whole)
    with ExitStack() as stack:
        walk = layerwise.Walk(layerwise.Checkpoint(sizes, folder, (), arguments, read), TOKENS, stack)
        for layer in range(walk.layers):
            walk.read(layer)
        walk.end()
    assert read.finish() == whole.value


def test_no_more_than_a_layer_is_held(monkeypatch):
    """Live arrays after each layer: less than two layers and the embedding, of a model of four."""
    folder = ROOT / "assets/tiny-mixtral"
    sizes = weights.read_config(folder)
    held = []
    before = {id(a) for a in jax.live_arrays()}

    def look():
        held.append(sum(a.nbytes for a in jax.live_arrays() if id(a) not in before))

    walked_logits(sizes, folder, TOKENS, param_dtype=jnp.bfloat16, advance=look)
    layer = sum(
        v.get_value().size * 2 for name, v in weights.base_variables(build(sizes)) if name.startswith("layers.")
    ) // sizes.num_layers
    assert len(held) == sizes.num_layers and max(held) < 2 * layer + 4 * sizes.vocab_size * sizes.hidden_size


@pytest.mark.parametrize("fault", ["NaN or infinity", r"shape \[160, 128\], expected \[128, 160\]", "is missing"])
def test_a_fault_is_named_by_the_files_own_name(fault, tmp_path):
    """Not by the name that a layer goes by while it is read."""
    shutil.copytree(ROOT / "assets/tiny-mixtral", tmp_path, dirs_exist_ok=True)
    tensors, name = load_file(tmp_path / "model.safetensors"), "model.layers.2.block_sparse_moe.experts.3.w2.weight"
    if "NaN" in fault:
        tensors[name] = np.full_like(tensors[name], np.nan)
    elif "shape" in fault:
        tensors[name] = np.ascontiguousarray(tensors[name].T)
    else:
        del tensors[name]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=f"tensor '{name}' (has |holds )?{fault}"):
        walked_logits(weights.read_config(tmp_path), tmp_path, TOKENS, param_dtype=jnp.bfloat16)

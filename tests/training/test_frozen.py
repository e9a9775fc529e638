"""`--check-frozen`: one flipped bit of a frozen array is noticed, and a run flips none."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from support import ROOT

from moejax import config
from moejax.errors import UserError
from moejax.hub.peft import BASE
from moejax.models.ops import host
from moejax.models.ops.quantized import quantize
from moejax.training import loop
from moejax.training.frozen import Frozen


def tree():
    weight = jax.random.normal(jax.random.key(0), (2, 64, 64))
    codes = quantize("nf4-double", weight)
    return {"codes": codes, "host": {"w": host.put(jnp.arange(64.0).reshape(4, 16))}, "norm": jnp.ones(3, jnp.bfloat16)}


def flipped(array, place, bit):
    changed = np.array(array)
    changed.reshape(-1).view(np.uint8)[place] ^= 1 << bit
    return host.put(changed) if host.is_host(array) else jnp.asarray(changed)


def test_one_flipped_bit_is_noticed():
    held = tree()
    frozen = Frozen(held)
    leaves, structure = jax.tree.flatten(held)
    assert frozen.check(tree()) == f"frozen weights: {len(leaves)} arrays, 0.00 GB, bit-identical to before the first step"
    for number, leaf in enumerate(leaves):
        for place, bit in ((0, 0), (leaf.nbytes - 1, 7)):
            others = [*leaves[:number], flipped(leaf, place, bit), *leaves[number + 1 :]]
            with pytest.raises(UserError, match=rf"--check-frozen: .* is not what it was .*\(1 of {len(leaves)} arrays\)"):
                frozen.check(jax.tree.unflatten(structure, others))
    assert "there are none" in Frozen({}).check({})


@pytest.mark.long
def test_a_run_changes_no_frozen_byte_and_its_adapter_names_its_base(tmp_path, capsys):
    changes = (
        "training.steps=2", "training.epochs=null", "training.warmup_steps=0", "training.eval_every=null",
        "data.row_tokens=128", "data.max_length=128",
        "data.batch_rows=2", "data.holdout=0", f"runs_dir={tmp_path}",
    )  # fmt: skip
    experiment = config.load(ROOT / "configs/demo.yaml", changes)
    assert loop.run(experiment, resume=False, check_frozen=True) == 0
    assert "bit-identical to before the first step" in capsys.readouterr().out
    with safe_open(tmp_path / "demo/adapter/adapter_model.safetensors", framework="numpy") as file:
        assert file.metadata()[BASE] == config.load(tmp_path / "demo/config.yaml").made_of.base
    again = config.load(ROOT / "configs/demo.yaml", (*changes, "name=again", f"adapter.init_from={tmp_path}/demo/adapter"))
    assert loop.run(again, resume=False) == 0

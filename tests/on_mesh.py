"""Steps on a mesh of virtual devices against the same steps on one.

As a program (`python on_mesh.py CASES`, JSON: a list of cases) it prints a list of what was found: for more devices than the tests'
processes have.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax

from moejax import mesh
from moejax.config import TrainingConfig
from moejax.config_mesh import MeshConfig
from moejax.config_preference import PreferenceConfig
from moejax.data.batch import Batch, PairBatch
from moejax.models.build import build
from moejax.models.config import PRESETS, LoRAConfig, Quantization
from moejax.models.layers import Placement
from moejax.profiling.collectives import kind, under_data
from moejax.profiling.program import CONTAINERS, Program, module_of, size
from moejax.training.optimizer import make_optimizer
from moejax.training.program import initial_state, split
from moejax.training.step import Objective, make_eval_step, make_train_step

VOCABULARY = 64
"""Of every architecture: the table is most of a tiny one."""


def elsewhere(cases, devices):
    """What a process with this many devices finds."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"  # the last one counts
    environment = os.environ | {"XLA_FLAGS": flags, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, __file__, json.dumps(cases)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def batch_of(rows, tokens, micro, vocab, seed=0):
    """Two segments a row and padding behind them, of uneven lengths; part of the tokens supervised; the last rows empty, as in the last
    batch of an epoch."""
    rng, shape = np.random.default_rng(seed), (micro, rows, tokens)
    segments, positions = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    for row in range(micro * rows - rows // 2):
        length = int(rng.integers(3, tokens))
        for number, (first, end) in enumerate(((0, length // 2), (length // 2, length)), 1):
            at = row // rows, row % rows, slice(first, end)
            segments[at], positions[at] = number, np.arange(end - first)
    ids = rng.integers(1, vocab, (2, *shape)).astype(np.int32)
    return Batch(*ids, ((rng.random(shape) < 0.7) & (segments > 0)).astype(np.float32), segments, positions)


def pairs_of(batch):
    """Each row of a batch as a pair, the first segment the side that is preferred."""
    row = np.arange(batch.tokens.shape[1], dtype=np.int32)[:, None]
    return PairBatch(*batch, np.where(batch.segment_ids > 0, 2 * row + batch.segment_ids, 0).astype(np.int32))


def by_columns(key, p, shape):
    """In the place of `jax.random.bernoulli`: a mask of each column, whatever the row and the key. Devices draw masks of their own: with
    these they have those of one."""
    return jnp.broadcast_to(np.random.default_rng(shape[-1]).random(shape[-1]) < p, shape)


def model_of(case):
    """(graphdef, trainable, frozen) as drawn from a seed, adapters' B too."""
    full, sizes = case.get("full", False), PRESETS[case["preset"]].replace(vocab_size=VOCABULARY, **case.get("sizes", {}))
    adapter = None if full else LoRAConfig(case.get("rank", 2), 4.0, case.get("dropout", 0.0), case.get("targets"), case.get("share"))
    model = build(
        sizes, key=jax.random.key(0), adapter=adapter, dtype=jnp.float32, backend=case.get("backend", "auto"),
        quantization=Quantization(True, case.get("modules")) if case.get("quantized", not full) else None,
        placement=Placement(case.get("experts", "device")),
    )  # fmt: skip
    graphdef, trainable, frozen = split(model, full)
    if not full:
        leaves, form = jax.tree.flatten(trainable)
        rng = np.random.default_rng(1)
        trainable = jax.tree.unflatten(form, [jnp.asarray(0.1 * rng.normal(size=a.shape), a.dtype) for a in leaves])
    return graphdef, trainable, frozen


def gradients_kept():
    """An optimizer whose state is the gradient, and which changes nothing."""
    return optax.GradientTransformation(
        lambda weights: jax.tree.map(jnp.zeros_like, weights),
        lambda gradients, state, weights: (jax.tree.map(jnp.zeros_like, gradients), gradients),
    )


def collectives_of(compiled):
    """([what each collective of a compiled step is, bytes of its operands], names of those that data decide about)."""
    program = Program(module_of(compiled))
    inside = [i for i in program.instructions.values() if i.opcode not in CONTAINERS and kind(program, i) is not None]
    return [(kind(program, i), sum(size(o.shape) for o in program.operands(i))) for i in inside], under_data(program)


OF_ONE = {}  # what one device gives for cases that differ in their meshes alone


def run(case):
    """A case: {preset, devices, weights, …}. Returns the losses, the worst gradient of its largest entry, whether counts are equal, and the
    step's collectives."""
    graphdef, trainable, frozen = model_of(case)
    count, micro = case.get("devices", 4), case.get("micro", 1)
    batch = batch_of(case.get("rows", count), case.get("tokens", 16), micro, VOCABULARY)
    batch = pairs_of(batch) if "preference" in case else batch
    held_out = jax.tree.map(lambda a: a[0], batch)
    settings = {name: case[name] for name in ("remat", "aux_loss_coef", "layer_major") if name in case}
    settings |= {"preference": PreferenceConfig(loss=case["preference"])} if "preference" in case else {}
    objective = Objective(graphdef, full=case.get("full", False), dropout=case.get("dropout", 0.0), **settings)

    def stepped(devices, trainable, frozen, batch, held_out):
        """(gradients, metrics, (held-out loss, its tokens), collectives)."""
        optimizer, evaluation = gradients_kept(), None
        state = initial_state(trainable, optimizer, devices)
        step = make_train_step(objective, optimizer, optax.constant_schedule(1.0), 0, devices)
        with mock.patch("jax.random.bernoulli", by_columns) if "dropout" in case else nullcontext():
            compiled = jax.jit(step).lower(state, frozen, batch).compile()
        after, metrics = compiled(state, frozen, batch)
        if case.get("evaluated"):
            sums, weight = jax.jit(make_eval_step(objective, devices))(trainable, frozen, held_out)
            evaluation = float(sums["loss"]), float(weight)
        return *jax.device_get((after.opt_state, metrics)), evaluation, collectives_of(compiled)

    alone = json.dumps({key: value for key, value in case.items() if key not in ("weights", "moments")}, sort_keys=True)
    if alone not in OF_ONE:
        OF_ONE[alone] = stepped(None, trainable, frozen, batch, held_out)
    expected, metrics, evaluation, none = OF_ONE[alone]
    assert none == ([], [])

    devices = mesh.devices(MeshConfig(devices=count, weights=case["weights"], moments=case.get("moments", "whole")))
    places = devices.of_weights(trainable), devices.of_weights(frozen)
    given = jax.device_put((jax.tree.map(jnp.copy, trainable), frozen), places)
    of_mesh = stepped(devices, *given, *jax.device_put((batch, held_out), (devices.of_rows(batch, 1), devices.of_rows(held_out))))
    pairs = list(zip(jax.tree.leaves(expected), jax.tree.leaves(of_mesh[0]), strict=True))
    assert all(np.abs(one).max() > 0 for one, _ in pairs)
    shared = [s.is_fully_replicated for s in jax.tree.leaves(places[0])]
    return {
        "loss": [float(metrics["loss"]), float(of_mesh[1]["loss"])],
        "worst": max(float(np.abs(one - two).max() / np.abs(one).max()) for one, two in pairs),
        "counts": bool((metrics["expert_counts"] == of_mesh[1]["expert_counts"]).all()),
        "norms": [float(metrics["grad_norm"]), float(of_mesh[1]["grad_norm"])],
        "aux": [float(metrics.get("aux_loss", 0)), float(of_mesh[1].get("aux_loss", 0))],
        "evaluation": [evaluation, of_mesh[2]],
        "collectives": of_mesh[3][0],
        "under_data": of_mesh[3][1],
        "part": mesh.device_bytes(frozen, places[1]) / max(1, mesh.device_bytes(frozen, devices.whole(frozen))),
        "shared_bytes": sum(a.nbytes for a, there in zip(jax.tree.leaves(trainable), shared, strict=True) if there),
    }


def trained(case, devices=None, steps=3):
    """The losses of some steps with the case's optimizer, the weights behind them, and the bytes of its state on a device."""
    graphdef, trainable, frozen = model_of(case)
    batch = batch_of(4, 16, 1, VOCABULARY)
    optimizer = make_optimizer(TrainingConfig(steps=steps, optimizer=case["optimizer"], learning_rate=1e-2), optax.constant_schedule(1e-2))
    if devices is not None:
        trainable, frozen = jax.device_put((trainable, frozen), (devices.of_weights(trainable), devices.of_weights(frozen)))
        batch = jax.device_put(batch, devices.of_rows(batch, 1))
    state, losses = initial_state(trainable, optimizer, devices), []
    nbytes = sum(a.addressable_shards[0].data.nbytes for a in jax.tree.leaves(state.opt_state))
    objective = Objective(graphdef, full=case.get("full", False))
    step = jax.jit(make_train_step(objective, optimizer, optax.constant_schedule(1e-2), 0, devices))
    for _ in range(steps):
        state, metrics = step(state, frozen, batch)
        losses.append(float(metrics["loss"]))
    return losses, jax.device_get(jax.tree.leaves(state.trainable)), nbytes


if __name__ == "__main__":
    print(json.dumps([run(case) for case in json.loads(sys.argv[1])]))

"""What each device of a mesh holds, and what it receives in a step: by arithmetic, by the rules of `moejax.mesh` and the models. No jax.

What a device receives is that of a ring of n devices: of what is gathered n - 1 parts, of what is summed and left in parts as many, of what
is summed for all twice that.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING, NamedTuple

from moejax.estimator import sizes
from moejax.estimator.sizes import ITEM, Stored
from moejax.models.config import Architecture, specs
from moejax.models.ops.quantized import KINDS

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.config_mesh import MeshConfig


def count(experiment: Experiment) -> int:
    """Devices; 1 without a mesh, and with one that takes all that there are."""
    return 1 if experiment.mesh is None else experiment.mesh.devices or 1


def each(weights: tuple[Stored, ...], config: Architecture, mesh: MeshConfig | None) -> tuple[Stored, ...]:
    """Weights and adapters as one device holds them."""
    n = 1 if mesh is None else mesh.devices or 1
    if mesh is None or n == 1 or mesh.weights == "whole":
        return weights
    return tuple(_by_expert(w, config, n) if mesh.weights == "experts" else _by_rows(w, config, n) for w in weights)


def lies_by_expert(w: Stored, config: Architecture, n: int) -> bool:
    """Whether `experts` gives each device some experts' part of it: of weights, biases and adapters [layers, experts, …]."""
    return w.module in config.groups["experts"] and w.shape[1] % n == 0


def _by_expert(w: Stored, config: Architecture, n: int) -> Stored:
    if not lies_by_expert(w, config, n):
        return w
    shape = (w.shape[0], w.shape[1] // n, *w.shape[2:])
    parts, host = ({name: size // n for name, size in held.items()} for held in (w.parts, w.host))
    return replace(w, shape=shape, parts=parts, host=host, parameters=max(1, w.parameters // n))


def _by_rows(w: Stored, config: Architecture, n: int) -> Stored:
    over = by_rows(w, config, n)
    return replace(w, parts={name: size - over.get(name, 0) * (n - 1) // n for name, size in w.parts.items()})


def by_rows(w: Stored, config: Architecture, n: int) -> dict[str, int]:
    """Part -> bytes of it, of all devices together, that `spread` spreads by rows [..., out, in]: of frozen linear layers and experts but a
    router's what the devices divide; scales of scales are whole."""
    if w.trained or w.adapter or w.name != "weight" or w.module not in config.linears or "router" in w.module:
        return {}
    row = len(w.shape) - 2
    if w.kind is None:
        return dict(w.parts) if w.shape[row] % n == 0 else {}
    kind = KINDS[w.kind]
    divided = {part for part, (shape, _) in kind.parts(w.shape).items() if len(shape) == row + 2 and shape[row] % n == 0}
    codes, scales = sizes.quantized_parts(w.kind, w.shape)
    nbytes = kind.nbytes(w.shape)
    return {codes: nbytes["codes"], scales: sum(nbytes[part] for part in divided - {"codes"})} if "codes" in divided else {}


def moment_bytes(experiment: Experiment, config: Architecture, weights: tuple[Stored, ...]) -> int:
    """The optimizer's state on one device; weights: of all devices. Where moments are spread, each array is by an axis that the devices
    divide, but for those that lie by expert."""
    mesh, n, t = experiment.mesh, count(experiment), experiment.training
    trained = tuple(w for w in weights if w.trained)
    own = each(trained, config, mesh)
    found = sizes.optimizer_bytes(t, own)
    if mesh is None or mesh.moments == "whole" or n == 1:
        return found
    for w in (w for w, of_all in zip(own, trained, strict=True) if w.shape == of_all.shape):
        for shape, item in sizes.moments(t, w):
            found -= item * math.prod(shape) * (n - 1) // n if any(axis % n == 0 for axis in shape) else 0
    return found


class Traffic(NamedTuple):
    """Bytes that a device receives in one optimizer step. weights: of matrices that are spread; rows: to experts and back; gradients;
    updates: of weights whose moments are spread."""

    weights: float = 0.0
    rows: float = 0.0
    gradients: float = 0.0
    updates: float = 0.0

    @property
    def total(self) -> float:
        return sum(self)


def traffic(experiment: Experiment, config: Architecture, tokens: float) -> Traffic:
    """tokens: of a micro-batch on all devices."""
    mesh, n, t = experiment.mesh, count(experiment), experiment.training
    if mesh is None or n == 1:
        return Traffic()
    part, micro = (n - 1) / n, t.gradient_accumulation
    weights = sizes.stored(experiment, config)
    by_expert = mesh.weights == "experts"
    summed = 4 * sum(w.size for w in weights if w.trained and not (by_expert and lies_by_expert(w, config, n)))
    gathered = sent = 0.0
    if mesh.weights == "spread":
        for w in weights:
            # Forward and backward (what is recomputed stands next to the backward pass, and shares it); micro-batches that pass a layer
            # together need the experts' matrices once.
            times = 2 * (micro // t.together if w.module in config.groups["experts"] else micro)
            gathered += times * sum(by_rows(w, config, n).values()) * part
    if by_expert and config.num_experts % n == 0:
        each_tokens, item = micro * tokens / n, ITEM[t.compute_dtype]
        recomputed = t.remat != "none"
        for stack in config.stacks:
            moe = stack.block.feed_forward
            if isinstance(moe, specs.MoE):
                # x there and what experts made of it back, and both gradients; x again where it is recomputed. With x its choices: a weight
                # and (of sparse ones) an index each, and whether it is a token; back with x's gradient the weights'.
                there = (1 + recomputed) * (item * config.hidden_size + moe.experts_per_token * (4 if moe.dense else 8) + 1)
                back = 3 * item * config.hidden_size + moe.experts_per_token * 4
                sent += stack.repeats * (n - 1) * each_tokens * (there + back)
    # A sum of which each device needs a part is half of one that all need; the other half is of the weights that are made of it.
    spread_moments = mesh.moments == "spread"
    return Traffic(gathered, sent, part * summed * (1 if spread_moments else 2), part * summed if spread_moments else 0.0)

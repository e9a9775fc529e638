"""`training.remat: auto`: which policy is fastest, by the first layers of the run's model. Whether its whole step fits is compiled at the
run's start.

Random weights, a small vocabulary and no optimizer: what is recomputed are layers. Routings that are nearly even may come out otherwise by
another program's rounding: results are compared as a whole (`NORM`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from functools import cache
from typing import Any

from moejax import gpus
from moejax.config import Experiment
from moejax.estimator import closed_form, memory
from moejax.hub.model import model_arguments
from moejax.models.config import Architecture, from_hub_config
from moejax.models.layers import REMAT_POLICIES
from moejax.tuner.drawn import Drawn
from moejax.tuner.registry import Candidate, Case
from moejax.tuner.shapes import rows_of

NORM = True
PORTABLE = "full"
VOCABULARY = 1024
DEPTHS = (2, 4, 8)
_SECTIONS: dict[str, Any] = {
    "model": {"experts_per_token", "overrides", "moe_backend", "attention", "scan"}, "quantization": {"format", "double", "modules"},
    "adapter": {"rank", "alpha", "dropout", "targets", "share"}, "placement": True, "training": {"compute_dtype", "param_dtype"},
}  # fmt: skip
"""What of a config counts. Not where weights come from, nor the vocabulary: a run pins and extends those at its start."""


def shapes(experiment: Experiment, config: Architecture) -> list[dict[str, Any]]:
    t = experiment.training
    if t.remat != "auto" or t.together > 1 or experiment.mesh is not None or experiment.preference is not None:
        return []
    if experiment.placement.experts == "auto":
        return []
    rows, length = rows_of(experiment)
    recipe = experiment.model_dump(mode="json", include=_SECTIONS)
    recipe |= {"sizes": config.to_hub_config(), "expert_format": config.expert_format}
    counts = recipe | {"sizes": config.replace(vocab_size=VOCABULARY, new_rows=0).to_hub_config()}
    counts["model"] = counts["model"] | {"overrides": {}}  # the sizes have them
    digest = hashlib.sha256(json.dumps([counts, rows, length], sort_keys=True).encode()).hexdigest()[:16]
    return [{"rows": rows, "length": length, "layers": config.blocks, "dtype": t.compute_dtype, "digest": digest, "recipe": recipe}]


def candidates(device: str, shape: dict[str, Any]) -> list[Candidate]:
    found = [Candidate(policy, {"policy": policy}, seconds=120.0) for policy in (PORTABLE, "none", "dots")]
    card = gpus.of_device_kind(device)
    if card is None:
        return found
    experiment, config = whole(shape)
    usable = memory.usable_bytes(card, experiment.device.memory_fraction)
    takes = closed_form.on(card, experiment.changed("training", remat="none"), config, shape["rows"], shape["length"]).total
    why = f"its step takes about {takes / 1e9:.1f} of {usable / 1e9:.1f} GB, by arithmetic" if takes > usable else None
    return [one._replace(why_not=why) if one.name == "none" else one for one in found]


def whole(shape: dict[str, Any]) -> tuple[Experiment, Architecture]:
    """The run's, as far as it counts here."""
    rows = {"source": None, "batching": "fixed", "batch_rows": shape["rows"], "row_tokens": shape["length"], "max_length": shape["length"]}
    sections = {name: shape["recipe"][name] for name in _SECTIONS}
    sections["model"] = sections["model"] | {"source": "as the sizes say"}
    sections["training"] = sections["training"] | {"steps": 1}
    experiment = Experiment.model_validate({"name": "tuned", "data": rows, **sections})
    sizes = from_hub_config(shape["recipe"]["sizes"]).replace(expert_format=shape["recipe"]["expert_format"])
    config = experiment.model.architecture(sizes)
    return experiment.with_defaults(config), config


def sliced(shape: dict[str, Any]) -> tuple[Experiment, Architecture]:
    """With as few layers as every stack has twice, or as many as there are."""
    experiment, config = whole(shape)
    small = config.replace(vocab_size=min(VOCABULARY, config.vocab_size))
    for depth in DEPTHS:
        less = small.replace(num_layers=min(depth, small.num_layers))
        if all(a.repeats >= min(2, b.repeats) for a, b in zip(less.stacks, small.stacks, strict=False)):
            return experiment, less
    return experiment, small


@cache
def _weights(device: str, asked: str) -> tuple[Any, Any, Any]:
    """graphdef, what is trained (no adapter's B is zero), what is not."""
    import jax
    from flax import nnx

    from moejax.models.build import build as build_model
    from moejax.models.build import random_weights
    from moejax.models.ops import choice

    experiment, config = sliced(json.loads(asked))
    arguments = model_arguments(experiment) | {"platform": device, "memory_bytes": choice.memory_here()}
    model = random_weights(build_model(config, **arguments), jax.random.key(0))
    parts: Any = nnx.split(model, nnx.Param if experiment.adapter is None else nnx.LoRAParam, ...)
    graphdef, trained, frozen = parts
    if experiment.adapter is not None:
        drawn = Drawn(2)
        trained = jax.tree.map(lambda a: drawn.normal(*a.shape, dtype=a.dtype, scale=0.02), trained)
    return graphdef, trained, frozen


def build(device: str, shape: dict[str, Any], entry: dict[str, Any]) -> Any:
    """(tokens, segment ids, their hidden states' gradient) -> hidden states, and gradients of all that is trained."""
    import jax
    from flax import nnx

    from moejax.compiler_options import gpu_options

    graphdef, trained, frozen = _weights(device, json.dumps(shape))

    def run(trained: Any, frozen: Any, tokens: Any, segment_ids: Any, dout: Any) -> Any:
        def hidden(trained: Any) -> Any:
            return nnx.merge(graphdef, trained, frozen)(tokens, segment_ids, remat=entry["policy"])[0]

        out, pull = jax.vjp(hidden, trained)
        return out, jax.tree.leaves(pull(dout))

    step = jax.jit(run, compiler_options=gpu_options() if jax.default_backend() == "gpu" else None)
    return lambda *operands: step(trained, frozen, *operands)


def cases(shape: dict[str, Any]) -> Iterator[Case]:
    """Packed rows (timed), and rows with padding at their end."""
    import jax.numpy as jnp
    import numpy as np

    rows, t, drawn = shape["rows"], shape["length"], Drawn(1)
    _, config = sliced(shape)
    tokens = jnp.asarray(np.random.default_rng(0).integers(1, config.vocab_size, (rows, t), np.int32))
    dout = drawn.normal(rows, t, config.hidden_size, dtype=shape["dtype"])
    at = np.arange(t)
    for name, segments in (("packed rows", at // max(t // 4, 1) + 1), ("padding", np.where(at < t - t // 7, 1, 0))):
        yield Case(name, (tokens, jnp.asarray(np.broadcast_to(segments.astype(np.int32), (rows, t))), dout), name == "packed rows")


def measured(experiment: Experiment, config: Architecture, device: str) -> str | None:
    """The policy that was fastest here for this very model, recipe and shape; None where that was not measured."""
    from moejax.models.ops import choice

    digests = [shape["digest"] for shape in shapes(experiment, config)]
    entries = choice.adopted(device).get("remat", ())
    return next((str(entry["policy"]) for entry in entries if entry["digest"] in digests), None)


def not_slower(policies: tuple[str, ...], fastest: str | None) -> tuple[str, ...]:
    """Of policies from the one that recomputes nothing on, those that `auto` tries: none of which takes more memory than the fastest."""
    assert policies == REMAT_POLICIES[: len(policies)]
    return policies if fastest is None else policies[policies.index(fastest) :]

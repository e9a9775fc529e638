"""Hand an experiment over to PyTorch in a folder: what `train.py` would train, with what, on which batches, from which weights.

experiment.json: the experiment as it is resolved, the architecture, parameter counts, every step's learning rate, and a digest of every
weight as moejax holds it. base/ (or the source's own folder): the initial weights in Hub layout. adapter/: the initial LoRA weights in the
stack's format of PEFT. batches.npz: the batch of every optimizer step, in the order in which moejax trains on them.
"""

from __future__ import annotations

import hashlib
import json
import sys
from itertools import islice
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parent), str(HERE / "pytorch")]

import contract
import jax
import numpy as np
from flax import nnx

from moejax.config import Experiment
from moejax.data.batching import stack
from moejax.data.pipeline import load as load_data
from moejax.data.tokenizer import check_vocabulary, load_tokenizer
from moejax.errors import UserError
from moejax.hub import peft, save, streaming, weights
from moejax.hub.model import architecture, base_folder, create_model, model_arguments
from moejax.hub.names import tensors
from moejax.models.build import Model, build, materialize_lora
from moejax.models.config import Architecture
from moejax.models.ops.quantized import QuantizedTensor
from moejax.training.optimizer import make_schedule
from moejax.training.run_steps import steps_in, total_steps

DIGEST_LIMIT = 2_000_000_000
"""Weights of larger models are not compared one by one: reading them twice would take longer than the runs."""


def write(experiment: Experiment, folder: Path, *, stack_name: str) -> dict[str, Any]:
    """Write the folder; returns experiment.json's content. Raises UserError for what the config gets wrong, and for what `stack_name`
    (one of contract.STACKS) cannot express."""
    source = experiment.model.source
    model_folder = base_folder(experiment)
    config = architecture(experiment, model_folder)
    content = _begin(experiment, config, stack_name)
    folder.mkdir(parents=True, exist_ok=True)
    model = create_model(experiment, config, model_folder)
    base = model_folder
    if base is None:
        base = folder / "base"
        save.save_weights(_unquantized(experiment, config), base, np.float32)
    steps = _write_batches(experiment, model_folder, config.vocab_size, folder / "batches.npz")
    if experiment.adapter is not None:
        peft.save_adapter(model, folder / "adapter", str(base), fused=stack_name == "today")
    content |= _described(model, source or str(experiment.model.preset))
    compared = content["model"]["params_total"] <= DIGEST_LIMIT
    schedule = make_schedule(experiment.training, steps)
    content |= {"base": str(base.resolve()), "steps": steps, "digests": digests(model) if compared else None}
    content["learning_rates"] = [float(schedule(done)) for done in range(steps)]
    (folder / "experiment.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def write_random(experiment: Experiment, folder: Path, *, stack_name: str) -> dict[str, Any]:
    """The same for random weights that each side makes on its device by itself, and one batch: for comparing speed at a real model's
    size without its checkpoint. Raises UserError."""
    config = architecture(experiment, None)
    content = _begin(experiment, config, stack_name)
    folder.mkdir(parents=True, exist_ok=True)
    _write_batches(experiment, None, config.vocab_size, folder / "batches.npz", limit=1)
    arguments = model_arguments(experiment)
    if experiment.adapter is not None:  # PEFT's settings alone: they do not depend on sizes
        small = build(config.replace(num_layers=1, num_experts=1, experts_per_token=1), **arguments)
        name = str(experiment.model.preset)
        peft.save_adapter(materialize_lora(small, jax.random.key(0)), folder / "adapter", name, fused=stack_name == "today")
    model = build(config, **arguments)
    content |= _described(model, str(experiment.model.preset))
    content["shapes"] = {name: streaming.whole_shape(model, places) for name, places in tensors(config).items()}
    content |= {"base": None, "steps": experiment.training.steps, "digests": None, "learning_rates": [experiment.training.learning_rate]}
    (folder / "experiment.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return content


def _begin(experiment: Experiment, config: Architecture, stack_name: str) -> dict[str, Any]:
    resolved = experiment.with_defaults(config).model_dump(mode="json")
    content = {"format": contract.FORMAT, "experiment": resolved, "hub_config": config.to_hub_config()}
    try:
        contract.check(content, stack_name)
    except contract.CannotRun as error:
        raise UserError(str(error)) from None
    return content


def _described(model: Model, name: str) -> dict[str, Any]:
    """What experiment.json says of the model, weights or not."""
    total, active = model.config.parameters
    return {
        "model": {
            "name": name,
            "params_total": total,
            "params_active": active,
            "params_trainable": sum(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param))),
            "experts": model.config.num_experts,
            "experts_per_token": model.config.experts_per_token,
        },
    }


def _unquantized(experiment: Experiment, config: Architecture) -> Model:
    """The random weights of the experiment, before anything is quantized. A frozen base is drawn in the dtype it is kept in."""
    arguments = model_arguments(experiment)
    kept = arguments["param_dtype"] if experiment.adapter is None else arguments["dtype"]
    arguments |= {"quantization": None, "adapter": None, "param_dtype": kept}
    return build(config, key=jax.random.key(experiment.seed), **arguments)


def _write_batches(experiment: Experiment, folder: Path | None, vocabulary: int, path: Path, limit: int | None = None) -> int:
    """Every optimizer step's batch (the first `limit`), as `moejax.training.loop` takes them. Returns the number of steps."""
    tokenizer = None
    if experiment.data.source is not None:
        tokenizer = load_tokenizer(experiment.tokenizer or str(folder), experiment.added_tokens)
        check_vocabulary(tokenizer, vocabulary)
    dataset = load_data(experiment.data, tokenizer, experiment.seed, vocabulary)
    steps, count, arrays, epoch = total_steps(experiment, dataset), experiment.training.gradient_accumulation, {}, 0
    steps = min(steps, limit or steps)
    while (done := len(arrays) // 5) < steps:
        batches = dataset.train.iterate(epoch)
        for number in range(done, min(steps, done + steps_in(experiment, dataset, epoch))):
            batch = stack(list(islice(batches, count)), count)
            arrays |= {f"{number}/{name}": value for name, value in batch._asdict().items()}
        epoch += 1
    np.savez_compressed(path, **arrays)
    return steps


def digests(model: Model) -> dict[str, str]:
    """Hub name -> SHA-256 of the weight: of its fp32 values, or of 4 bits' codes, scales and offset. Both sides must agree on each."""
    found = {}
    for name, places in tensors(model.config).items():
        total = hashlib.sha256()
        for place in places:
            value = getattr(weights.attribute(model, place.path), place.attr).get_value()
            index = tuple(i for i in (place.layer, place.expert) if i is not None) or ...
            if isinstance(value, QuantizedTensor):
                for part in value.part(index).canonical().parts.values():
                    total.update(part.tobytes())
            else:
                total.update(np.ascontiguousarray(value[index], dtype=np.float32).tobytes())
        found[name] = total.hexdigest()
    return found

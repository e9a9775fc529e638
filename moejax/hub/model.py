"""From a config to its model: random weights, or those of a local folder or the Hub."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from moejax import device
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.hub import disk, peft, peft_rows, shards, snapshot, weights
from moejax.hub.buffers import moved
from moejax.hub.disk import Need
from moejax.hub.quantized_cache import Content, leaves_of
from moejax.mesh import Devices
from moejax.models.build import Model, build
from moejax.models.config import Architecture, LoRAConfig, Quantization
from moejax.models.layers import Placement
from moejax.models.ops import host
from moejax.progress import say

CACHED_FROM_BYTES = 1_000_000_000


def architecture(experiment: Experiment, folder: Path | None) -> Architecture:
    """The model's sizes: those of its folder, or of the preset; with the config's overrides."""
    base = weights.read_config(folder, experiment.model.ignored_settings) if folder is not None else None
    try:
        config = experiment.model.architecture(base)
    except ValueError as error:
        raise UserError(f"model: {error}") from None
    if experiment.data.longest_text > config.max_position_embeddings:
        raise UserError(
            f"rows of {experiment.data.longest_text} tokens exceed the model's max_position_embeddings = "
            f"{config.max_position_embeddings}: shorten data.row_tokens or data.max_length"
        )
    try:
        experiment.check_model(config)
    except ValueError as error:
        raise UserError(str(error)) from None
    return config


def adapter_config(experiment: Experiment) -> LoRAConfig | None:
    return None if experiment.adapter is None else experiment.adapter.lora


def quantization_config(experiment: Experiment) -> Quantization | None:
    q = experiment.quantization
    return None if q.format == "none" else Quantization(q.double, q.modules)


def model_arguments(experiment: Experiment) -> dict[str, Any]:
    """Keyword arguments of `moejax.models.build.build` that the experiment fixes. Raises UserError for a placement that is not possible
    here."""
    t, p = experiment.training, experiment.placement
    if p.uses_host:
        try:
            host.sharding()
        except ValueError as error:
            raise UserError(f"placement.experts = {p.experts}, placement.tables = {p.tables}: {error}: set both to device") from None
    return {
        "quantization": quantization_config(experiment),
        "adapter": adapter_config(experiment),
        "dtype": jnp.dtype(t.compute_dtype),
        "param_dtype": jnp.dtype(t.stored_dtype),
        "backend": experiment.model.moe_backend,
        "attention": experiment.model.attention,
        "scan": experiment.model.scan,
        "placement": Placement(p.experts, p.tables, p.prefetch),
    }


def base_folder(experiment: Experiment) -> Path | None:
    """The folder that the weights of `model.source` are read from, fetched as `model.download` says; None without a source.

    Raises UserError as `check_disk`, `weights.resolve` and `shards.fetch` do.
    """
    m = experiment.model
    if m.source is None:
        return None
    small = weights.resolve(m.source, m.revision, weights=False)
    if m.download == "stream" and _is_here(experiment, small):
        return small
    say(*check_disk(experiment, small))
    if m.download == "whole" or Path(m.source).is_dir():
        return weights.resolve(m.source, m.revision)
    model, folder = _to_stream(experiment, small)
    if not shards.is_whole(folder):
        shards.fetch(m.source, small, folder, shards.shards_of(small, snapshot.weight_sizes(m.source, small.name)), model)
    return folder


def check_disk(experiment: Experiment, small: Path) -> list[str]:
    """A line with what the weights that are still to be fetched take of which disk.

    small: the folder of `model.source` without them (`weights.resolve(…, weights=False)`). Raises UserError where they do not fit.
    """
    m, q = experiment.model, experiment.quantization
    if _is_here(experiment, small):
        return []
    if m.download == "stream":
        model, folder = _to_stream(experiment, small)
        if shards.is_whole(folder):
            return []
        sizes = shards.shards_of(small, snapshot.weight_sizes(str(m.source), small.name))
        fetched = (size for name, size in shards.lacking(folder, sizes).items() if not (small / name).is_file())
        kept = shards.kept_bytes(model, sum(sizes.values())) - shards.written_bytes(folder, sizes)
        elsewhere = "quantization.cache=DIR"
        return [disk.told([Need("one shard", max(fetched, default=0), folder, elsewhere), Need("4-bit weights", kept, folder, elsewhere)])]
    try:
        sizes = snapshot.weight_sizes(str(m.source), small.name)
    except UserError:  # `weights.resolve` finds what it can without the Hub, or says what is wrong
        return []
    streamed = ", model.download=stream (a shard at a time)" if q.format != "none" else ""
    missing = sum(size for name, size in sizes.items() if not (small / name).is_file())
    if not missing:
        return []
    needs = [Need("weights", missing, snapshot.hub_cache(), f"HF_HOME=DIR{streamed}")]
    config = architecture(experiment, small)
    if q.format != "none" and q.cache is not None and config.expert_format is None and sum(sizes.values()) >= CACHED_FROM_BYTES:
        model = build(config, **model_arguments(experiment))
        leaves = leaves_of({name: variable.get_value() for name, variable in weights.base_variables(model)}).values()
        kept = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
        needs.append(Need("4-bit weights", kept, Path(q.cache).expanduser(), "quantization.cache=DIR (null: nowhere)"))
    return [disk.told(needs)]


def _is_here(experiment: Experiment, small: Path) -> bool:
    """Whether there is nothing to be fetched, because a user's folder or the Hub's cache holds all weights."""
    return Path(str(experiment.model.source)).is_dir() or weights.files_of(small) is not None


def _to_stream(experiment: Experiment, small: Path) -> tuple[Model, Path]:
    """The base, abstract, and the folder that it is streamed into."""
    m, cache = experiment.model, Path(str(experiment.quantization.cache)).expanduser()
    model = build(architecture(experiment, small), quantization=quantization_config(experiment))
    return model, shards.place(cache, str(m.source), small.name, model)


def create_model(
    experiment: Experiment, config: Architecture, folder: Path | None, content: Content | None = None, devices: Devices | None = None
) -> Model:
    """Weights from `folder` (Hub layout) where there is one, else random from the seed; adapters from the seed.

    content: takes the hash of the folder's weights. devices: a mesh, on which each weight is put from the file where it is to lie; adapters
    are new, and on the first device (`buffers.moved`).
    """
    key = jax.random.key(experiment.seed)
    arguments = model_arguments(experiment)
    if folder is None:
        return build(config, key=key, **arguments)
    model = build(config, **arguments)
    if devices is not None:
        laid_out(model, devices)
    check_host_memory(model)
    cache = experiment.quantization.cache
    # What a small model would save is not worth a file.
    kept = None if cache is None or weights.stored_bytes(folder) < CACHED_FROM_BYTES else Path(cache).expanduser()
    return weights.load_weights(model, folder, key, cache=kept, content=content)


def laid_out(model: Model, devices: Devices) -> None:
    """Give the shapes of an abstract model the places that they have on a mesh. In place."""
    state = nnx.state(model)
    places = devices.of_weights(state)
    nnx.update(model, jax.tree.map(lambda a, place: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=place), state, places))


def placed(model: Model, devices: Devices | None) -> Model:
    """The model, with what does not lie where it is to on a mesh moved there (a new adapter, random weights). In place."""
    if devices is not None:
        state = nnx.state(model)
        nnx.update(model, moved(state, devices.of_weights(state)))
    return model


def check_host_memory(model: Model) -> list[str]:
    """A line on what an abstract model is to hold in the host's memory, where it is to hold anything. Raises UserError where the system has
    not so much available."""
    need, there = host.nbytes(nnx.state(model)), device.host_bytes()
    if not need:
        return []
    if there is not None and need > there[1]:
        raise UserError(
            f"placement: {disk.size(need)} of weights are to lie in the host's memory, and the system has {disk.size(there[1])} "
            f"of {disk.size(there[0])} available: end other processes, set placement.experts=device placement.tables=device, or take a "
            "smaller model"
        )
    of = "" if there is None else f" of {disk.size(there[1])} available"
    return [f"placement: {disk.size(need)}{of} in the host's pinned memory"]


def trained_on(experiment: Experiment, content: str | None = None) -> dict[str, str]:
    """What an adapter's file says of its base: the hash of its weights, and how they were stored. Empty where it is not known.

    content: the hash; None: the one of the experiment's `made_of`.
    """
    platform, made_of = jax.default_backend(), experiment.made_of
    if content is None and made_of is not None and made_of.platform is not None:
        platform, content = made_of.platform, made_of.base
    if content is None:
        return {}
    sizes = experiment.model.model_dump(mode="json", exclude={"source", "revision", "ignored_settings", "experts_per_token"})
    how = [sizes, experiment.quantization.kind, experiment.quantization.modules, experiment.training.param_dtype]
    stored = hashlib.sha256(json.dumps(how, sort_keys=True).encode()).hexdigest()
    return {peft.BASE: content, peft.STORED: f"{platform} {stored[:16]}"}


def continue_adapter(experiment: Experiment, model: Model, source: str | None, content: str | None = None) -> None:
    """The weights of `adapter.init_from`, where it is set, into the model's adapter; the model may be abstract.

    source: the base model by name, which the adapter must be one of; content: the hash of its weights, once they are read. Raises
    UserError.
    """
    a = experiment.adapter
    if a is not None and a.init_from is not None:
        base = trained_on(experiment, content) if content else None
        peft.continue_from(model, weights.resolve(a.init_from, field="adapter.init_from"), source, base)


def with_adapters_rows(experiment: Experiment, vocab_size: int) -> Experiment:
    """The experiment with the rows of tokens that the adapter of `adapter.init_from` trains, where it says none itself.

    vocab_size: rows of the base's embedding.
    """
    a = experiment.adapter
    if a is None or a.init_from is None or a.token_rows is not None:
        return experiment
    folder = weights.resolve(a.init_from, field="adapter.init_from")
    several = peft_rows.ids_of(peft.read_adapter_config(folder), folder / "adapter_config.json").values()
    ids = tuple(sorted({id_ for one in several for id_ in one}))
    if not ids:
        return experiment
    return experiment.changed("adapter", token_rows=ids).changed("model", vocabulary=max(vocab_size, 1 + ids[-1]))


def load(source: str, config: Experiment, devices: Devices | None = None) -> Model:
    """The model of `source`, a local folder or a Hub id (`org/name`, `org/name@REVISION`), as `config` stores, computes and adapts it.

    Its adapter is the one of `adapter.init_from` where that is set, else a new one; rows of tokens that it trains are added to the tables.
    config: what `moejax.config.load(FILE)` gives; its own
    `model.source` does not count, nor, for a local folder, its `model.revision`. devices: the mesh that it is to lie on.
    Raises UserError naming file and tensor for whatever is wrong with the checkpoint or the adapter; an adapter that does not fit before
    weights are read.
    """
    config = config.changed("model", source=source)
    folder = base_folder(config)
    assert folder is not None
    config = with_adapters_rows(config, weights.read_config(folder, config.model.ignored_settings).vocab_size)
    sizes, name = architecture(config, folder), source if Path(source).is_dir() else source.partition("@")[0]
    continue_adapter(config, build(sizes, **model_arguments(config)), name)
    content = Content()
    model = create_model(config, sizes, folder, content, devices)
    continue_adapter(config, model, name, content.value)
    return placed(model, devices)

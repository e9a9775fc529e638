"""From an architecture to a model: initialized, or abstract; frozen, quantized, with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax.models.config import Architecture, LoRAConfig, Quantization
from moejax.models.config.adapters import Pair
from moejax.models.decoder import Decoder
from moejax.models.layers import ON_THE_DEVICE, ExpertLinear, Frozen, Linear, Placement, of_experts
from moejax.models.lora import LoRA
from moejax.models.ops import choice, host
from moejax.models.ops.quantized import abstract, is_quantized, layout, quantize
from moejax.models.ops.split import joined
from moejax.models.token_rows import TokenRows

Model = Decoder


def build(
    config: Architecture,
    *,
    key: jax.Array | None = None,
    quantization: Quantization | None = None,
    adapter: LoRAConfig | None = None,
    dtype: Any = jnp.bfloat16,
    param_dtype: Any = jnp.float32,
    frozen_dtype: Any = None,
    backend: str = "auto",
    attention: str = "auto",
    scan: str = "auto",
    platform: str | None = None,
    memory_bytes: int | None = None,
    placement: Placement = ON_THE_DEVICE,
) -> Model:
    """A model with random weights from `key`; without a key an abstract one (every weight a `jax.ShapeDtypeStruct`).

    With an adapter or a quantization the base is frozen: stored in `frozen_dtype` (default: `dtype`), or in 4 bits where
    `quantization.modules` says so or its checkpoint's experts are, and only the adapter (fp32) is trainable. Otherwise every weight is,
    in `param_dtype`.
    platform, memory_bytes: of the device that it is for, as `choice.here` and `choice.memory_here` say them; None: this one.
    placement: of frozen weights. Raises ValueError where the device has no such memory.
    """
    frozen = adapter is not None or quantization is not None
    base_dtype = (frozen_dtype or dtype) if frozen else param_dtype
    base_key, lora_key = jax.random.split(jax.random.key(0) if key is None else key)

    def base() -> Model:
        return Decoder(
            config, base_key, dtype=dtype, param_dtype=base_dtype, backend=backend, attention=attention, scan=scan, platform=platform,
            memory_bytes=memory_bytes, prefetch=placement.prefetch,
        )  # fmt: skip

    model: Model = nnx.eval_shape(base) if key is None else base()
    if frozen:
        freeze(model, quantization, choice.here() if platform is None else platform)
        place(model, placement)
    if adapter is not None:
        add_lora(model, adapter, None if key is None else lora_key)
    return model


def freeze(model: Model, quantization: Quantization | None, platform: str) -> None:
    """Make every weight `Frozen`, and 4 bits where asked, or where its checkpoint has it so, as they lie on a device (`choice.here`). In
    place; works on abstract models too."""
    kinds = model.config.kinds(*(quantization.kind, quantization.modules) if quantization else (None,))
    modules, laid = _modules_of(model, kinds), layout(platform)
    for _, node in nnx.iter_modules(model):
        module: Any = node
        for name, variable in list(vars(module).items()):
            if isinstance(variable, nnx.Param):
                value, axes = variable.get_value(), variable.get_metadata("axes")
                if name == "weight" and id(module) in modules:
                    kind = modules[id(module)]
                    value = (abstract(kind, value.shape, laid) if isinstance(value, jax.ShapeDtypeStruct) else quantize(kind, value, laid))
                setattr(module, name, Frozen(value, axes=axes))


def place(model: Model, placement: Placement) -> None:
    """Put frozen weights where `placement` has them. In place; of an abstract model the shapes say where the weights are to lie."""
    left = placement.experts if isinstance(placement.experts, int) else 0 if placement.experts == "host" else model.config.blocks
    for stack in model.config.stacks:
        experts = [v for v in _frozen(getattr(model, stack.name)) if of_experts(v)]
        on_device = min(left, stack.repeats)
        for variable in experts:
            variable.set_value(_split(variable.get_value(), on_device))
        left -= on_device if experts else 0
    for variable in _frozen(model):
        if placement.tables == "host" and variable.get_metadata("axes") == ("vocab", "embed"):
            variable.set_value(_in_host(variable.get_value()))


def _frozen(module: nnx.Module) -> list[Frozen]:
    return [v for _, node in nnx.iter_modules(module) for v in vars(node).values() if isinstance(v, Frozen)]


def _split(value: Any, on_device: int) -> Any:
    """A weight [L, …] with its first layers on the device and the others in the host's memory."""
    if on_device == value.shape[0]:
        return value
    if on_device == 0:
        return _in_host(value)

    def layers(first: int, end: int) -> Any:
        def of(a: Any) -> Any:
            return jax.ShapeDtypeStruct((end - first, *a.shape[1:]), a.dtype) if isinstance(a, jax.ShapeDtypeStruct) else a[first:end]

        return jax.tree.map(of, value)

    return joined((layers(0, on_device), _in_host(layers(on_device, value.shape[0]))))


def _in_host(value: Any) -> Any:
    return value.in_host(host.put) if is_quantized(value) else host.put(value)


def remove_lora(model: Model) -> None:
    """Take the adapters off, and trained rows of tokens: what is left is the base. In place."""
    model.embed_rows = model.head_rows = None
    for _, node in list(nnx.iter_modules(model)):
        module: Any = node
        if getattr(module, "lora", None) is not None:
            module.lora = nnx.data(None)


def _modules_of(model: Model, kinds: Mapping[str, str]) -> dict[int, str]:
    """By the module's identity: how it is stored. kinds: by group."""
    groups = model.config.groups
    return {id(_at(model, path)): kind for name, kind in kinds.items() for path in groups.get(name, ())}


def _at(model: Model, path: tuple[str, ...]) -> Any:
    return reduce(getattr, path, model)


def add_lora(model: Model, config: LoRAConfig, key: jax.Array | None) -> None:
    """Put an adapter on every layer that `config.targets` names, and rows of its tokens next to the tables. In place; abstract without a
    key."""
    _add_token_rows(model, config.token_rows)
    for index, (target, pair) in enumerate(sorted(config.of(model.config).items())):
        for number, path in enumerate(model.config.targets[target]):
            module: Linear | ExpertLinear = _at(model, path)
            axes, shape = module.weight.get_metadata("axes"), module.weight.get_value().shape

            def make(k: jax.Array, axes: Any = axes, shape: tuple[int, ...] = shape, pair: Pair = pair) -> LoRA:
                return LoRA(k, shape[:-2], shape[-1], shape[-2], pair, config.dropout, axes)

            k = jax.random.fold_in(jax.random.key(0) if key is None else key, index + 100 * number)
            module.lora = nnx.eval_shape(make, k) if key is None else make(k)


def _add_token_rows(model: Model, ids: tuple[int, ...]) -> None:
    """Rows of these tokens, as the tables have them now, next to embedding and head; one set for both where they are tied. In place."""
    if ids:
        model.embed_rows = TokenRows(ids, model.embed.weight.get_value())
        model.head_rows = None if model.config.tie_word_embeddings else TokenRows(ids, model.head.weight.get_value())


def materialize_lora(model: Model, key: jax.Array) -> Model:
    """Draw the adapters of an abstract model as `build` draws them for the same key; rows of tokens begin as the tables have them. In
    place; returns the model."""
    if model.embed_rows is not None:
        _add_token_rows(model, model.embed_rows.ids)
    lora_key = jax.random.split(key)[1]
    adapters = {target: _at(model, paths[0]).lora for target, paths in model.config.targets.items()}
    there = {target: lora for target, lora in adapters.items() if lora is not None}
    if there:
        pairs = {target: lora.pair() for target, lora in there.items()}
        ranks, alphas = ({target: getattr(pair, name) for target, pair in pairs.items()} for name in ("rank", "alpha"))
        share = tuple(name for target, pair in pairs.items() if pair.shares is not None for name in (pair.shares, target))
        add_lora(model, LoRAConfig(ranks, alphas, next(iter(there.values())).dropout, tuple(there), share or None), lora_key)
    return model


def random_weights(model: Model, key: jax.Array) -> Model:
    """An abstract model filled with random weights made where it runs: for hardware studies, where only sizes matter.

    Of 4-bit weights the codes are; scales are such that weights have the standard deviation of an initialized model. The B of an adapter is
    zero.
    """
    graphdef, state = nnx.split(model)
    leaves, treedef = jax.tree_util.tree_flatten_with_path(state, is_leaf=is_quantized)
    keys = jax.random.split(key, len(leaves))

    def fill(path: Any, leaf: Any, k: jax.Array) -> Any:
        if is_quantized(leaf):
            return leaf.random(k)
        name = jax.tree_util.keystr(path)
        if "norm" in name or "['lora']['b']" in name:
            return jnp.full(leaf.shape, "norm" in name, leaf.dtype)
        return (0.02 * jax.random.normal(k, leaf.shape, jnp.float32)).astype(leaf.dtype)

    def make(keys: jax.Array) -> list[Any]:
        return [None if host.nbytes(leaf) else fill(path, leaf, k) for (path, leaf), k in zip(leaves, keys, strict=True)]

    made = zip(leaves, jax.jit(make)(keys), keys, strict=True)
    values = [_random_in_host(leaf, k) if value is None else value for (_, leaf), value, k in made]
    return nnx.merge(graphdef, jax.tree_util.tree_unflatten(treedef, values))


def _random_in_host(leaf: Any, key: jax.Array) -> Any:
    """The same for what is to lie in the host's memory: of a stack, one layer at a time is on the device."""

    def draw(shape: tuple[int, ...], k: jax.Array) -> Any:
        if is_quantized(leaf):
            return abstract(leaf.kind, shape, leaf.layout).random(k)
        return (0.02 * jax.random.normal(k, shape, jnp.float32)).astype(leaf.dtype)

    if leaf.ndim == 2:
        return host.put(draw(leaf.shape, key))
    parts, treedef = jax.tree.flatten(leaf)
    places = [host.empty(p.shape, p.dtype) if host.is_host(p) else (None, np.empty(p.shape, p.dtype)) for p in parts]
    of_layer = jax.jit(partial(draw, leaf.shape[1:]))
    for layer, k in enumerate(jax.random.split(key, leaf.shape[0])):
        for (_, view), part in zip(places, jax.tree.leaves(of_layer(k)), strict=True):
            view[layer] = np.asarray(part)
    return jax.tree.unflatten(treedef, [jnp.asarray(view) if array is None else array for array, view in places])

"""Trained rows of tokens in an adapter of PEFT's: LoRA's `trainable_token_indices`, which PEFT reads from 0.15 on.

Of each table the file holds the rows themselves, in the order of the ids in adapter_config.json. Where embedding and head are tied, the
embedding's alone are there, and PEFT puts them into both.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moejax.errors import UserError
from moejax.hub.names import modules
from moejax.models.build import Model
from moejax.models.token_rows import TokenRows

KEY = "trainable_token_indices"
_PREFIX, _ROWS = "base_model.model.", ".token_adapter.trainable_tokens_delta"
_ORIGINAL, _TABLES = ".token_adapter.trainable_tokens_original", (".token_adapter.base_layer.weight", ".weight")


def _tables(model: Model) -> dict[str, tuple[TokenRows | None, Any]]:
    """What the checkpoint calls embedding and head -> their trained rows, and the variable of the whole."""
    places = {place.path: name for name, place in modules(model.config).items() if place.layer is None}
    found = {places["embed",]: (model.embed_rows, model.embed.weight)}
    return found if model.config.tie_word_embeddings else found | {places["head",]: (model.head_rows, model.head.weight)}


def of_model(model: Model) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """(tensors, settings) of a model's trained rows; nothing where it has none."""
    tables = {name: rows for name, (rows, _) in _tables(model).items() if rows is not None}
    tensors = {f"{_PREFIX}{name}{_ROWS}": np.ascontiguousarray(rows.rows.get_value()) for name, rows in tables.items()}
    return tensors, {KEY: {name.rpartition(".")[2]: list(rows.ids) for name, rows in tables.items()}} if tables else {}


def ids_of(config: dict[str, Any], path: Path) -> dict[str, list[int]]:
    """Last part of a table's name -> the ids whose rows an adapter_config.json says are trained; a list is the embedding's. Raises
    UserError for anything else."""
    given = config.get(KEY)
    found = {"embed_tokens": given} if isinstance(given, list) else given or {}
    lists = found.values() if isinstance(found, dict) else [None]
    if not all(isinstance(ids, list) and ids and all(type(id_) is int and id_ >= 0 for id_ in ids) for ids in lists):
        raise UserError(f"{path} has {KEY} = {json.dumps(given)}: expected a list of ids, or one for each table by its name")
    return {name.rpartition(".")[2]: ids for name, ids in found.items()}


def take(model: Model, tensors: dict[str, np.ndarray], config: dict[str, Any], path: Path) -> list[tuple[Any, np.ndarray]]:
    """The variables of a model's trained rows and their values; what belongs to them is taken out of `tensors`.

    A head whose rows PEFT did not train keeps its own. Tables that PEFT wrote whole, as it does where the base was enlarged, must be the
    base's own (not judged where the model is abstract). Raises UserError where the file has other rows than the model.
    """
    given, tables, found = ids_of(config, path), _tables(model), []
    last = {name.rpartition(".")[2]: name for name in tables}
    tied_head = model.config.tie_word_embeddings and given.get("lm_head") == given.get("embed_tokens")
    strange = sorted(given.keys() - last.keys() - ({"lm_head"} if tied_head else set()))
    if strange:
        raise UserError(f"{path} trains rows of {strange[0]}: expected {' or '.join(last)}")
    theirs = sorted({id_ for ids in given.values() for id_ in ids})
    ours = [] if model.embed_rows is None else list(model.embed_rows.ids)
    if theirs != ours or any(sorted(ids) != theirs for ids in given.values()):
        raise UserError(
            f"{path} trains {_named(theirs)}; the model's adapter {_named(ours)}: set added_tokens, or adapter.token_rows, to the adapter's"
        )
    tied = [name.removesuffix(".weight") for name in model.config.names.unread if model.config.tie_word_embeddings]
    for name in tied:  # a copy of the embedding's, if PEFT wrote tables whole
        tensors.pop(f"{_PREFIX}{name}{_ROWS}", None)
    for name, table in (dict.fromkeys(tied, model.embed.weight) | {name: table for name, (_, table) in tables.items()}).items():
        tensors.pop(f"{_PREFIX}{name}{_ORIGINAL}", None)
        for tail in _TABLES:
            _check_table(tensors.pop(f"{_PREFIX}{name}{tail}", None), table, model, f"{path}: tensor {_PREFIX + name + tail!r}")
    for short, name in last.items():
        rows, value = tables[name][0], tensors.pop(f"{_PREFIX}{name}{_ROWS}", None)
        if rows is None or short not in given:
            continue
        if value is None or value.shape != (len(theirs), model.config.hidden_size) or not np.isfinite(value.astype(np.float32)).all():
            what = "is missing" if value is None else f"has shape {list(value.shape)}, or numbers that are not finite"
            raise UserError(f"{path}: tensor {_PREFIX + name + _ROWS!r} {what}: expected {[len(theirs), model.config.hidden_size]}")
        found.append((rows.rows, value[np.argsort(given[short])].astype(np.float32)))
    return found


def _named(ids: list[int]) -> str:
    return f"the rows of tokens {ids}" if ids else "no rows of tokens"


def _check_table(value: np.ndarray | None, variable: Any, model: Model, where: str) -> None:
    """Whether a whole table is the base's, but for the rows that the base lacks and those that are trained."""
    table = variable.get_value()
    if value is None or isinstance(table, jax.ShapeDtypeStruct):
        return
    own = model.config.vocab_size - model.config.new_rows
    kept = np.setdiff1d(np.arange(own), [] if model.embed_rows is None else model.embed_rows.ids)
    if value.shape != table.shape or not np.array_equal(np.asarray(jnp.asarray(value).astype(table.dtype))[kept], np.asarray(table)[kept]):
        raise UserError(f"{where} is another table than the base's: rows of single tokens are read, not a table that was trained whole")

"""Greedy and sampled decoding of a batch of prompts with the cache: a prefill, and then any number of steps in one compiled program."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from moejax import processes
from moejax.compiler_options import jit
from moejax.data.ends import Ends
from moejax.errors import UserError
from moejax.mesh import ROWS, WHOLE, Devices, of_model
from moejax.models.build import Model
from moejax.models.cache import Cache, decode_step, init_cache, prefill
from moejax.models.config import Architecture
from moejax.models.ops.spread import AXIS

End = int | Sequence[int]  # the token, or the tokens, that end an answer
CHECKED = 16  # tokens between two questions whether every answer has stopped
SHORTEST = 16  # prompts are padded to this length times a power of two: one compile for all lengths of such a bucket


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen. temperature 0: the likeliest. top_k, then top_p, leave only the likeliest to be drawn from.

    Raises UserError for a value outside its range.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature = {self.temperature}: expected 0 (always the likeliest token) or a positive number")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p = {self.top_p}: expected 0 < top_p <= 1 (1 leaves every token)")
        if self.top_k is not None and self.top_k < 1:
            raise UserError(f"top_k = {self.top_k}: expected at least 1 (leave it out for every token)")
        if not 0 <= self.seed < 2**32:
            raise UserError(f"seed = {self.seed}: expected 0 <= seed < 2**32")


class Draw(NamedTuple):
    """Sampling as arrays: a change of them compiles nothing again. keys: [B], one per row."""

    temperature: jax.Array
    top_p: jax.Array
    top_k: jax.Array
    keys: jax.Array


def candidates(logits: jax.Array, top_p: jax.Array | float, top_k: jax.Array | int) -> tuple[jax.Array, jax.Array]:
    """ids int32 [B, V], likeliest first, and their logits [B, V]: -inf beyond the first top_k, and beyond the fewest of those that
    together have at least the share top_p. Of equal logits the lower id comes first."""
    ids = jnp.argsort(-logits, axis=-1, stable=True).astype(jnp.int32)
    ranked = jnp.take_along_axis(logits, ids, axis=-1)
    ranked = jnp.where(jnp.arange(logits.shape[-1]) < top_k, ranked, -jnp.inf)
    shares = jax.nn.softmax(ranked, axis=-1)
    before = jnp.cumsum(shares, axis=-1) - shares
    # The sum may round to 1 before the last token: top_p = 1 must not depend on it.
    return ids, jnp.where((before < top_p) | (jnp.asarray(top_p) >= 1), ranked, -jnp.inf)


def _choose(logits: jax.Array, step: jax.Array | int, draw: Draw | None) -> jax.Array:
    """int32 [B]: each row's token number `step` of its answer."""
    if draw is None:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    scaled = (logits - logits.max(axis=-1, keepdims=True)) / draw.temperature  # at most 0: no overflow at low temperatures
    ids, kept = candidates(scaled, draw.top_p, draw.top_k)
    drawn = jax.vmap(lambda key, row: jax.random.categorical(jax.random.fold_in(key, step), row))(draw.keys, kept)
    return jnp.take_along_axis(ids, drawn[:, None], axis=-1)[:, 0]


def _of_cache(devices: Devices, cache: Cache) -> Cache:
    """Where each device has a part of the sequences."""
    return Cache(devices.of_rows(cache.layers, 1), devices.of_rows(cache.lengths))


def _of_draw(devices: Devices, draw: Draw | None) -> Draw | None:
    return None if draw is None else devices.whole(draw)._replace(keys=devices.of_rows(draw.keys))  # type: ignore[no-any-return]


def _specs(places: Any) -> Any:
    return jax.tree.map(lambda place: place.spec, places)


@partial(jit, static_argnums=(0, 6, 8), donate_argnums=4)
def _begin(
    graphdef: Any,
    state: nnx.State,
    tokens: jax.Array,
    lengths: jax.Array,
    cache: Cache,
    draw: Draw | None,
    steps: int,
    end: jax.Array,
    devices: Devices | None,
) -> tuple[jax.Array, Cache]:
    """Answers int32 [B, steps] to prompts of which the cache holds all before `tokens`: the first tokens, then the first of the end
    tokens [M]; and the cache. devices: each has a part of the rows."""

    def begin(
        state: nnx.State, tokens: jax.Array, lengths: jax.Array, cache: Cache, draw: Draw | None, end: jax.Array
    ) -> tuple[jax.Array, Cache]:
        model: Model = nnx.merge(graphdef, state)
        logits, cache = prefill(model, tokens, lengths, cache)
        return jnp.full((tokens.shape[0], steps), end[0]).at[:, 0].set(_choose(logits, 0, draw)), cache

    operands = state, tokens, lengths, cache, draw, end
    if devices is None:
        return begin(*operands)
    rows, held = devices.of_rows((tokens, lengths)), _of_cache(devices, cache)
    places = (devices.of_weights(state), *rows, held, _of_draw(devices, draw), None)
    found: tuple[jax.Array, Cache] = devices.over_rows(begin, places, (ROWS, _specs(held)), *operands)
    return found


@partial(jit, static_argnums=(0, 8), donate_argnums=(2, 3))
def _go_on(
    graphdef: Any,
    state: nnx.State,
    out: jax.Array,
    cache: Cache,
    step: jax.Array,
    until: jax.Array,
    draw: Draw | None,
    end: jax.Array,
    devices: Devices | None,
) -> tuple[jax.Array, Cache, jax.Array]:
    """Tokens `step` … `until` - 1 of the answers, fewer where all rows have come to one of the end tokens [M], which then only repeats.
    Returns answers, cache and the number of the next token."""

    def go_on(
        state: nnx.State, out: jax.Array, cache: Cache, step: jax.Array, until: jax.Array, draw: Draw | None, end: jax.Array
    ) -> tuple[jax.Array, Cache, jax.Array]:
        model: Model = nnx.merge(graphdef, state)

        def unfinished(carry: tuple[jax.Array, jax.Array, jax.Array, Cache]) -> jax.Array:
            step, token, _, _ = carry
            ended = jnp.all(jnp.isin(token, end))
            # Each goes on until all are done: they share their weights' way.
            ended = ended if devices is None else jax.lax.pmin(ended.astype(jnp.int32), AXIS) > 0
            return (step < until) & ~ended

        def body(carry: tuple[jax.Array, jax.Array, jax.Array, Cache]) -> tuple[jax.Array, jax.Array, jax.Array, Cache]:
            step, token, out, cache = carry
            logits, cache = decode_step(model, token, cache)
            following = jnp.where(jnp.isin(token, end), token, _choose(logits, step, draw))
            return step + 1, following, out.at[:, step].set(following), cache

        step, _, out, cache = jax.lax.while_loop(unfinished, body, (step, out[:, step - 1], out, cache))
        return out, cache, step

    operands = state, out, cache, step, until, draw, end
    if devices is None:
        return go_on(*operands)
    held = _of_cache(devices, cache)
    places = (devices.of_weights(state), devices.of_rows(out), held, None, None, _of_draw(devices, draw), None)
    found: tuple[jax.Array, Cache, jax.Array] = devices.over_rows(go_on, places, (ROWS, _specs(held), WHOLE), *operands)
    return found


def padded_length(config: Architecture, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> int:
    """The length that the prompts are padded to. Raises UserError for an empty prompt, and where they exceed the positions."""
    if any(not p for p in prompts):
        raise UserError(f"prompt {next(i for i, p in enumerate(prompts) if not p)} is empty: there is nothing to continue")
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens = {max_new_tokens}: expected at least 1")
    longest = max((len(p) for p in prompts), default=1)
    if longest + max_new_tokens > config.max_position_embeddings:
        raise UserError(
            f"prompts of up to {longest} tokens and {max_new_tokens} new ones exceed the model's "
            f"{config.max_position_embeddings} positions: shorten the prompt or ask for fewer new tokens"
        )
    return bucket(longest)


def bucket(length: int) -> int:
    """The length that a sequence is padded to: 16, 32, 64, …"""
    return max(SHORTEST, 1 << (length - 1).bit_length())


def in_groups(keys: Sequence[Any], rows: int) -> list[list[int]]:
    """Indices in batches of at most `rows` of one key, the largest key first: what memory does not hold fails early."""
    groups: dict[Any, list[int]] = {}
    for index, key in enumerate(keys):
        groups.setdefault(key, []).append(index)
    return [group[at : at + rows] for _, group in sorted(groups.items(), reverse=True) for at in range(0, len(group), rows)]


def padded(prompts: Sequence[Sequence[int]], length: int) -> tuple[np.ndarray, np.ndarray]:
    tokens = np.zeros((len(prompts), length), np.int32)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = prompt
    return tokens, np.array([len(p) for p in prompts], np.int32)


def names_of(prompts: Sequence[Sequence[int]]) -> np.ndarray:
    """uint32 [B, 2]: a checksum of each prompt, and how many equal ones stand before it.

    Keys come from these and not from the row's number: a prompt's answer is the same whatever shares its batch, and the copies of
    one prompt get different answers.
    """
    seen: Counter[tuple[int, ...]] = Counter()
    names = np.zeros((len(prompts), 2), np.uint32)
    for row, prompt in enumerate(prompts):
        names[row] = zlib.crc32(np.asarray(prompt, "<i4").tobytes()), seen[tuple(prompt)]
        seen[tuple(prompt)] += 1
    return names


def draw_of(model: Model, sampling: Sampling, names: np.ndarray) -> Draw | None:
    if sampling.temperature == 0:
        return None
    key = jax.random.key(sampling.seed)
    keys = jax.vmap(lambda name: jax.random.fold_in(jax.random.fold_in(key, name[0]), name[1]))(jnp.asarray(names))
    top_k = min(sampling.top_k or model.config.vocab_size, model.config.vocab_size)
    return Draw(jnp.float32(sampling.temperature), jnp.float32(sampling.top_p), jnp.int32(top_k), keys)


def generate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end: End,
    batch_size: int = 64,
    sampling: Sampling = Sampling(),
    stopped: Callable[[int, list[int]], bool] | None = None,
    progress: Callable[[int, int], None] = lambda done, count: None,
) -> list[list[int]]:
    """Continuations of token-id prompts, each cut before its end token. Prompts of one `bucket` of lengths share a batch.

    end: a token, or several of which each ends an answer. A batch is done when each of its rows has come to its end token, or
    `stopped(prompt's number, its tokens so far)`, which is asked every CHECKED tokens: an answer may then go on behind what stopped it.
    progress(done, all) is called after each batch. Raises UserError for an empty prompt, and where prompt and answer exceed the model's
    positions.
    """
    padded_length(model.config, prompts, max_new_tokens)
    names, size, done = names_of(prompts), min(batch_size, len(prompts)), 0
    devices = of_model(nnx.state(model))
    size = size if devices is None else devices.whole_rows(size)
    answers: list[list[int]] = [[] for _ in prompts]
    piece = max_new_tokens if stopped is None else CHECKED
    for chosen in in_groups([bucket(len(p)) for p in prompts], batch_size):
        rows = chosen + [chosen[-1]] * (size - len(chosen))  # one program for a bucket; the copies end when their row does
        draw = draw_of(model, sampling, names[rows])
        unfinished = set(chosen)
        for out in _decode(model, [prompts[i] for i in rows], bucket(len(prompts[chosen[0]])), draw, max_new_tokens, end, piece):
            for index, row in zip(chosen, out, strict=False):
                answers[index] = before(row, end)
            if stopped is not None:
                unfinished = {i for i in unfinished if len(answers[i]) == out.shape[1] and not stopped(i, answers[i])}
                if not unfinished:
                    break
        done += len(chosen)
        progress(done, len(prompts))
    return answers


def stream(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    end: End,
    sampling: Sampling = Sampling(),
    piece: int = 4,
) -> Iterator[np.ndarray]:
    """The tokens of `generate` unchanged, all prompts in one batch: int32 [B, 1], then [B, up to `piece`]; after a row's end
    token, only that token. Everything is compiled before the first piece. Raises UserError as `generate` does."""
    length, devices = padded_length(model.config, prompts, max_new_tokens), of_model(nnx.state(model))
    more = 0 if devices is None else devices.whole_rows(len(prompts)) - len(prompts)
    rows = [*range(len(prompts)), *[len(prompts) - 1] * more]  # the copies end when their row does
    draw, shown = draw_of(model, sampling, names_of(prompts)[rows]), 0
    for out in _decode(model, [prompts[i] for i in rows], length, draw, max_new_tokens, end, piece):
        yield out[: len(prompts), shown:]
        shown = out.shape[1]


def _decode(
    model: Model, prompts: Sequence[Sequence[int]], length: int, draw: Draw | None, steps: int, end: End, piece: int
) -> Iterator[np.ndarray]:
    """All tokens so far, after the first one and then after every `piece` more: int32 [B, 1 …]. Ends when all rows have."""
    tokens, lengths = padded(prompts, length)
    cache = _empty_cache(model, len(prompts), length + steps)
    for so_far, _ in decoded(nnx.split(model), tokens, lengths, cache, draw, steps, end, piece):
        yield so_far


def _empty_cache(model: Model, rows: int, length: int) -> Cache:
    """`init_cache`, where the model's devices have their rows of it."""
    devices = of_model(nnx.state(model))
    if devices is None:
        return init_cache(model, rows, length)
    shapes: Cache = jax.eval_shape(lambda: init_cache(model, rows, length))
    return jax.tree.map(lambda a, place: jnp.zeros(a.shape, a.dtype, device=place), shapes, _of_cache(devices, shapes))


def decoded(
    model: tuple[Any, nnx.State],
    tokens: np.ndarray,
    lengths: np.ndarray,
    cache: Cache,
    draw: Draw | None,
    steps: int,
    end: End,
    piece: int,
) -> Iterator[tuple[np.ndarray, Cache]]:
    """The same, of prompts that go on behind what the cache holds; and the cache, which the next piece takes away. It holds the prompts
    and their answers but for each last token. model: as nnx.split has it; tokens int32 [B, T], right-padded; lengths int32 [B]."""
    ends = _array(end)
    devices = _over(model[1], tokens)
    out, cache = _begin(*model, tokens, lengths, cache, draw, steps, ends, devices)
    step, until = jnp.int32(1), 1
    while True:
        if steps > 1:  # the first call decodes nothing: it compiles what the later ones run
            out, cache, step = _go_on(*model, out, cache, step, jnp.int32(until), draw, ends, devices)
        so_far = processes.everywhere(out)[:, :until]
        yield so_far, cache
        if until == steps or np.isin(so_far, ends).any(axis=1).all():
            return
        until = min(until + piece, steps)


def read(
    model: tuple[Any, nnx.State], tokens: np.ndarray, lengths: np.ndarray, cache: Cache, draw: Draw | None, steps: int, end: End
) -> Cache:
    """The cache with tokens behind which others of their prompts follow, by the program that `decoded` begins with."""
    return _begin(*model, tokens, lengths, cache, draw, steps, _array(end), _over(model[1], tokens))[1]


def _over(state: nnx.State, tokens: np.ndarray) -> Devices | None:
    """The model's mesh, where its devices divide the rows; else each device computes all of them, as the compiler has it."""
    devices = of_model(state)
    return None if devices is None or len(tokens) % devices.count else devices


def _array(end: End) -> np.ndarray:
    return np.atleast_1d(np.asarray(end, np.int32))


def before(tokens: np.ndarray, end: End) -> list[int]:
    """The tokens of a row that stand before its end token."""
    kept: list[int] = tokens.tolist()
    places = np.flatnonzero(np.isin(tokens, end))
    return kept[: places[0]] if places.size else kept


def cut(text: str, stops: Sequence[str]) -> tuple[str, bool]:
    """The text before the first stop string, and whether there was one."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


def said(tokenizer: Any, tokens: Sequence[int], ends: Ends, stops: Sequence[str] = ()) -> tuple[str, bool]:
    """An answer's text up to the first stop string or what ends it as a text, and whether there was one."""
    return cut(tokenizer.decode(tokens, skip_special_tokens=True), [*stops, *([ends.text] if ends.text else [])])


class Answers:
    """What has come of each prompt's answer."""

    def __init__(self, tokenizer: Any, stops: Sequence[str], prompts: int, ends: Ends) -> None:
        self.tokenizer, self.stops, self.ends = tokenizer, [*stops, *([ends.text] if ends.text else [])], ends.ids
        self.tokens: list[list[int]] = [[] for _ in range(prompts)]
        self.ended = [False] * prompts

    def add(self, piece: np.ndarray) -> None:
        for row, tokens in enumerate(piece):
            if not self.ended[row]:
                kept = before(tokens, self.ends)
                self.tokens[row] += kept
                self.ended[row] = len(kept) < len(tokens) or self.text(row)[1]

    def text(self, row: int) -> tuple[str, bool]:
        """An answer up to the first stop string, and whether there was one."""
        return cut(self.tokenizer.decode(self.tokens[row], skip_special_tokens=True), self.stops)

    def finished(self) -> bool:
        return all(self.ended)

    def count(self) -> int:
        return sum(map(len, self.tokens))

    def certain(self, shown: int) -> str:
        """What of the first answer is certain behind the `shown` characters."""
        text, stopped = self.text(0)
        certain = len(text)
        if not stopped:  # a character of several tokens may be incomplete, and a stop string may have begun
            certain = len(text.rstrip("\ufffd"))
            begun = [n for stop in self.stops for n in range(1, len(stop)) if text.endswith(stop[:n])]
            certain = min(certain, len(text) - max(begun, default=0))
        return text[shown:certain]

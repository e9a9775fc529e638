"""The architecture on one page.

    x = embed(tokens)
    for every block:  x += mixer(norm(x));  x += feed_forward(norm(x))        (or, as the block says, norm(mixer(x)) …)
    logits = head(norm(x))

What a block is, the architecture's specs say (`moejax.models.config.specs`). Equal blocks are one module whose weights are stacked
[L, …]; `jax.lax.scan` runs them, each body recomputed in the backward pass if `remat` says so.
"""

from __future__ import annotations

import math
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from moejax.models.attention import Attention
from moejax.models.config import Architecture, specs
from moejax.models.gradient_sums import GradientSums, added, layer_in_place, marked, settled, trained, without_gradients
from moejax.models.layers import (
    STREAM_NAME,
    Embedding,
    LayerNorm,
    Linear,
    RMSNorm,
    Stretch,
    Target,
    fold,
    rematerialized,
    scannable,
    stack_layers,
)
from moejax.models.mamba import Mamba
from moejax.models.mla import LatentAttention
from moejax.models.mlp import MLP
from moejax.models.moe import MoE, RouterStats
from moejax.models.ops import linear
from moejax.models.ops.choice import here, memory_here
from moejax.models.token_rows import TokenRows


def mixer_class(spec: specs.Mixer) -> type[Attention] | type[LatentAttention] | type[Mamba]:
    match spec:
        case specs.GQA():
            return Attention
        case specs.MLA():
            return LatentAttention
        case specs.Mamba():
            return Mamba
        case _:
            assert_never(spec)


def feed_forward_class(spec: specs.FeedForward) -> type[MoE] | type[MLP]:
    match spec:
        case specs.MoE():
            return MoE
        case specs.MLP():
            return MLP
        case _:
            assert_never(spec)


class Layer(nnx.Module):
    """x += mixer(norm(x)); x += feed_forward(norm(x)); or with the norms after: x += norm(mixer(x)); x += norm(feed_forward(x)).

    x: [B, T, D], rounded to `compute` before each half where the stream is fp32.

    Of A micro-batches at once, [A, B, T, D], with as many dropout keys: the mixer takes one after the other, so that it needs no more
    memory than for one, the feed-forward all rows together, so that each of the experts' matrices is dequantized once.
    """

    def __init__(self, key: jax.Array, block: specs.Block, config: Architecture, dtype: Any, compute: Any, target: Target):
        keys = jax.random.split(key)
        size, eps = config.hidden_size, config.stream.norm_eps
        mixer: Any = mixer_class(block.mixer)
        feed_forward: Any = feed_forward_class(block.feed_forward)
        self.mixer, self.feed_forward = block.mixer.module, block.feed_forward.module  # the attributes are called by what they are
        setattr(self, f"{self.mixer}_norm", RMSNorm(size, eps, dtype))
        setattr(self, self.mixer, mixer(keys[0], block.mixer, config, dtype, target))
        setattr(self, f"{self.feed_forward}_norm", RMSNorm(size, eps, dtype))
        setattr(self, self.feed_forward, feed_forward(keys[1], block.feed_forward, config, dtype, target))
        self.compute, self.norm_after, self.lean = compute, block.norm == "after", lean(target.platform)

    def mixed(
        self, x: jax.Array, segment_ids: jax.Array, positions: jax.Array | None, dropout_key: jax.Array | None, remat: str,
        window: jax.Array | None = None,
    ) -> jax.Array:  # fmt: skip
        """The stream after the first half. window: int32, how far this block attends, where the stack has windows."""
        mixer, more = getattr(self, self.mixer), () if window is None else (window,)

        def half(x: jax.Array, segment_ids: jax.Array, positions: jax.Array | None, dropout_key: jax.Array | None) -> jax.Array:
            return self._added(x, mixer(self._read(x, self.mixer), segment_ids, positions, dropout_key, *more), self.mixer)

        of_many = x.ndim == 4
        by_itself = of_many or mixer.splits_recomputation
        # Not before its own gradient: attention's arrays would stand next to the experts'.
        one = rematerialized(half, remat, apart=not of_many) if of_many or (by_itself and self._apart(x)) else half
        operands = x, segment_ids, positions, dropout_key
        x = jax.lax.map(lambda micro: one(*micro), operands) if of_many else one(*operands)
        return checkpoint_name(x, "halfway") if by_itself and not self.norm_after else x

    def _apart(self, x: jax.Array) -> bool:
        """Whether the first half is recomputed after the second's gradient: not where all experts' matrices are there at once, which take
        more than what that would save, and launches are what counts."""
        experts, rows = getattr(self, self.feed_forward), math.prod(x.shape[:-1])
        at_once = isinstance(experts, MoE) and experts.plan(rows, x.shape[-1], x.dtype).backend == "capacity"
        return self.lean and not at_once

    def fed_forward(
        self, x: jax.Array, valid: jax.Array, dropout_key: jax.Array | None, keep: bool
    ) -> tuple[jax.Array, RouterStats | None]:
        """The stream after the second half. keep: the experts' hidden rows are saved for the backward pass."""
        rows = self._read(x, self.feed_forward).reshape(-1, x.shape[-1])
        micro_batches = x.shape[0] if x.ndim == 4 else None
        feed_forward = getattr(self, self.feed_forward)
        out, stats = feed_forward(rows, valid.reshape(-1), dropout_key, keep=keep, micro_batches=micro_batches)
        return self._added(x, out.reshape(x.shape), self.feed_forward), stats

    def cached(
        self, x: jax.Array, valid: jax.Array, positions: jax.Array, cache: Any, number: jax.Array, window: jax.Array | None = None
    ) -> tuple[jax.Array, Any]:
        """The same layer, `number` of its stack, for tokens [B, T] that follow what the cache holds. Returns the cache of all layers."""
        more = () if window is None else (window,)
        out, cache = getattr(self, self.mixer).cached(self._read(x, self.mixer), valid, positions, cache, number, *more)
        return self.fed_forward(self._added(x, out, self.mixer), valid, None, False)[0], cache

    def _read(self, x: jax.Array, half: str) -> jax.Array:
        """What a half is given of the stream."""
        norm: RMSNorm = getattr(self, f"{half}_norm")
        return x.astype(self.compute) if self.norm_after else norm(x.astype(self.compute))

    def _added(self, x: jax.Array, out: jax.Array, half: str) -> jax.Array:
        """The stream with what a half computed. A norm of that needs it in the backward pass: it is kept, so that neither the attention
        nor w2 has to be done again for it."""
        norm: RMSNorm = getattr(self, f"{half}_norm")
        return x + (norm(checkpoint_name(out, "halfway")) if self.norm_after else out).astype(x.dtype)


class Decoder(nnx.Module):
    """tokens [B, T] -> hidden states [B, T, D]; `logits` (or the chunked loss) maps those to the vocabulary.

    dtype: what is computed in. param_dtype: what weights are stored in. platform: what the program is compiled for.
    """

    layers: Any
    """The stack of that name: every family here has it."""

    def __init__(
        self,
        config: Architecture,
        key: jax.Array,
        *,
        dtype: Any,
        param_dtype: Any,
        backend: str = "auto",
        attention: str = "auto",
        scan: str = "auto",
        platform: str | None = None,
        memory_bytes: int | None = None,
        prefetch: str = "auto",
    ):
        keys = jax.random.split(key, 3)
        device = (here(), memory_here()) if platform is None else (platform, memory_bytes)
        target = Target(backend, *device, attention, prefetch, scan)
        self.config, self.dtype, size = config, jnp.dtype(dtype), config.hidden_size
        self.embed = Embedding(keys[0], config.vocab_size, size, param_dtype)
        for number, stack in enumerate(config.stacks):

            def make(k: jax.Array, block: specs.Block = stack.block) -> Layer:
                return Layer(k, block, config, param_dtype, self.dtype, target)

            stack_key = keys[1] if number == 0 else jax.random.fold_in(keys[1], number)
            setattr(self, stack.name, stack_layers(make, stack_key, stack.repeats))
        norm = {"rms": RMSNorm, "layer": LayerNorm}[config.stream.final_norm]
        self.norm = norm(size, config.stream.norm_eps, param_dtype)
        if not config.tie_word_embeddings:
            self.head = Linear(keys[2], size, config.vocab_size, param_dtype, scope="head_dequant", axes=("vocab", "embed"))
        self.embed_rows: TokenRows | None = nnx.data(None)
        self.head_rows: TokenRows | None = nnx.data(None)
        self.gradient_sums: GradientSums | None = None
        self.lean = lean(target.platform)

    def __call__(
        self,
        tokens: jax.Array,
        segment_ids: jax.Array | None = None,
        positions: jax.Array | None = None,
        *,
        remat: str = "none",
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """tokens, segment_ids (0 = padding; None: no padding, one sequence a row), positions (None: from 0 in each
        sequence): int32 [B, T]. Returns hidden states [B, T, D] and stats [L, …] of the layers that have experts.

        Of A micro-batches that pass each layer together: [A, B, T], dropout keys [A], hidden states [A, B, T, D], stats [L, A, …]."""
        segment_ids = jnp.ones_like(tokens) if segment_ids is None else segment_ids
        rows = segment_ids.reshape(math.prod(segment_ids.shape[:-1]), segment_ids.shape[-1])
        self._check_padding(rows > 0)
        positions = positions_of(rows).reshape(segment_ids.shape) if positions is None else positions
        x, stats = self.embedded(tokens), []
        with jax.named_scope("layers"):
            for number, stack in enumerate(self.config.stacks):
                state, stretches = scannable(getattr(self, stack.name))
                sums = {} if self.gradient_sums is None else self.gradient_sums.of(stack.name, state)
                # Of weights that are read in place the gradients go by sums: as their own, where there are no others.
                through = sums or (trained(state) if stretches[0].in_place else {})
                state, key = without_gradients(state, through), dropout_key if number == 0 else fold(dropout_key, 2**16 + number)
                for stretch in stretches:
                    layers = _over(stack, stretch, state)
                    late = stack.block.feed_forward.module if self.lean else None
                    x, through, found = _scanned(late, stretch, state, layers, x, through, segment_ids, positions, key, remat)
                    if found is not None:
                        stats.append(found)
                if self.gradient_sums is not None and sums:
                    self.gradient_sums.put(stack.name, through)
        return self.norm(x.astype(self.dtype)), jax.tree.map(lambda *a: a[0] if len(a) == 1 else jnp.concatenate(a), *stats)

    def init_cache(self, batch: int, length: int) -> tuple[Any, ...]:
        """What each stack's layers know of sequences that hold nothing yet."""
        found = []
        for stack in self.config.stacks:
            mixer: Any = mixer_class(stack.block.mixer)
            found.append(mixer.empty(stack.block.mixer, stack.repeats, batch, length, self.dtype))
        return tuple(found)

    def cached(
        self, tokens: jax.Array, valid: jax.Array, positions: jax.Array, cache: tuple[Any, ...]
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """The forward pass over a cache: what `moejax.models.cache` is made of. valid: bool [B, T]. Inference only."""
        self._check_padding(valid)
        x, after = self.embedded(tokens), []
        for stack, held in zip(self.config.stacks, cache, strict=True):
            state, stretches = scannable(getattr(self, stack.name))
            for stretch in stretches:

                def body(
                    carry: tuple[jax.Array, Any], layer: Any, stretch: Stretch = stretch, state: nnx.State = state
                ) -> tuple[tuple[jax.Array, Any], None]:
                    (x, held), (weights, number, window) = carry, layer
                    weights = layer_in_place(state, {}, number) if stretch.in_place else weights
                    return stretch.layer(weights, number).cached(x, valid, positions, held, number, window), None

                (x, held), _ = jax.lax.scan(body, (x, held), _over(stack, stretch, state))
            after.append(held)
        return self.norm(x.astype(self.dtype)), tuple(after)

    def embedded(self, tokens: jax.Array) -> jax.Array:
        """tokens: int32 [..., T] -> the stream [..., T, D] that the first layer reads."""
        x = self.embed(tokens, self.dtype)
        return (x if self.embed_rows is None else self.embed_rows.looked_up(tokens, x)).astype(self._stream_dtype)

    @property
    def output_rows(self) -> TokenRows | None:
        """Rows that are trained next to `head_weight`: the embedding's if tied."""
        return self.embed_rows if self.config.tie_word_embeddings else self.head_rows

    @property
    def head_weight(self) -> nnx.Variable:
        """The [V, D] variable that makes logits: the embedding's table if tied."""
        return self.embed.weight if self.config.tie_word_embeddings else self.head.weight

    def logits(self, hidden: jax.Array) -> jax.Array:
        """hidden: [..., D] -> fp32 [..., V]."""
        weight = linear.dequantized(self.head_weight.get_value(), self.dtype, "head_dequant")
        logits = jnp.einsum("...d,vd->...v", hidden, weight, preferred_element_type=jnp.float32)
        return logits if self.output_rows is None else self.output_rows.scored(hidden, logits)

    @property
    def _stream_dtype(self) -> Any:
        return jnp.float32 if self.config.stream.fp32 else self.dtype

    def _check_padding(self, real: jax.Array) -> None:
        if any(isinstance(stack.block.mixer, specs.Mamba) for stack in self.config.stacks):
            check_padding(real)


def lean(platform: str) -> bool:
    """Whether a layer's backward pass is ordered for the least memory: barriers that a GPU does not notice, and that cost a CPU's step 3 to
    9 % of its time."""
    return platform != "cpu"


def _over(stack: specs.Stack, stretch: Stretch, state: nnx.State) -> tuple[nnx.State | None, jax.Array, jax.Array | None]:
    """What a scan over a stretch of a stack runs over: its weights (None: they are read in place), each block's number, int32 [n], and its
    window where the stack has any."""
    end = stretch.first + stretch.layers
    windows = None if stack.windows is None else jnp.asarray(stack.windows[stretch.first : end], jnp.int32)
    return None if stretch.in_place else state, jnp.arange(stretch.first, end), windows


def _scanned(
    late: str | None, stretch: Stretch, state: nnx.State, layers: Any, x: jax.Array, sums: Any, segment_ids: jax.Array,
    positions: jax.Array, dropout_key: jax.Array | None, remat: str,
) -> tuple[jax.Array, Any, RouterStats | None]:  # fmt: skip
    """The stream behind a stretch of a stack's layers, the sums that their gradients go to, and stats [n, …] (None: it has no experts).
    layers: of `_over`. late: the half whose gradients go to the sums before the other's are computed, for memory; None: all together."""

    def to_sums(weights: Any, sums: Any, index: jax.Array) -> tuple[Any, Any]:
        """Weights (read in place: marks of them) whose gradients go to sums."""
        if stretch.in_place:
            marks, sums = marked(sums, index) if sums else ({}, sums)
            return marks | (weights or {}), sums
        return added(weights, sums, index)

    def made(weights: Any, index: jax.Array) -> Layer:
        layer: Layer = stretch.layer(layer_in_place(state, weights, index) if stretch.in_place else weights, index)
        return layer

    def body(x: jax.Array, weights: Any, sums: Any, index: jax.Array, window: Any) -> tuple[jax.Array, Any, RouterStats | None]:
        x, key = checkpoint_name(x, STREAM_NAME), fold(dropout_key, index)
        x = made(weights, index).mixed(x, segment_ids, positions, key, remat, window)
        if sums:  # an expert's gradients are not held while the first half's are computed
            x, sums = settled(x, sums)
            weights, sums = to_sums(weights, sums, index)
        x, stats = made(weights, index).fed_forward(x, segment_ids > 0, key, remat in ("none", "dots"))
        return x, sums, stats

    run = rematerialized(body, remat, apart=stretch.layers == 1)

    def step(carry: Any, layer: tuple[Any, jax.Array, Any]) -> Any:
        (x, sums), (weights, index, window) = carry, layer
        second = {path: value for path, value in sums.items() if path[0] == late}
        weights, first = to_sums(weights, {path: value for path, value in sums.items() if path not in second}, index)
        x, second, of_layer = run(x, weights, second, index, window)
        return (x, first | second), of_layer

    (x, sums), stats = jax.lax.scan(step, (x, sums), layers)
    return x, sums, stats


def positions_of(segment_ids: jax.Array) -> jax.Array:
    """segment_ids: int32 [B, T] -> int32 [B, T]: each token's place in its segment, from 0."""
    index = jnp.broadcast_to(jnp.arange(segment_ids.shape[1], dtype=jnp.int32), segment_ids.shape)
    begins = jnp.pad(segment_ids[:, 1:] != segment_ids[:, :-1], ((0, 0), (1, 0)))
    return index - jax.lax.cummax(jnp.where(begins, index, 0), axis=1)


def check_padding(real: jax.Array) -> None:
    """real: bool [B, T]. Raises ValueError for rows of no length, and (where the values are known) for padding before a token.

    Nothing masks padding in a recurrent model: on the left it would run through the state and the convolution that the first real token
    finds. On the right it comes too late to matter.
    """
    if real.shape[1] == 0:
        raise ValueError("the sequence length is 0: expected at least one token a row")
    if isinstance(real, jax.core.Tracer):
        return
    early = np.asarray(real[:, 1:] & ~real[:, :-1])
    if early.any():
        row, column = (int(i) for i in np.argwhere(early)[0])
        raise ValueError(
            f"row {row} has padding at {column} before a token at {column + 1}: a recurrent model would carry the padding in its state "
            "into the tokens behind it. Pad on the right"
        )


def load_balancing_loss(stats: RouterStats, tokens: jax.Array) -> jax.Array:
    """Switch-style auxiliary loss over all layers together, as transformers' `load_balancing_loss_func` with a padding mask.

    stats: [L, E]; tokens: number of real tokens. E · Σ_e (share of choices that fall on e) · (mean probability of e).
    """
    layers, experts = stats.counts.shape
    total = jnp.maximum(tokens, 1).astype(jnp.float32) * layers
    share = jnp.sum(stats.counts, axis=0).astype(jnp.float32) / total
    probability = jnp.sum(stats.probabilities, axis=0) / total
    return experts * jnp.sum(share * probability)

"""What one block of a stack holds at each moment of a training step: the terms of `closed_form.py`, by kind of mixer. No jax.

The rules are those of bf16 programs on a GPU; fp32 and a CPU are counted by the same ones.

    N rows·row_tokens   M N·K + tile   D model   F expert hidden   E experts   K of them a token   I Mamba's channels   V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple, assert_never

from moejax.gpus import Platform
from moejax.models.config import specs
from moejax.models.ops import choice

ATTENTION_BLOCKS = (128, 512)  # smallest and largest, of models/ops/attention.py
FLASH_HEADS, FLASH_QUERIES = (32, 64, 128), 128  # of models/ops/flash.py


@dataclass(frozen=True)
class Step:
    """What the blocks of a program share."""

    width: int  # D
    stream_item: int  # bytes of a number of the residual stream
    platform: Platform
    device: str  # "cpu", "gpu" or a GPU's kind as jax names it: the one that the step is for
    memory_bytes: int | None  # of the device
    backend: str  # of the grouped products, or "auto"
    rows: int
    row_tokens: int
    item: int  # bytes of what is computed in
    trained: int | None  # bytes of a trained base weight; None: the base is frozen
    remat: bool
    quantized: bool  # experts are stored in 4 bits
    flash: bool  # attention by jax's kernel, where it can run
    scan: str  # the selective scan's form, or "auto"
    fetched: float = 0  # bytes of an expert's weight that come from the host's memory
    prefetch: str = "auto"  # by what
    offloads: bool = False  # the saved streams lie in the host's memory
    together: int = 1  # micro-batches that pass a layer at once: the mixer takes one after the other, the experts all
    devices: int = 1  # among which the experts are dealt: each has all devices' rows, and its experts
    gathered: float = 0  # bytes of an expert's weight that come from other devices

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.row_tokens

    @property
    def tokens_together(self) -> int:
        return self.together * self.tokens

    @property
    def at_experts(self) -> int:
        """Tokens that a device's experts choose among."""
        return self.devices * self.tokens_together

    @property
    def stream(self) -> int:
        """Bytes of a micro-batch's residual stream."""
        return self.tokens * self.width * self.stream_item


@dataclass(frozen=True)
class Adapted:
    """A block's adapters. rank: of those on the experts; 0 without."""

    rank: int = 0
    low_rank: int = 0  # ranks of those outside the experts, together
    mixer: bool = False  # whether the mixer has any
    shared: int = 0  # of those on the experts, how many have another's A

    def on_experts(self, width: int, moe: specs.MoE) -> int:
        """Numbers in the adapters of a layer's experts."""
        return self.rank * moe.experts * (3 * (width + moe.hidden) - self.shared * width)


class Mixer(NamedTuple):
    """What a block's mixer adds to it, in bytes."""

    streams: int  # of the residual stream, saved for the backward pass with rematerialization
    saved: int  # without
    backward: int
    forward: int  # of the last layer's forward pass, without rematerialization …
    forward_numbers: int  # … and numbers of the compute dtype where experts are sparse
    beside: int = 0  # … and next to them and the routing
    kept: int = 0  # what the expert half finds of the mixer's recomputation


@dataclass(frozen=True)
class Block:
    """A mixer and experts. Everything is in bytes; a moment's, what is alive next to arguments, saved activations and gradients."""

    step: Step
    adapted: Adapted
    mixer: Mixer
    moe: specs.MoE
    shared: Block | None = None  # of the MLP that the experts share, as `_of_one` has it

    @property
    def matrix(self) -> int:
        """Elements of one expert's matrix."""
        return self.step.width * self.moe.hidden

    @property
    def grouped(self) -> tuple[str, int, int, int]:
        """Backend, tiles and capacity of the grouped products, as the step takes them."""
        s, moe = self.step, self.moe
        return choice.grouped(
            s.device, s.at_experts, moe.experts, moe.experts_per_token, hidden=s.width, intermediate=moe.hidden, quantized=s.quantized,
            item=s.item, memory_bytes=s.memory_bytes, asked="loop" if s.fetched and s.prefetch == "experts" else s.backend,
            dealt=s.devices > 1,
        )  # fmt: skip

    @property
    def tile(self) -> int:
        """Rows of a large tile."""
        return self.grouped[1]

    @property
    def sorted_rows(self) -> int:
        """M."""
        return self.step.at_experts * self.moe.experts_per_token + self.tile

    @property
    def held(self) -> int:
        """Experts on this device."""
        return self.moe.experts // self.step.devices

    def routing(self) -> int:
        """Saved under every policy: indices, weights and places of the choices, the sorted rows' tokens; counts. As of four bytes each: a
        small batch's integers take less."""
        if self.moe.dense:
            return 0
        return 4 * (3 * self.step.at_experts * self.moe.experts_per_token + self.sorted_rows + 2 * self.moe.experts)

    def saved(self, layers: int) -> int:
        """For the backward pass, of this many. `full`: the stream before each part that is recomputed by itself, and the routing. `none`:
        every operand of a product or activation."""
        s, n, e, f = self.step, self.step.tokens_together, self.moe.experts, self.moe.hidden
        if s.remat:
            streams = 0 if s.offloads else self.mixer.streams
            return layers * (s.together * (streams + self.mixer.beside) + self.routing())
        experts = 6 * s.item * e * n * f if self.moe.dense else s.item * self.sorted_rows * (s.width + 2 * f) + self.routing()
        if self.shared is not None:
            experts += 6 * s.item * n * self.shared.moe.hidden
        return layers * (s.together * self.mixer.saved + experts + 4 * n * e + self.adapted.low_rank * s.item * n)

    def in_host(self, layers: int) -> int:
        """Saved in the host's memory, of this many."""
        return layers * self.step.together * self.mixer.streams if self.step.offloads else 0

    def experts(self) -> int:
        """The experts in the backward pass."""
        own = (self._dense() if self.moe.dense else self._sparse()) + self._in_flight()
        return own if self.shared is None else max(own, self.shared.experts())

    def _in_flight(self) -> int:
        """What was fetched from the host's memory: an expert's matrices and the next one's, or a layer's; and of what is gathered from
        other devices an expert's matrix and the next one, or a layer's."""
        whole = self.moe.dense or self.grouped[0] != "loop"
        fetched = 3 * self.step.fetched * (self.held if whole or self.step.prefetch == "layer" else 2)
        return int(self.matrix * (fetched + self.step.gathered * (3 * self.moe.experts if whole else 2)))

    def _sparse(self) -> int:
        """Sorted rows, their gradient and the output's: [M, D] three times (`loop` gathers a tile's, and has one of them less: counted all
        the same, 0.3 % too much of a Mixtral's 8 x 512). One expert at a time: its three matrices, a tile's hidden rows. `capacity`: the
        matrices of all, the rows of its batch too, and their hidden rows; `ragged`: all hidden rows; `decode` too, of few rows without a
        matrix.
        Trained weights: the layer's own gradients in fp32, and its matrices cut out of the stack."""
        s, n, item, e, f = self.step, self.step.at_experts, self.step.item, self.held, self.moe.hidden
        backend, *_, capacity = self.grouped
        decoded = n * self.moe.experts_per_token <= choice.DECODED_ROWS * e
        at_once = 1 if backend == "loop" else 0 if backend == "decode" and decoded else e
        together = {"loop": self.tile, "capacity": e * capacity, "ragged": self.sorted_rows, "decode": self.sorted_rows}[backend]
        rows = 3 * item * (self.sorted_rows + (together if backend == "capacity" else 0)) * s.width
        hidden = 6 * item * together * f
        adapters = (4 + item) * self.adapted.on_experts(s.width, self.moe) // s.devices  # sums of gradients; scaled
        if s.trained is None:
            matrices = 3 * at_once * item * self.matrix
            return rows + hidden + adapters + matrices + 2 * s.together * s.stream + self.mixer.kept
        layer = 3 * e * self.matrix * (4 + s.trained)
        one = 3 * self.matrix * (4 + item) + 2 * 4 * self.matrix
        return rows + hidden + layer + one + 3 * item * n * s.width + s.together * s.stream + self.mixer.kept

    def _dense(self) -> int:
        """[E, N, F] several times: projections, adapters' parts, activation, gradients; two of the layer's matrices as they are used."""
        s, e = self.step, self.held
        wide = s.item * e * s.at_experts * self.moe.hidden
        if s.trained is not None:
            count = 5
        else:  # before Hopper two products are joined with their adapters' and the activation's slope is fp32: counted as two
            count = 10 if s.platform in ("sm80", "sm8") else 6
        matrices = 2 * e * self.matrix * (s.item if s.trained is None else s.trained)
        return count * wide + matrices + 2 * s.together * s.stream + self.mixer.kept

    def forward(self) -> int:
        """Without rematerialization: the last layer's forward pass, its operands not yet among the stacked ones: the mixer's; the stream
        before and after; sorted rows and hidden rows."""
        s, n, f = self.step, self.step.tokens_together, self.moe.hidden
        mixer = self.mixer.forward
        if self.moe.dense:
            return mixer + 3 * s.item * self.moe.experts * n * f + 3 * s.together * s.stream
        rows = 2 * self.sorted_rows * (s.width + f)
        numbers = rows + self.mixer.forward_numbers + self.adapted.low_rank * n
        return mixer + s.item * numbers + 2 * s.together * s.stream


class _Attention(NamedTuple):
    """Sizes of a step's attention, in elements."""

    heads: int  # of all heads' queries, a token
    kv: int
    last: int  # scores, [rows, heads, block, keys up to the block's end], of the last block
    every: int  # … of all blocks


def _attention(step: Step, m: specs.GQA) -> _Attention:
    smallest, largest = ATTENTION_BLOCKS
    length = step.row_tokens
    size = min(length, largest, max(smallest, -(-length // 4)))
    blocks = [(min(start + size, length) - start) * min(start + size, length) for start in range(0, length, size)]
    scores = step.rows * m.heads * blocks[-1], step.rows * m.heads * sum(blocks)
    return _Attention(m.heads * m.head_dim, m.kv_heads * m.head_dim, *scores)


def latent_attention(s: Step, m: specs.MLA, adapted: Adapted) -> Mixer:
    """As `attention` by blocks of as many keys as queries, of the mean of a key's and a value's numbers. Next to them: what kv_b_proj gave,
    the keys that are made of it, and the gradients of both."""
    keys, values = m.heads * m.head_dim, m.heads * m.v_dim
    like = _attention(s, specs.GQA(m.heads, m.heads, m.head_dim, m.rope))._replace(kv=(keys + values) // 2)
    found = _by_blocks(s, like, m.heads, adapted)
    expanded = s.item * s.tokens * (m.heads * (m.plain_dim + m.v_dim) + keys)
    return found._replace(saved=found.saved + expanded, backward=found.backward + 2 * expanded)


def attention(s: Step, m: specs.GQA, adapted: Adapted) -> Mixer:
    """Each half of the block is recomputed by itself."""
    a = _attention(s, m)
    whole = not m.sinks and m.window is None  # models/ops/flash.py has neither
    if s.flash and whole and m.head_dim in FLASH_HEADS and s.row_tokens >= FLASH_QUERIES:
        return _flash(s, a)
    return _by_blocks(s, a, m.heads, adapted)


def _by_blocks(s: Step, a: _Attention, heads: int, adapted: Adapted) -> Mixer:
    n, width = s.tokens, s.width + a.heads + 2 * a.kv
    return Mixer(
        streams=2 * s.stream,  # before each half
        beside=4 * n * heads,  # a number a query and head
        saved=s.item * n * ((6 if s.trained else 4) * s.width + width) + 4 * n * heads,
        backward=_attention_backward(s, a, adapted),
        forward=5 * a.every,  # masks of all blocks
        forward_numbers=3 * n * (a.heads + a.kv),  # q, k and v as one product, q and k rotated, the attention's output
    )


def _flash(s: Step, a: _Attention) -> Mixer:
    """No scores. Keys and values stand once for every head of queries; backward q, k, v, the output, and the gradients of all four."""
    n, item = s.tokens, s.item
    return Mixer(
        streams=2 * s.stream,
        saved=item * n * ((7 if s.trained else 5) * s.width + 4 * a.heads) + 4 * n * a.heads,
        backward=item * n * (8 * a.heads + 3 * s.width),
        forward=item * n * 2 * a.heads,
        forward_numbers=3 * n * (a.heads + a.kv),
    )


def _attention_backward(s: Step, a: _Attention, adapted: Adapted) -> int:
    """Scores of the last block of queries twice in fp32 and of all blocks twice in the compute dtype (XLA does not wait for one block
    before the next), the stream three times, a block's queries five times, and partial sums of the keys' gradient."""
    n, item = s.tokens, s.item
    block = max(1, n * min(1.0, max(ATTENTION_BLOCKS[0], s.row_tokens / 4) / s.row_tokens))
    partial = int(4 * 1.25 * n * a.kv) + int(5 * item * block * a.heads)
    masks = a.every if adapted.mixer else 0  # a byte a score: XLA makes those of all blocks ahead of the loop over layers
    scores = 2 * 4 * (a.last if item < 4 else 0) + 2 * item * a.every
    return masks + scores + 3 * item * n * s.width + partial + item * a.heads * s.width


def mamba(s: Step, m: specs.Mamba, moe: specs.MoE) -> Mixer:
    """The block is recomputed as a whole; where micro-batches pass it together, each half by itself."""
    n, inner = s.tokens, m.inner
    form, chunk = choice.scan(s.device, s.rows, s.row_tokens, inner, s.scan)  # and tokens of a chunk of the scan
    unit = 4 * n * inner  # fp32 [N, I]
    states = unit * m.state // chunk  # what the scan keeps of every chunk
    of_chunk = 0 if form == "kernel" else 4 * chunk * s.rows * m.state * inner  # a chunk's states, [chunk, rows, states, I]
    return Mixer(
        streams=s.stream * (1 if s.together == 1 else 2),
        saved=17 * s.item * n * inner + states + 6 * 4 * n * s.width,
        # in_proj's output, seven of fp32, three of the compute dtype
        kept=unit * 7 + 5 * s.item * n * inner + states + 2 * 4 * n * s.width if s.together == 1 else 0,
        backward=_mamba_backward(s, m, moe, chunk, unit, of_chunk) + states,
        forward=n * m.state * inner + of_chunk + 9 * s.item * n * inner,
        forward_numbers=2 * n * s.width,
    )


def _mamba_backward(s: Step, m: specs.Mamba, moe: specs.MoE, chunk: int, unit: int, of_chunk: int) -> int:
    """The scan's operands and gradients, [N, I]; a chunk's states; sparse experts' gradients.

    In fp32: dt·u and dt, both once more time first, the scan's output, its gradient twice, two gradients of operands; in the
    compute dtype: in_proj's output (two), the convolution's with its slopes (three), dt's product, the gated output's gradient. Without
    rematerialization eight of these are among the saved. Of a chunk: a scan's result and the upper half of its tree, both operands of
    [chunk/4], [chunk/4 - 1], [chunk/8 - 1] …: 2.375 times its states; three operands cut out. B, C and their gradients, x_proj's rows.
    """
    n = s.tokens
    weights = 0 if moe.dense else 3 * moe.experts * s.width * moe.hidden * 4
    wide, computed = (8, 7) if s.remat else (6, 1)
    used = wide * unit + (computed * n * m.inner + n * (m.rank + 2 * m.state)) * s.item + 4 * 4 * n * m.state
    return used + int(2.375 * of_chunk) + 3 * 4 * chunk * s.rows * m.inner + n * s.width * (4 + s.item) + weights


_BY_EXPERT: dict[str, Any] = {"fetched": 0, "devices": 1, "gathered": 0}
"""Of a step, what an MLP does without: it is on every device."""


def _of_one(mlp: specs.MLP) -> specs.MoE:
    """As a mixture of one expert, which needs the same."""
    return specs.MoE(1, 1, mlp.hidden, "silu", specs.Router())


def block_of(step: Step, spec: specs.Block, adapted: Adapted) -> Block:
    """The terms of a block of this kind."""
    match spec.feed_forward:
        case specs.MoE():
            moe, shared = spec.feed_forward, spec.feed_forward.shared
        case specs.MLP():  # is on the device wherever experts are
            moe, shared, step = _of_one(spec.feed_forward), None, replace(step, **_BY_EXPERT)
        case _:
            assert_never(spec.feed_forward)
    match spec.mixer:
        case specs.GQA():
            mixer, between = attention(step, spec.mixer, adapted), step.stream
        case specs.MLA():
            mixer, between = latent_attention(step, spec.mixer, adapted), step.stream
        case specs.Mamba():
            mixer, between = mamba(step, spec.mixer, moe), 0
        case _:
            assert_never(spec.mixer)
    if spec.norm == "after":  # kept for the norms: what each half computed, in the place of the stream between them
        mixer = mixer._replace(streams=mixer.streams - between + 2 * step.item * step.tokens * step.width)
    beside = None if shared is None else Block(replace(step, **_BY_EXPERT), adapted, mixer, _of_one(shared))
    return Block(step, adapted, mixer, moe, beside)

"""What one block of a stack holds at each moment of a training step: the terms of `closed_form.py`, by kind of mixer. No jax.

    N rows·row_tokens   M N·K + tile   D model   F expert hidden   E experts   K of them a token   I Mamba's channels   V vocabulary
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, assert_never

from moejax.gpus import Platform
from moejax.models.config import specs
from moejax.models.ops import choice

ATTENTION_BLOCKS = (128, 512)  # smallest and largest, of models/ops/attention.py


def tile_rows(device: str, tokens: int, width: int, experts: specs.MoE, quantized: bool) -> int:
    """Rows of a large tile of the grouped products, as the step takes them (models/ops/choice.py).

    device: "cpu", "gpu" or a GPU's kind as jax names it: the one that the step is for.
    """
    return choice.grouped(
        device, tokens, experts.experts, experts.experts_per_token, hidden=width, intermediate=experts.hidden, quantized=quantized
    )[1]


@dataclass(frozen=True)
class Step:
    """What the blocks of a program share."""

    width: int  # D
    stream_item: int  # bytes of a number of the residual stream
    platform: Platform
    device: str
    rows: int
    row_tokens: int
    item: int  # bytes of what is computed in
    trained: int | None  # bytes of a trained base weight; None: the base is frozen
    remat: bool
    balanced: bool  # a load-balancing loss reads the router's probabilities
    quantized: bool  # experts are stored in 4 bits

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def stream(self) -> int:
        """Bytes of the residual stream."""
        return self.tokens * self.width * self.stream_item


@dataclass(frozen=True)
class Adapted:
    """A block's adapters. rank: of those on the experts; 0 without."""

    rank: int = 0
    low_rank: int = 0  # ranks of those outside the experts, together
    other_bytes: int = 0  # of their matrices
    mixer: bool = False  # whether the mixer has any
    shared: int = 0  # of those on the experts, how many have another's A


@dataclass(frozen=True)
class Block(ABC):
    """A mixer and experts. Everything is in bytes; a moment's, what is alive beside arguments, saved activations and gradients."""

    step: Step
    adapted: Adapted
    mixer: Any
    moe: specs.MoE

    @property
    def matrix(self) -> int:
        """Elements of one expert's matrix."""
        return self.step.width * self.moe.hidden

    @property
    def tile(self) -> int:
        return tile_rows(self.step.device, self.step.tokens, self.step.width, self.moe, self.step.quantized)

    @property
    def sorted_rows(self) -> int:
        """M."""
        return self.step.tokens * self.moe.experts_per_token + self.tile

    @property
    def expert_adapters(self) -> int:
        """Numbers in the adapters of the layer's experts."""
        d, f, on = self.step.width, self.moe.hidden, self.adapted
        return on.rank * self.moe.experts * (3 * (d + f) - on.shared * d)

    def routing(self) -> int:
        """Saved under every policy: indices, weights and places of the choices, the sorted rows' tokens; counts."""
        if self.moe.dense:
            return 0
        return 4 * (3 * self.step.tokens * self.moe.experts_per_token + self.sorted_rows + 2 * self.moe.experts)

    def saved(self, layers: int) -> int:
        """For the backward pass, of so many. `full`: the stream before each part that is recomputed by itself, and the routing. `none`:
        every operand of a product or activation."""
        s, n, e, f = self.step, self.step.tokens, self.moe.experts, self.moe.hidden
        if s.remat:
            return layers * (self.saved_streams() + self.routing())
        experts = 6 * s.item * e * n * f if self.moe.dense else s.item * self.sorted_rows * (s.width + 2 * f) + self.routing()
        small = 0
        if self.small_arrays and not self.moe.dense:
            # Adapters' matrices as the products took them; two norms' statistics, four numbers each.
            experts += s.item * self.adapted.rank * e * (2 * f + s.width) + 2 * 4 * 4 * n
            small = self.adapted.other_bytes
        return layers * (self.saved_of_mixer() + experts + 4 * n * e + self.adapted.low_rank * s.item * n) + small

    @property
    def small_arrays(self) -> bool:
        """Whether to count what was read off a GPU's program with adapted experts, and matters in a small batch of a small model."""
        return False

    # The moments.

    def experts(self) -> int:
        """The experts in the backward pass."""
        return self._dense() if self.moe.dense else self._sparse()

    def _sparse(self) -> int:
        """Sorted rows, their gradient and the output's: [M, D] three times. One expert at a time: its three matrices and, on a GPU, one
        of them once more with the adapter beside it (XLA joins products that share an operand); a tile's hidden rows.
        Trained weights: the layer's own gradients in fp32, and its matrices cut out of the stack."""
        s, n, item, e, f = self.step, self.step.tokens, self.step.item, self.moe.experts, self.moe.hidden
        rows = 3 * item * self.sorted_rows * s.width
        hidden = 6 * item * self.tile * f
        adapters = (4 + item) * self.expert_adapters  # sums of gradients; scaled
        if s.platform == "cpu" and not s.remat:  # what was kept of the layer, cut out of the stack
            hidden += 2 * item * self.sorted_rows * f + 4 * item * n * s.width
        if s.trained is None:
            return rows + hidden + adapters + 4 * item * self.matrix + 2 * s.stream + self.kept()
        layer = 3 * e * self.matrix * (4 + (s.trained if s.platform != "cpu" else 0))
        one = 3 * self.matrix * (4 + item) + 2 * 4 * self.matrix
        return rows + hidden + layer + one + 3 * item * n * s.width + s.stream + self.kept()

    def _dense(self) -> int:
        """[E, N, F] several times: projections, adapters' parts, activation, gradients; two of the layer's matrices as they are used."""
        s, e = self.step, self.moe.experts
        wide = s.item * e * s.tokens * self.moe.hidden
        if s.platform == "cpu":
            count = self.dense_on_cpu()
        elif s.trained is not None:
            count = 5
        else:  # before Hopper two products are joined with their adapters' and the activation's slope is fp32: counted as two
            count = 6 if s.platform == "sm9" else 10
        matrices = 2 * e * self.matrix * (s.item if s.trained is None else s.trained)
        low = (3 - self.adapted.shared) * s.item * e * s.tokens * self.adapted.rank if s.platform == "cpu" else 0
        return count * wide + matrices + low + 2 * s.stream + self.kept()

    def forward(self) -> int:
        """Without rematerialization: the last layer's forward pass, its operands not yet among the stacked ones: the mixer's; the stream
        before and after; sorted rows and hidden rows."""
        s, n, f = self.step, self.step.tokens, self.moe.hidden
        mixer, operands = self.forward_of_mixer()
        if self.moe.dense:
            return mixer + 3 * s.item * self.moe.experts * n * f + 3 * s.stream
        rows = 2 * self.sorted_rows * (s.width + f)
        return mixer + s.item * (rows + operands + self.adapted.low_rank * n) + 2 * s.stream + self.forward_of_adapters()

    def forward_of_adapters(self) -> int:
        return 0

    # What depends on the mixer.

    @abstractmethod
    def saved_streams(self) -> int: ...

    @abstractmethod
    def saved_of_mixer(self) -> int:
        """Without rematerialization."""

    @abstractmethod
    def dense_on_cpu(self) -> int:
        """How many arrays [E, N, F] a CPU holds at once where every token visits every expert."""

    @abstractmethod
    def kept(self) -> int:
        """What the expert half finds of the mixer's recomputation."""

    @abstractmethod
    def backward(self) -> int: ...

    @abstractmethod
    def forward_of_mixer(self) -> tuple[int, int]:
        """Bytes, and numbers of the compute dtype where experts are sparse."""


@dataclass(frozen=True)
class AttentionBlock(Block):
    """Each half of the block is recomputed by itself."""

    mixer: specs.GQA

    @property
    def heads(self) -> int:
        return self.mixer.heads * self.mixer.head_dim

    @property
    def kv(self) -> int:
        return self.mixer.kv_heads * self.mixer.head_dim

    @property
    def mixer_trained(self) -> bool:
        return self.step.trained is not None or self.adapted.mixer

    @property
    def block(self) -> int:
        """Queries of a block of the attention."""
        smallest, largest = ATTENTION_BLOCKS
        return min(self.step.row_tokens, largest, max(smallest, -(-self.step.row_tokens // 4)))

    def scores(self) -> tuple[int, int]:
        """Elements of attention scores, [rows, heads, block, keys up to the block's end]: of the last block, and of all blocks."""
        size, length = self.block, self.step.row_tokens
        starts = range(0, length, size)
        ends = [min(start + size, length) for start in starts]
        blocks = [(end - start) * end for start, end in zip(starts, ends, strict=True)]
        return self.step.rows * self.mixer.heads * blocks[-1], self.step.rows * self.mixer.heads * sum(blocks)

    def saved_streams(self) -> int:
        """The stream before each half, and one number a query and head."""
        return 2 * self.step.stream + 4 * self.step.tokens * self.mixer.heads

    def saved_of_mixer(self) -> int:
        s = self.step
        width = s.width + self.heads + 2 * self.kv
        return s.item * s.tokens * ((6 if s.trained else 4) * s.width + width) + 4 * s.tokens * self.mixer.heads

    def dense_on_cpu(self) -> int:
        return 7 if self.step.trained is None else 8 if self.step.balanced else 9

    def kept(self) -> int:
        """Where everything is fp32, XLA recomputes the attention's scores before it comes to the experts, on a GPU only if the base is
        trained (in every program looked at, with adapters on the attention or not; why its scheduler goes by that is not known)."""
        s, dense = self.step, self.moe.dense
        if s.item < 4 or (s.platform != "cpu" and s.trained is None):
            return 0
        count = 2 if s.platform == "cpu" and s.trained is None and (dense or not s.remat) else 1
        more = 0
        if s.platform == "cpu" and dense:
            more = 5 * s.width + 4 * self.kv if s.trained else s.width
        return s.item * (count * self.scores()[1] + s.tokens * (2 * (self.heads + self.kv) + more))

    def backward(self) -> int:
        """Scores of the last block of queries twice in fp32 and of all blocks twice in the compute dtype (XLA does not wait for one block
        before the next), the stream three times, a block's queries five times, and partial sums of the keys' gradient."""
        s, n, item, dense = self.step, self.step.tokens, self.step.item, self.moe.dense
        last, every = self.scores()
        if s.platform == "cpu":  # fp32: scores, their weights and gradients of all blocks; k and v, transposed, and by block
            rows = (1 if self.mixer_trained else 2) * n * (1 if dense else self.moe.experts_per_token) * s.width
            count, sizes_of_kv = (3, 8) if self.mixer_trained else (2, 6)
            return item * ((1 if dense and s.trained else count) * every + 6 * n * s.width + sizes_of_kv * n * self.kv + rows)
        if item == 4 and s.trained is None:
            return self._backward_fp32()
        block = max(1, n * min(1.0, max(ATTENTION_BLOCKS[0], s.row_tokens / 4) / s.row_tokens))
        partial = int(4 * 1.25 * n * self.kv) + int(5 * item * block * self.heads)
        masks = every if self.adapted.mixer else 0  # a byte a score: XLA makes those of all blocks ahead of the loop over layers
        return masks + 2 * 4 * (last if item < 4 else 0) + 2 * item * every + 3 * item * n * s.width + partial + item * self.heads * s.width

    def _backward_fp32(self) -> int:
        """The same on a GPU where all is fp32 and the base frozen: nothing is converted.

        Scores: of every block of queries the weights and the scores' gradient wait for the keys' and values' gradients, and of one block
        also the gradient of the weights; which one is XLA's choice (of 512 tokens the largest block comes first, of 256 the smallest), so
        the mean is taken. Beside them the stream's gradient; rotated queries and the output's gradient; keys and values, transposed;
        sines and cosines twice; the gradients of the queries of other blocks. With adapters on the attention also the normed stream, the
        three projections as one product, values and both gradients once more, low-rank rows.
        """
        s, n = self.step, self.step.tokens
        every, blocks = self.scores()[1], -(-s.row_tokens // self.block)
        scores = 2 * every + every // blocks
        token = s.width + 2 * self.heads + 2 * self.kv + 2 * self.mixer.head_dim
        if self.mixer_trained:
            token += s.width + self.heads + 3 * self.kv + self.adapted.low_rank
        return s.item * (scores + n * token + (n - s.rows * self.block) * self.heads)

    def forward_of_mixer(self) -> tuple[int, int]:
        """Masks of all blocks; q, k and v as one product, q and k rotated, the attention's output."""
        return 5 * self.scores()[1], 3 * self.step.tokens * (self.heads + self.kv)

    @property
    def small_arrays(self) -> bool:
        return self.adapted.rank > 0 and self.step.platform != "cpu"

    def forward_of_adapters(self) -> int:
        """Of one expert: its matrices as unpacked codes, as values, and joined with their adapters. The layer's scaled adapters; the
        others' matrices, transposed for all layers ahead of the loop, twice. The last block of the attention's output joined with an
        adapter. Rotary angles; a second time two low-rank rows; the router's scores, shares and order."""
        if not self.small_arrays:
            return 0
        s, rank, d, f = self.step, self.adapted.rank, self.step.width, self.moe.hidden
        expert = 6 * self.matrix + 2 * d * (f + rank) + f * (d + rank)
        token = self.mixer.head_dim + 2 * rank + 3 * self.moe.experts
        block = s.rows * self.block * (d + rank)
        return s.item * (expert + self.expert_adapters + block + s.tokens * token) + 2 * self.adapted.other_bytes


@dataclass(frozen=True)
class MambaBlock(Block):
    """The block is recomputed as a whole."""

    mixer: specs.Mamba

    @property
    def chunk(self) -> int:
        """Tokens of a chunk of the scan."""
        return choice.scan(self.step.device, self.step.rows, self.step.row_tokens, self.mixer.inner)[1]

    @property
    def unit(self) -> int:
        """fp32 [N, I]."""
        return 4 * self.step.tokens * self.mixer.inner

    @property
    def states(self) -> int:
        """What the scan keeps of every chunk."""
        return self.unit * self.mixer.state // self.chunk

    @property
    def of_chunk(self) -> int:
        """A chunk's states, [chunk, rows, states, I]."""
        return 4 * self.chunk * self.step.rows * self.mixer.state * self.mixer.inner

    def saved_streams(self) -> int:
        return self.step.stream

    def saved_of_mixer(self) -> int:
        s = self.step
        return 17 * s.item * s.tokens * self.mixer.inner + self.states + 6 * 4 * s.tokens * s.width

    def dense_on_cpu(self) -> int:
        return 11 if self.step.item == 4 else 12

    def kept(self) -> int:
        s = self.step
        if s.platform != "cpu":  # in_proj's output, seven of fp32, three of the compute dtype
            return self.unit * 7 + 5 * s.item * s.tokens * self.mixer.inner + self.states + 2 * 4 * s.tokens * s.width
        return 18 * self.unit + self.states + 5 * 4 * s.tokens * s.width

    def backward(self) -> int:
        """The scan's operands and gradients, [N, I]; a chunk's states; sparse experts' gradients.

        On a GPU, in fp32: dt·u and dt, both once more time first, the scan's output, its gradient twice, two gradients of operands; in the
        compute dtype: in_proj's output (two), the convolution's with its slopes (three), dt's product, the gated output's gradient. Without
        rematerialization eight of these are among the saved. Of a chunk: a scan's result and the upper half of its tree, both operands of
        [chunk/4], [chunk/4 - 1], [chunk/8 - 1] …: 2.375 times its states; three operands cut out. B, C and their gradients, x_proj's rows.
        """
        s, m, n = self.step, self.mixer, self.step.tokens
        written = s.platform == "cpu" or (s.remat and s.item == 4)  # the experts' gradients, into the stack of all layers
        weights = 0 if self.moe.dense or written else 3 * self.moe.experts * self.matrix * 4
        if s.platform != "cpu":
            wide, computed = (8, 7) if s.remat else (6, 1)
            used = wide * self.unit + (computed * n * m.inner + n * (m.rank + 2 * m.state)) * s.item + 4 * 4 * n * m.state
            used += int(2.375 * self.of_chunk) + 3 * 4 * self.chunk * s.rows * m.inner + n * s.width * (4 + s.item)
        else:
            used = 14 * self.unit + 12 * self.of_chunk + 4 * 4 * n * s.width
        return used + self.states + weights

    def forward_of_mixer(self) -> tuple[int, int]:
        s, m = self.step, self.mixer
        states = s.tokens * m.state * m.inner
        return states + self.of_chunk + 9 * s.item * s.tokens * m.inner, 2 * s.tokens * s.width


def block_of(step: Step, spec: specs.Block, adapted: Adapted) -> Block:
    """The terms of a block of this kind."""
    match spec.mixer:
        case specs.GQA():
            return AttentionBlock(step, adapted, spec.mixer, spec.feed_forward)
        case specs.Mamba():
            return MambaBlock(step, adapted, spec.mixer, spec.feed_forward)
        case _:
            assert_never(spec.mixer)

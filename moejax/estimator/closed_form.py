"""Peak memory by arithmetic: what a training step must hold at once, derived from how the program is built. No compiler, no jax.

    peak = arguments + saved activations + gradients + the largest of four moments' temporaries

Arguments are exact (`sizes.py`). The moments are the loss, one layer's expert half and its mixer half in the backward pass, and the
optimizer; for each the arrays that are alive at once are listed with their shapes. Which these are was read off the compiler's own live
ranges; no number in here is fitted to a peak. docs/estimator.md compares it with the compiler on every config of the repository.

    N rows·row_tokens   M N·K + tile   D model   F expert hidden   E experts   K of them a token   I Mamba's channels   V vocabulary
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from moejax.errors import UserError
from moejax.estimator import gpus, sizes
from moejax.estimator.gpus import Platform
from moejax.estimator.sizes import ITEM
from moejax.models.config import Architecture, BlackMambaConfig
from moejax.models.ops import grouped_table, scan_table

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.estimator.gpus import GPU

ATTENTION_BLOCKS = (128, 512)  # smallest and largest, of models/ops/attention.py


@dataclass(frozen=True)
class Breakdown:
    """Bytes by what they are for. `moment`: when the peak is reached; `saved` holds what the backward pass waits for."""

    weights: dict[str, int]  # by dtype
    adapters: int
    optimizer: int
    batch: int
    gradients: int
    saved: int
    temporaries: int
    moment: str

    @property
    def arguments(self) -> int:
        return sum(self.weights.values()) + self.adapters + self.optimizer + self.batch

    @property
    def total(self) -> int:
        return self.arguments + self.gradients + self.saved + self.temporaries

    def parts(self, peak_bytes: int | None = None) -> dict[str, int]:
        """Named parts; with the compiler's peak also what is left of it: "rest", negative where the closed form is too high."""
        named = {**self.weights, "adapters": self.adapters, "optimizer": self.optimizer, "batch": self.batch}
        named |= {"gradients": self.gradients, "saved activations": self.saved, "temporaries": self.temporaries}
        return named if peak_bytes is None else named | {"rest": peak_bytes - self.total}


def platform_of(gpu: GPU) -> Platform:
    """Which of the three kinds of programs the compiler makes for a GPU; Blackwell (10.0, and 12.0 of the RTX cards) gets Hopper's."""
    return gpu.platform or ("sm9" if gpu.chip.startswith(("GH", "GB")) else "sm80" if gpu.chip == "GA100" else "sm8")


def kind(platform: Platform) -> str:
    return "cpu" if platform == "cpu" else "gpu"


def device_of(gpu: GPU) -> str:
    """The GPU as jax names it, in the tables of what was measured; "gpu" where nothing was measured on one."""
    if gpu.platform == "cpu":
        return "cpu"
    measured = (*grouped_table.devices(), *scan_table.devices())
    kinds = {found.name: kind for kind in measured if (found := gpus.of_device_kind(kind)) is not None}
    return kinds.get(gpu.name, "gpu")


def tile_rows(device: str, tokens: int, config: Architecture, nf4: bool) -> int:
    """Rows of a large tile of the grouped products, as the step takes them (models/ops/grouped_table.py).

    device: "cpu", "gpu" or a GPU's kind as jax names it: the one that the step is for.
    """
    return grouped_table.entry(
        device, tokens, config.num_experts, config.experts_per_token,
        hidden=config.hidden_size, intermediate=config.intermediate_size, nf4=nf4,
    )[1]  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """The sizes that the moments are made of."""

    config: Any
    platform: Platform
    device: str
    rows: int
    row_tokens: int
    item: int  # bytes of what is computed in
    trained: int | None  # bytes of a trained base weight; None: the base is frozen
    rank: int  # of adapters on the experts; 0 without
    chunk: int
    remat: bool
    low_rank: int  # ranks of the adapters outside the experts, together
    other_adapters: int  # bytes of their matrices
    mixer_trained: bool  # attention has weights or adapters that are trained
    balanced: bool  # a load-balancing loss reads the router's probabilities
    nf4: bool  # experts are stored in 4 bits

    @property
    def tokens(self) -> int:
        return self.rows * self.row_tokens

    @property
    def recurrent(self) -> bool:
        return isinstance(self.config, BlackMambaConfig)

    @property
    def stream(self) -> int:
        """Bytes of the residual stream: fp32 in a BlackMamba."""
        return self.tokens * self.config.hidden_size * (4 if self.recurrent else self.item)

    @property
    def matrix(self) -> int:
        """Elements of one expert's matrix."""
        return self.config.hidden_size * self.config.intermediate_size

    @property
    def scan_chunk(self) -> int:
        assert isinstance(self.config, BlackMambaConfig)
        return scan_table.entry(self.device, self.rows, self.row_tokens, self.config.inner_size)[1]

    @property
    def sorted_rows(self) -> int:
        """M."""
        c = self.config
        return self.tokens * c.experts_per_token + tile_rows(self.device, self.tokens, c, self.nf4)

    def routing(self) -> int:
        """Of one layer, saved under every policy: indices, weights and places of the choices, the sorted rows' tokens; counts."""
        c = self.config
        if c.dense:
            return 0
        return 4 * (3 * self.tokens * c.experts_per_token + self.sorted_rows + 2 * c.num_experts)

    @property
    def block(self) -> int:
        """Queries of a block of the attention."""
        smallest, largest = ATTENTION_BLOCKS
        return min(self.row_tokens, largest, max(smallest, -(-self.row_tokens // 4)))

    def scores(self) -> tuple[int, int]:
        """Elements of attention scores, [rows, heads, block, keys up to the block's end]: of the last block, and of all blocks."""
        c = self.config
        if isinstance(c, BlackMambaConfig):
            return 0, 0
        size = self.block
        ends = [min(start + size, self.row_tokens) for start in range(0, self.row_tokens, size)]
        blocks = [(end - start) * end for start, end in zip(range(0, self.row_tokens, size), ends, strict=True)]
        return self.rows * c.num_heads * blocks[-1], self.rows * c.num_heads * sum(blocks)

    # Saved for the backward pass.

    def saved(self) -> int:
        """Of all layers. `full`: the stream before each half and one number a query and head (a BlackMamba: the stream before each
        pair), and the routing. `none`: every operand of a product or activation."""
        c, n, item = self.config, self.tokens, self.item
        if self.remat:
            halves = self.stream if isinstance(c, BlackMambaConfig) else 2 * self.stream + 4 * n * c.num_heads
            return sizes.layers(c) * (halves + self.routing())
        if isinstance(c, BlackMambaConfig):
            states = 4 * n * c.inner_size * c.state_size // self.scan_chunk
            mixer = 17 * item * n * c.inner_size + states + 6 * 4 * n * c.hidden_size
        else:
            width = c.hidden_size + (c.num_heads + 2 * c.num_kv_heads) * c.head_dim
            mixer = item * n * ((6 if self.trained else 4) * c.hidden_size + width) + 4 * n * c.num_heads
        if c.dense:
            experts = 6 * item * c.num_experts * n * c.intermediate_size
        else:
            experts = item * self.sorted_rows * (c.hidden_size + 2 * c.intermediate_size) + self.routing()
        small = 0
        if self.small_arrays and not c.dense:  # adapters' matrices as the products took them; two norms' statistics, four numbers each
            experts += item * self.rank * c.num_experts * (2 * c.intermediate_size + c.hidden_size) + 2 * 4 * 4 * n
            small = self.other_adapters
        return sizes.layers(c) * (mixer + experts + 4 * n * c.num_experts + self.low_rank * item * n) + small

    # The moments. Each returns the bytes that are alive beside arguments, saved activations and (in the backward pass) gradients.

    def loss(self) -> int:
        """A chunk's logits in fp32 and their gradient in the compute dtype (on a GPU in the same place where both are fp32); hidden states
        and theirs; the head's gradient in fp32 where it is trained."""
        c, chunk = self.config, min(self.chunk, self.tokens)
        gradient = 0 if self.item == 4 and self.platform != "cpu" else self.item
        head = 4 * c.vocab_size * c.hidden_size if self.trained else 0
        return chunk * c.vocab_size * (4 + gradient) + 3 * self.tokens * c.hidden_size * self.item + head

    def experts(self) -> int:
        """A layer's experts in the backward pass."""
        return self._dense() if self.config.dense else self._sparse()

    def _sparse(self) -> int:
        """Sorted rows, their gradient and the output's: [M, D] three times. One expert at a time: its three matrices and, on a GPU, one
        of them once more with the adapter beside it (XLA joins products that share an operand); a tile's hidden rows.
        Trained weights: the layer's own gradients in fp32, and its matrices cut out of the stack."""
        c, n, item = self.config, self.tokens, self.item
        rows = 3 * item * self.sorted_rows * c.hidden_size
        tile = tile_rows(self.device, n, c, self.nf4)
        hidden = 6 * item * tile * c.intermediate_size
        adapters = (4 + item) * self.rank * 3 * c.num_experts * (c.hidden_size + c.intermediate_size)  # sums of gradients; scaled
        if self.platform == "cpu" and not self.remat:  # what was kept of the layer, cut out of the stack
            hidden += 2 * item * self.sorted_rows * c.intermediate_size + 4 * item * n * c.hidden_size
        if self.trained is None:
            return rows + hidden + adapters + 4 * item * self.matrix + 2 * self.stream + self.kept_of_mixer()
        layer = 3 * c.num_experts * self.matrix * (4 + (self.trained if self.platform != "cpu" else 0))
        one = 3 * self.matrix * (4 + item) + 2 * 4 * self.matrix
        return rows + hidden + layer + one + 3 * item * n * c.hidden_size + self.stream + self.kept_of_mixer()

    def _dense(self) -> int:
        """[E, N, F] several times: projections, adapters' parts, activation, gradients; two of the layer's matrices as they are used."""
        c, item = self.config, self.item
        wide = item * c.num_experts * self.tokens * c.intermediate_size
        if self.platform == "cpu":
            count = (11 if item == 4 else 12) if self.recurrent else 7 if self.trained is None else 8 if self.balanced else 9
        elif self.trained is not None:
            count = 5
        else:  # before Hopper two products are joined with their adapters' and the activation's slope is fp32: counted as two
            count = 6 if self.platform == "sm9" else 10
        matrices = 2 * c.num_experts * self.matrix * (item if self.trained is None else self.trained)
        low = 3 * item * c.num_experts * self.tokens * self.rank if self.platform == "cpu" else 0
        return count * wide + matrices + low + 2 * self.stream + self.kept_of_mixer()

    def kept_of_mixer(self) -> int:
        """What the expert half finds of the mixer's recomputation: a BlackMamba's pair is recomputed as a whole; where everything is
        fp32, XLA recomputes the attention's scores before it comes to the experts, on a GPU only if the base is trained (in every program
        looked at, with adapters on the attention or not; why its scheduler goes by that is not known)."""
        c, n = self.config, self.tokens
        if isinstance(c, BlackMambaConfig):
            unit = 4 * n * c.inner_size
            states = unit * c.state_size // self.scan_chunk
            if self.platform != "cpu":  # in_proj's output, seven of fp32, three of the compute dtype
                return unit * 7 + 5 * self.item * n * c.inner_size + states + 2 * 4 * n * c.hidden_size
            return 18 * unit + states + 5 * 4 * n * c.hidden_size
        if self.item < 4 or (self.platform != "cpu" and self.trained is None):
            return 0
        width = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim
        count = 2 if self.platform == "cpu" and self.trained is None and (c.dense or not self.remat) else 1
        more = 0
        if self.platform == "cpu" and c.dense:
            more = 5 * c.hidden_size + 4 * c.num_kv_heads * c.head_dim if self.trained else c.hidden_size
        return self.item * (count * self.scores()[1] + n * (width + more))

    def mixer(self) -> int:
        """A layer's attention or Mamba in the backward pass."""
        return self._mamba() if self.recurrent else self._attention()

    def _attention(self) -> int:
        """Scores of the last block of queries twice in fp32 and of all blocks twice in the compute dtype (XLA does not wait for one block
        before the next), the stream three times, a block's queries five times, and partial sums of the keys' gradient."""
        c, n, item = self.config, self.tokens, self.item
        assert not isinstance(c, BlackMambaConfig)
        last, every = self.scores()
        heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        if self.platform == "cpu":  # fp32: scores, their weights and gradients of all blocks; k and v, transposed, and by block
            rows = (1 if self.mixer_trained else 2) * n * (1 if c.dense else c.experts_per_token) * c.hidden_size
            count, sizes_of_kv = (3, 8) if self.mixer_trained else (2, 6)
            return item * ((1 if c.dense and self.trained else count) * every + 6 * n * c.hidden_size + sizes_of_kv * n * kv + rows)
        if item == 4 and self.trained is None:
            return self._attention_fp32()
        block = max(1, n * min(1.0, max(ATTENTION_BLOCKS[0], self.row_tokens / 4) / self.row_tokens))
        partial = int(4 * 1.25 * n * kv) + int(5 * item * block * heads)
        return 2 * 4 * (last if item < 4 else 0) + 2 * item * every + 3 * item * n * c.hidden_size + partial + item * heads * c.hidden_size

    def _attention_fp32(self) -> int:
        """The same on a GPU where all is fp32 and the base frozen: nothing is converted.

        Scores: of every block of queries the weights and the scores' gradient wait for the keys' and values' gradients, and of one block
        also the gradient of the weights; which one is XLA's choice (of 512 tokens the largest block comes first, of 256 the smallest), so
        the mean is taken. Beside them the stream's gradient; rotated queries and the output's gradient; keys and values, transposed;
        sines and cosines twice; the gradients of the queries of other blocks. With adapters on the attention also the normed stream, the
        three projections as one product, values and both gradients once more, low-rank rows.
        """
        c, n = self.config, self.tokens
        assert not isinstance(c, BlackMambaConfig)
        heads, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
        every, blocks = self.scores()[1], -(-self.row_tokens // self.block)
        scores = 2 * every + every // blocks
        token = c.hidden_size + 2 * heads + 2 * kv + 2 * c.head_dim
        if self.mixer_trained:
            token += c.hidden_size + heads + 3 * kv + self.low_rank
        return self.item * (scores + n * token + (n - self.rows * self.block) * heads)

    def _mamba(self) -> int:
        """The scan's operands and gradients, [N, I]; a chunk's states, [chunk, rows, states, I]; sparse experts' gradients.

        On a GPU, in fp32: dt·u and dt, both once more time first, the scan's output, its gradient twice, two gradients of operands; in the
        compute dtype: in_proj's output (two), the convolution's with its slopes (three), dt's product, the gated output's gradient. Without
        rematerialization eight of these are among the saved. Of a chunk: a scan's result and the upper half of its tree, both operands of
        [chunk/4], [chunk/4 - 1], [chunk/8 - 1] …: 2.375 times its states; three operands cut out. B, C and their gradients, x_proj's rows.
        """
        c, n = self.config, self.tokens
        assert isinstance(c, BlackMambaConfig)
        unit, chunk = 4 * n * c.inner_size, self.scan_chunk
        states = unit * c.state_size // chunk
        of_chunk = 4 * chunk * self.rows * c.state_size * c.inner_size
        written = self.platform == "cpu" or (self.remat and self.item == 4)  # the experts' gradients, into the stack of all layers
        weights = 0 if c.dense or written else 3 * c.num_experts * self.matrix * 4
        if self.platform != "cpu":
            wide, computed = (8, 7) if self.remat else (6, 1)
            used = wide * unit + (computed * n * c.inner_size + n * (c.rank + 2 * c.state_size)) * self.item + 4 * 4 * n * c.state_size
            used += int(2.375 * of_chunk) + 3 * 4 * chunk * self.rows * c.inner_size + n * c.hidden_size * (4 + self.item)
        else:
            used = 14 * unit + 12 * of_chunk + 4 * 4 * n * c.hidden_size
        return used + states + weights

    def forward(self) -> int:
        """Without rematerialization: the last layer's forward pass, its operands not yet among the stacked ones: q, k and v as one
        product, q and k rotated, the attention's output, the stream before and after; sorted rows and hidden rows; masks of all blocks."""
        c, n, item = self.config, self.tokens, self.item
        masks = 5 * self.scores()[1]
        if isinstance(c, BlackMambaConfig):
            masks = n * c.state_size * c.inner_size + 4 * self.scan_chunk * self.rows * c.state_size * c.inner_size
            masks += 9 * item * n * c.inner_size
        if c.dense:
            return masks + 3 * item * c.num_experts * n * c.intermediate_size + 3 * self.stream
        blocks = 3 * n * (c.num_heads + c.num_kv_heads) * c.head_dim if not isinstance(c, BlackMambaConfig) else 2 * n * c.hidden_size
        rows = 2 * self.sorted_rows * (c.hidden_size + c.intermediate_size)
        return masks + item * (rows + blocks + self.low_rank * n) + 2 * self.stream + self.adapted()

    @property
    def small_arrays(self) -> bool:
        """Whether to count what was read off a GPU's program with adapted experts, and matters in a small batch of a small model."""
        return self.rank > 0 and self.platform != "cpu" and not self.recurrent

    def adapted(self) -> int:
        """What adapters add to the last layer's forward pass. Of one expert: its matrices as unpacked codes, as values, and joined with
        their adapters. The layer's scaled adapters; the others' matrices, transposed for all layers ahead of the loop, twice. The last
        block of the attention's output joined with an adapter. Rotary angles; a second time two low-rank rows; the router's scores,
        shares and order."""
        c = self.config
        if not self.small_arrays or isinstance(c, BlackMambaConfig):
            return 0
        d, f = c.hidden_size, c.intermediate_size
        expert = 6 * self.matrix + 2 * d * (f + self.rank) + f * (d + self.rank)
        scaled = 3 * c.num_experts * self.rank * (d + f)
        token = c.head_dim + 2 * self.rank + 3 * c.num_experts
        block = self.rows * self.block * (d + self.rank)
        return self.item * (expert + scaled + block + self.tokens * token) + 2 * self.other_adapters


def _scaled(trained: tuple[sizes.Stored, ...], embed: int, dtype: str, platform: Platform) -> int:
    """What the optimizer holds beside the gradients of a full fine-tuning (none of bf16 on Hopper, whose clipping is done in place).

    fp32: all of them scaled, beside the embedding's own; before Hopper the experts' two new moments, written beside the old ones, of which
    two thirds find the place of gradients that are done with: as much as the experts' and one matrix more. bf16 before Hopper: the experts'
    scaled, on an A100 one of their three matrices at a time, in fp32.
    """
    experts = sum(w.bytes for w in trained if w.name in ("w1", "w2", "w3"))
    if dtype == "float32":
        return experts + experts // 3 if platform in ("sm80", "sm8") else sum(w.bytes for w in trained) + embed
    return {"sm80": 2 * experts // 3, "sm8": experts}.get(platform, 0)


def breakdown(
    experiment: Experiment, config: Architecture, *, rows: int, row_tokens: int, platform: Platform, device: str | None = None
) -> Breakdown:
    """The closed form for one step of this experiment with so many rows a micro-batch.

    device: see `tile_rows`; None: a CPU, or a GPU on which nothing was measured.
    """
    t, adapter = experiment.training, experiment.adapter
    if t.remat not in ("none", "full"):
        raise UserError(f"training.remat = {t.remat}: the closed form knows none and full")
    weights = sizes.stored(experiment, config)
    trained = tuple(w for w in weights if w.trained)
    rank = adapter.rank if adapter else 0
    on_experts = adapter is not None and any(name in ("w1", "w2", "w3") for name in adapter.targets)
    others = 0 if adapter is None else sum(name not in ("w1", "w2", "w3") for name in adapter.targets)
    step = _Step(
        config, platform, device or kind(platform), rows, row_tokens, ITEM[t.compute_dtype], None if adapter else ITEM[t.stored_dtype],
        rank if on_experts else 0, t.loss_chunk_tokens, t.remat == "full", others * rank,
        sum(w.bytes for w in trained if ".lora_" in w.name and not w.name.startswith(("w1", "w2", "w3"))),
        adapter is None or any(name in sizes.ATTENTION for name in adapter.targets), experiment.model.aux_loss_coef > 0,
        experiment.quantization.experts_in_nf4,
    )  # fmt: skip
    by_dtype: dict[str, int] = {}
    for w in weights:
        if ".lora_" not in w.name:
            for dtype, size in w.parts.items():
                by_dtype[dtype] = by_dtype.get(dtype, 0) + size
    gradients, saved = sum(w.bytes for w in trained), step.saved()
    carried = gradients if t.gradient_accumulation > 1 else 0
    head = 4 * config.vocab_size * config.hidden_size if not adapter and config.tie_word_embeddings and config.dense else 0
    # On a CPU a loss of one chunk is no loop, and the layers' gradients are zeroed before it.
    tables = {w.name: w.bytes for w in trained if w.name in ("embed", "head")}
    early = gradients - sum(tables.values()) if platform == "cpu" and not adapter and step.tokens <= step.chunk else 0
    scaled = 0 if adapter else _scaled(trained, tables["embed"], t.stored_dtype, platform)
    moments = {
        "loss": (carried + early, saved, step.loss()),
        "experts, backward": (carried + gradients, saved, step.experts() + head),
        "mixer, backward": (carried + gradients, saved, step.mixer() + head),
        "optimizer": (carried + gradients, 0, scaled),
    }
    if not step.remat:
        moments["last layer, forward"] = (carried, saved, step.forward())
    moment = max(moments, key=lambda name: sum(moments[name]))
    g, s, temporaries = moments[moment]
    return Breakdown(
        by_dtype,
        sum(w.bytes for w in weights if ".lora_" in w.name),
        sizes.optimizer_bytes(t.optimizer, trained),
        sizes.batch_bytes(config, t.gradient_accumulation, rows, row_tokens),
        g,
        s,
        temporaries,
        moment,
    )

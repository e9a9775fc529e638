"""Every array that a training step is given, by arithmetic from the config: weights by dtype, adapters, optimizer, batch. No jax.

The compiler's `argument_size_in_bytes` is their sum, to the byte (tests/estimator/test_memory.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from moejax.models.config import Architecture, specs

if TYPE_CHECKING:
    from moejax.config import Experiment

ITEM = {"float32": 4, "bfloat16": 2}
NF4_BLOCK, NESTED_BLOCK = 64, 256
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_EXPERTS = ("w1", "w2", "w3")
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Stored:
    """A weight or an adapter as it lies in memory. `parts`: dtype -> bytes; an NF4 weight has codes and scales."""

    name: str
    shape: Shape
    trained: bool
    parts: dict[str, int]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return sum(self.parts.values())


def layers(config: Architecture) -> int:
    """Bodies of the scan over layers: a BlackMamba's are pairs."""
    return config.blocks


def layer_shapes(config: Architecture) -> dict[str, Shape]:
    """Weights of one layer (a BlackMamba's: of one pair), [..., out, in]."""
    d, f, e = config.hidden_size, config.intermediate_size, config.num_experts
    experts = {"router": (e, d), "w1": (e, f, d), "w2": (e, d, f), "w3": (e, f, d), "norm_1": (d,), "norm_2": (d,)}
    block = config.stacks[0].block
    if block.feed_forward.router.bias:
        experts["router_bias"] = (e,)
    match block.mixer:
        case specs.Mamba(inner=i, state=n, conv=taps, rank=r):
            return {
                "in_proj": (2 * i, d), "conv": (i, taps), "conv_bias": (i,), "x_proj": (r + 2 * n, i), "dt_proj": (i, r),
                "dt_bias": (i,), "a_log": (i, n), "d": (i,), "out_proj": (d, i),
            } | experts  # fmt: skip
        case specs.GQA(heads=heads, kv_heads=kv, head_dim=c, qk_norm=norm):
            norms = {None: {}, "head": {"q_norm": (c,), "k_norm": (c,)}, "all": {"q_norm": (heads * c,), "k_norm": (kv * c,)}}[norm]
            return {"q_proj": (heads * c, d), "k_proj": (kv * c, d), "v_proj": (kv * c, d), "o_proj": (d, heads * c)} | norms | experts
        case _:
            assert_never(block.mixer)


def outer_shapes(config: Architecture) -> dict[str, Shape]:
    """Weights outside the layers."""
    v, d = config.vocab_size, config.hidden_size
    shapes: dict[str, Shape] = {"embed": (v, d), "norm": (d,)}
    if config.stream.final_norm == "layer":
        shapes["norm_bias"] = (d,)
    return shapes if config.tie_word_embeddings else shapes | {"head": (v, d)}


def nf4_parts(shape: Shape, leading: int, double: bool) -> dict[str, int]:
    """Bytes of codes and scales of `leading` matrices [out, in], each quantized on its own."""
    n = math.prod(shape)
    blocks = -(-n // NF4_BLOCK)
    scales = blocks + 4 * -(-blocks // NESTED_BLOCK) + 4 if double else 4 * blocks
    return {"NF4 codes": leading * -(-n // 2), "NF4 scales": leading * scales}


def stored(experiment: Experiment, config: Architecture) -> tuple[Stored, ...]:
    """All weights and adapters, stacked over layers as the step gets them."""
    t, q, count = experiment.training, experiment.quantization, layers(config)
    frozen = experiment.adapter is not None
    dtype = t.compute_dtype if frozen else t.stored_dtype
    groups = {"attention": ATTENTION, "experts": _EXPERTS, "router": ("router",)}
    nf4 = {name for module in q.modules for name in groups[module]} if q.format == "nf4" else set()
    found = []
    for name, shape in layer_shapes(config).items():
        parts: dict[str, int] = {dtype: count * math.prod(shape) * ITEM[dtype]}
        if name in nf4:
            parts = nf4_parts(shape[-2:], count * math.prod(shape[:-2]), q.double)
        found.append(Stored(name, (count, *shape), not frozen, parts))
    for name, shape in outer_shapes(config).items():
        found.append(Stored(name, shape, not frozen, {dtype: math.prod(shape) * ITEM[dtype]}))
    return (*found, *adapters(experiment, config))


def adapters(experiment: Experiment, config: Architecture) -> tuple[Stored, ...]:
    """LoRA pairs A [..., R, in] and B [..., out, R], fp32."""
    if experiment.adapter is None:
        return ()
    r, shapes, found = experiment.adapter.rank, layer_shapes(config), []
    for target in experiment.adapter.targets:
        *leading, out, inner = shapes["router" if target == "gate" else target]
        for part, matrix in (("a", (r, inner)), ("b", (out, r))):
            shape = (layers(config), *leading, *matrix)
            found.append(Stored(f"{target}.lora_{part}", shape, True, {"float32": 4 * math.prod(shape)}))
    return tuple(found)


def optimizer_bytes(optimizer: str, trained: tuple[Stored, ...]) -> int:
    """AdamW: two moments in the weights' dtype. Adafactor (optax): a row and a column of the two largest axes where both reach 128.

    Each has its int32 counts of steps; the step itself is counted with the batch.
    """
    if optimizer == "adamw":
        return sum(2 * s.bytes for s in trained) + 2 * 4
    total = 2 * 4
    for s in trained:
        item = s.bytes // s.size
        axes = sorted(range(len(s.shape)), key=lambda a: s.shape[a])
        if len(axes) >= 2 and s.shape[axes[-2]] >= 128:
            total += item * (s.size // s.shape[axes[-1]] + s.size // s.shape[axes[-2]] + 1)
        else:
            total += item * (s.size + 2)
    return total


def batch_bytes(config: Architecture, accumulation: int, rows: int, row_tokens: int) -> int:
    """tokens, targets, loss mask, segments and (but for a BlackMamba) positions, 4 bytes each, and the number of the step."""
    arrays = 5 if isinstance(config.stacks[0].block.mixer, specs.GQA) else 4
    return 4 * arrays * accumulation * rows * row_tokens + 4

"""The least a step can take, stage by stage: FLOPs over the matrix rate, bytes over the bandwidth, whichever is longer. No jax.

What is counted is what the program of this repository does (full rematerialization, frozen weights dequantized once a pass): each operand
read once and each result written once, tiles and padding left out. A TPU's chip has memory of its own: what fits there (dequantized
matrices, a layer's rows) need not leave it, and does not count. Printed by `benchmarks/floors.py`; `estimate plan CONFIG` orders by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

from moejax.estimator import sizes, spread
from moejax.models.config import Architecture, specs
from moejax.models.config.adapters import Pair
from moejax.models.ops.quantized import KINDS

if TYPE_CHECKING:
    from moejax.config import Experiment

FP32 = 4
SIZES = {"bfloat16": 2, "float32": 4}
EXPERTS, DEQUANTIZATION = "moe/w1, w3, w2", "moe: dequantization"


@dataclass(frozen=True)
class Stage:
    """FLOPs and bytes of a step."""

    name: str
    flops: float
    bytes: float

    def seconds(self, flops_per_second: float, bytes_per_second: float) -> tuple[float, str]:
        """The floor, and which of the two it is."""
        computing, moving = self.flops / flops_per_second, self.bytes / bytes_per_second
        return max((computing, "compute"), (moving, "bandwidth"))


@dataclass(frozen=True)
class Numbers:
    """What is computed with: bytes of a number, and of the chip's own memory."""

    item: int
    chip: int = 0

    def bytes(self, count: float) -> float:
        """Moved for an array of as many that is made on the chip: of one that fits there none."""
        return self.item * count if self.item * count > self.chip else 0.0


def product(
    of: Numbers, tokens: float, inputs: float, outputs: float, passes: float, matrices: float = 1, rows: float | None = None,
    made: bool = False,
) -> Stage:  # fmt: skip
    """`passes` products of [tokens, inputs] with [outputs, inputs], `matrices` of which are read; rows: where they differ. made: the
    matrices are dequantized there."""
    n = tokens if rows is None else rows
    matrix = of.bytes(inputs * outputs) if made else of.item * inputs * outputs
    moved = matrices * matrix + of.bytes(n * inputs) + of.bytes(n * outputs)
    return Stage("", passes * 2 * n * inputs * outputs, passes * moved)


def merged(name: str, *stages: Stage) -> Stage:
    return Stage(name, sum(s.flops for s in stages), sum(s.bytes for s in stages))


def dequantization(of: Numbers, kind: str, weights: float, passes: float, matrices: float = 1) -> Stage:
    """Of as many matrices of `weights`: codes and scales read, numbers written."""
    moved = weights * KINDS[kind].bytes_per_weight + of.bytes(weights)
    return Stage("", 2 * weights * matrices * passes, matrices * passes * moved)


def experts(
    of: Numbers, d: int, spec: specs.MoE, n: float, trained: bool, kind: str | None, pairs: list[Pair], devices: int = 1
) -> list[Stage]:
    """w1 and w3 are multiplied forward, again, and for the gradient of their input; w2 not again; trained ones for their own too.
    pairs: the adapters on the three. devices: over which the experts are dealt; each meets as many choices as its tokens make."""
    f, e, k = spec.hidden, spec.experts / devices, spec.experts_per_token
    passes = (3 + trained) + (3 + trained) + (2 + trained)
    out = [merged(EXPERTS, product(of, n, d, f, passes, e, n * k, bool(kind)))]
    if kind:
        out.append(merged(DEQUANTIZATION, dequantization(of, kind, d * f, 2, 3 * e)))
    if pairs:  # forward, again, and a product each for the gradients of A, B and what goes in; a shared A (its input has d numbers) once
        sides = [(d + f if pair.shares is None else f, pair.rank) for pair in pairs]
        out.append(merged("moe/lora", *(product(of, n, side, rank, 4, e, n * k) for side, rank in sides)))
    moved = 0.0 if spec.dense else 8 * of.bytes(n * k * d)
    out.append(Stage("moe/dispatch, combine", 0, moved))
    # Forward (read two, write one), and backward (read three, write three); recomputed rows stay where they are.
    out.append(Stage("moe/act", 10 * n * k * f, 9 * of.bytes(n * k * f)))
    return out


def attention(of: Numbers, d: int, spec: specs.GQA, rows: int, length: int, trained: bool, kind: str | None) -> list[Stage]:
    n, q, kv = rows * length, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    pairs = rows * length * (length + 1) / 2
    made = bool(kind)
    projections = product(of, n, d, q + 2 * kv, 3 + trained, made=made), product(of, n, q, d, 2 + trained, made=made)
    out = [merged("attention: projections", *projections)]
    if kind:
        parts = (dequantization(of, kind, d * (q + 2 * kv), 3), dequantization(of, kind, q * d, 2))
        out.append(merged("attention: dequantization", *parts))
    # Scores and weighted values; backward the scores again, and the gradients of weights, values, queries and keys. Nothing is written.
    return [*out, Stage("attention: scores", 14 * pairs * q, 6 * (of.bytes(n * q) + of.bytes(n * kv)))]


def latent_attention(of: Numbers, d: int, spec: specs.MLA, rows: int, length: int, trained: bool, kind: str | None) -> list[Stage]:
    """Keys and values are expanded from the latents, forward and again."""
    n, matrices = rows * length, spec.matrices(d)
    pairs, heads = rows * length * (length + 1) / 2, spec.heads
    again = {name: 2 if name == "o_proj" else 3 for name in matrices}
    products = (product(of, n, m.inner, m.out, again[name] + trained, made=bool(kind)) for name, m in matrices.items())
    out = [merged("attention: projections", *products)]
    if kind:
        read = (dequantization(of, kind, m.out * m.inner, again[name]) for name, m in matrices.items())
        out.append(merged("attention: dequantization", *read))
    # As above: scores three times over and twice their gradients' part of q and k, the values' twice.
    flops = 2 * pairs * heads * (4 * spec.head_dim + 3 * spec.v_dim)
    return [*out, Stage("attention: scores", flops, 6 * (of.bytes(n * heads * spec.head_dim) + of.bytes(n * heads * spec.v_dim)))]


def feed_forward(of: Numbers, d: int, spec: specs.MLP, n: float, trained: bool, kind: str | None) -> list[Stage]:
    """Of dense layers, or shared: a product of w2 is not done again."""
    f = spec.hidden
    made = bool(kind)
    out = [merged("mlp", product(of, n, d, f, 2 * (3 + trained), made=made), product(of, n, f, d, 2 + trained, made=made))]
    if kind:
        out.append(merged("mlp: dequantization", dequantization(of, kind, d * f, 3, 2), dequantization(of, kind, d * f, 2)))
    return [*out, Stage("mlp/act", 10 * n * f, 9 * of.bytes(n * f))]


def mamba(of: Numbers, d: int, spec: specs.Mamba, n: float, trained: bool) -> list[Stage]:
    i, s, r = spec.inner, spec.state, spec.rank
    again = [product(of, n, into, out, 3 + trained) for into, out in ((d, 2 * i), (i, r + 2 * s), (r, i))]
    return [
        merged("mamba: projections", *again, product(of, n, i, d, 2 + trained)),
        # u, dt in fp32, y out, forward and again; backward reads them and dy, and writes du and ddt. States never leave the registers.
        # So by chunks; the kernel has none of them in fp32, and is counted alike.
        Stage("mamba/scan", 3 * 9 * n * i * s, Numbers(FP32, of.chip).bytes(n * i) * (3 + 3 + 5)),
        Stage("mamba/conv, gate", 3 * 2 * spec.conv * n * i, 14 * of.bytes(n * i)),
    ]


def ends(of: Numbers, c: Architecture, n: float, trained: bool, weights: float, param_bytes: int) -> list[Stage]:
    """The loss in chunks of 1024 tokens, which read the head again; Adam: weight, two moments, read and written, and the gradient twice."""
    chunks = -(-n // 1024)
    head = product(of, n, c.hidden_size, c.vocab_size, 2 + trained, chunks)
    return [Stage("loss", head.flops, head.bytes), Stage("optimizer", 14 * weights, weights * param_bytes * 8)]


def floors(experiment: Experiment, config: Architecture, rows: int, length: int, chip: int = 0) -> list[Stage]:
    """All stages of one optimizer step with one micro-batch of rows x length tokens. Of several devices: of one, with this many rows.
    chip: bytes of its own memory."""
    t, adapter, kinds = experiment.training, experiment.adapter, experiment.kinds(config)
    of, d, n, full = Numbers(SIZES[t.compute_dtype], chip), config.hidden_size, rows * length, adapter is None
    mesh = experiment.mesh
    weights = float(sum(w.size for w in spread.each(sizes.stored(experiment, config), config, mesh) if w.trained))
    dealt = spread.count(experiment) if mesh is not None and mesh.weights == "experts" else 1
    found: dict[str, Stage] = {}
    for stack in config.stacks:
        mixer, half = stack.block.halves
        match mixer:
            case specs.GQA():
                stages = attention(of, d, mixer, rows, length, full, kinds.get("attention"))
            case specs.MLA():
                stages = latent_attention(of, d, mixer, rows, length, full, kinds.get("attention"))
            case specs.Mamba():
                stages = mamba(of, d, mixer, n, full)
            case _:
                assert_never(mixer)
        match half:
            case specs.MoE():
                pairs = adapter.lora.of(config) if adapter else {}
                on_experts = [pair for target, pair in pairs.items() if target in half.groups["experts"]]
                stages += experts(of, d, half, n, full, kinds.get("experts"), on_experts, dealt)
                if half.shared is not None:
                    stages += feed_forward(of, d, half.shared, n, full, kinds.get("mlp"))
            case specs.MLP():
                stages += feed_forward(of, d, half, n, full, kinds.get("mlp"))
            case _:
                assert_never(half)
        stream = Numbers(FP32 if config.stream.fp32 else of.item, chip)
        stages.append(Stage("norms, stream", 0, 2 * stream.item * n * d + 14 * stream.bytes(n * d)))  # one is kept for the backward pass
        for stage in stages:
            found[stage.name] = merged(stage.name, found.get(stage.name, Stage("", 0, 0)), *[stage] * stack.repeats)
    return [*found.values(), *ends(of, config, n, full, weights, SIZES[t.stored_dtype] if full else FP32)]

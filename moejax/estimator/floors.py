"""The least a step can take, stage by stage: FLOPs over the matrix rate, bytes over the bandwidth, whichever is longer. No jax.

What is counted is what the program of this repository does (full rematerialization, frozen weights dequantized once a pass): each operand
read once and each result written once, tiles and padding left out. Printed by `benchmarks/floors.py`; `estimate plan CONFIG` orders by it.
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
EXPERTS = "moe/w1, w3, w2"


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


def product(
    item: int, tokens: float, inputs: float, outputs: float, passes: float, matrices: float = 1, rows: float | None = None
) -> Stage:
    """`passes` products of [tokens, inputs] with [outputs, inputs], `matrices` of which are read; rows: where they differ. item: bytes of
    a number that is computed with."""
    n = tokens if rows is None else rows
    moved = item * (matrices * inputs * outputs + n * (inputs + outputs))
    return Stage("", passes * 2 * n * inputs * outputs, passes * moved)


def merged(name: str, *stages: Stage) -> Stage:
    return Stage(name, sum(s.flops for s in stages), sum(s.bytes for s in stages))


def dequantization(item: int, kind: str, weights: float, passes: float) -> Stage:
    """Codes and scales read, numbers of `item` bytes written."""
    return Stage("", 2 * weights * passes, weights * passes * (KINDS[kind].bytes_per_weight + item))


def experts(
    item: int, d: int, spec: specs.MoE, n: float, trained: bool, kind: str | None, pairs: list[Pair], devices: int = 1
) -> list[Stage]:
    """w1 and w3 are multiplied forward, again, and for the gradient of their input; w2 not again; trained ones for their own too.
    pairs: the adapters on the three. devices: over which the experts are dealt; each meets as many choices as its tokens make."""
    f, e, k = spec.hidden, spec.experts / devices, spec.experts_per_token
    passes = (3 + trained) + (3 + trained) + (2 + trained)
    out = [merged(EXPERTS, product(item, n, d, f, passes, e, n * k))]
    if kind:
        out.append(merged("moe: dequantization", dequantization(item, kind, 3 * e * d * f, 2)))
    if pairs:  # forward, again, and a product each for the gradients of A, B and what goes in; a shared A (its input has d numbers) once
        sides = [(d + f if pair.shares is None else f, pair.rank) for pair in pairs]
        out.append(merged("moe/lora", *(product(item, n, side, rank, 4, e, n * k) for side, rank in sides)))
    moved = 0.0 if spec.dense else 8 * item * n * k * d
    out.append(Stage("moe/dispatch, combine", 0, moved))
    # Forward (read two, write one), and backward (read three, write three); recomputed rows stay where they are.
    out.append(Stage("moe/act", 10 * n * k * f, 9 * item * n * k * f))
    return out


def attention(item: int, d: int, spec: specs.GQA, rows: int, length: int, trained: bool, kind: str | None) -> list[Stage]:
    n, q, kv = rows * length, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    pairs = rows * length * (length + 1) / 2
    out = [merged("attention: projections", product(item, n, d, q + 2 * kv, 3 + trained), product(item, n, q, d, 2 + trained))]
    if kind:
        parts = (dequantization(item, kind, d * (q + 2 * kv), 3), dequantization(item, kind, q * d, 2))
        out.append(merged("attention: dequantization", *parts))
    # Scores and weighted values; backward the scores again, and the gradients of weights, values, queries and keys. Nothing is written.
    return [*out, Stage("attention: scores", 14 * pairs * q, 3 * item * n * (2 * q + 2 * kv))]


def latent_attention(item: int, d: int, spec: specs.MLA, rows: int, length: int, trained: bool, kind: str | None) -> list[Stage]:
    """Keys and values are expanded from the latents, forward and again."""
    n, matrices = rows * length, spec.matrices(d)
    pairs, heads = rows * length * (length + 1) / 2, spec.heads
    again = {name: 2 if name == "o_proj" else 3 for name in matrices}
    products = (product(item, n, m.inner, m.out, again[name] + trained) for name, m in matrices.items())
    out = [merged("attention: projections", *products)]
    if kind:
        read = (dequantization(item, kind, m.out * m.inner, again[name]) for name, m in matrices.items())
        out.append(merged("attention: dequantization", *read))
    # As above: scores three times over and twice their gradients' part of q and k, the values' twice.
    flops = 2 * pairs * heads * (4 * spec.head_dim + 3 * spec.v_dim)
    return [*out, Stage("attention: scores", flops, 3 * item * n * heads * 2 * (spec.head_dim + spec.v_dim))]


def feed_forward(item: int, d: int, spec: specs.MLP, n: float, trained: bool, kind: str | None) -> list[Stage]:
    """Of dense layers, or shared: a product of w2 is not done again."""
    f = spec.hidden
    out = [merged("mlp", product(item, n, d, f, 2 * (3 + trained)), product(item, n, f, d, 2 + trained))]
    if kind:
        out.append(merged("mlp: dequantization", dequantization(item, kind, 2 * d * f, 3), dequantization(item, kind, d * f, 2)))
    return [*out, Stage("mlp/act", 10 * n * f, 9 * item * n * f)]


def mamba(item: int, d: int, spec: specs.Mamba, n: float, trained: bool) -> list[Stage]:
    i, s, r = spec.inner, spec.state, spec.rank
    again = [product(item, n, into, out, 3 + trained) for into, out in ((d, 2 * i), (i, r + 2 * s), (r, i))]
    return [
        merged("mamba: projections", *again, product(item, n, i, d, 2 + trained)),
        # u, dt in fp32, y out, forward and again; backward reads them and dy, and writes du and ddt. States never leave the registers.
        Stage("mamba/scan", 3 * 9 * n * i * s, FP32 * n * i * (3 + 3 + 5)),
        Stage("mamba/conv, gate", 3 * 2 * spec.conv * n * i, item * n * i * 14),
    ]


def ends(item: int, c: Architecture, n: float, trained: bool, weights: float, param_bytes: int) -> list[Stage]:
    """The loss in chunks of 1024 tokens, which read the head again; Adam: weight, two moments, read and written, and the gradient twice."""
    chunks = -(-n // 1024)
    head = product(item, n, c.hidden_size, c.vocab_size, 2 + trained, chunks)
    return [Stage("loss", head.flops, head.bytes), Stage("optimizer", 14 * weights, weights * param_bytes * 8)]


def floors(experiment: Experiment, config: Architecture, rows: int, length: int) -> list[Stage]:
    """All stages of one optimizer step with one micro-batch of rows x length tokens. Of several devices: of one, with this many rows."""
    t, adapter, kinds = experiment.training, experiment.adapter, experiment.kinds(config)
    item, d, n, full = SIZES[t.compute_dtype], config.hidden_size, rows * length, adapter is None
    mesh = experiment.mesh
    weights = float(sum(w.size for w in spread.each(sizes.stored(experiment, config), config, mesh) if w.trained))
    dealt = spread.count(experiment) if mesh is not None and mesh.weights == "experts" else 1
    found: dict[str, Stage] = {}
    for stack in config.stacks:
        mixer, half = stack.block.halves
        match mixer:
            case specs.GQA():
                stages = attention(item, d, mixer, rows, length, full, kinds.get("attention"))
            case specs.MLA():
                stages = latent_attention(item, d, mixer, rows, length, full, kinds.get("attention"))
            case specs.Mamba():
                stages = mamba(item, d, mixer, n, full)
            case _:
                assert_never(mixer)
        match half:
            case specs.MoE():
                pairs = adapter.lora.of(config) if adapter else {}
                on_experts = [pair for target, pair in pairs.items() if target in half.groups["experts"]]
                stages += experts(item, d, half, n, full, kinds.get("experts"), on_experts, dealt)
                if half.shared is not None:
                    stages += feed_forward(item, d, half.shared, n, full, kinds.get("mlp"))
            case specs.MLP():
                stages += feed_forward(item, d, half, n, full, kinds.get("mlp"))
            case _:
                assert_never(half)
        stages.append(Stage("norms, stream", 0, 2 * 8 * (FP32 if config.stream.fp32 else item) * n * d))
        for stage in stages:
            found[stage.name] = merged(stage.name, found.get(stage.name, Stage("", 0, 0)), *[stage] * stack.repeats)
    return [*found.values(), *ends(item, config, n, full, weights, SIZES[t.stored_dtype] if full else FP32)]

"""The least a step can take, stage by stage: FLOPs over the matrix rate, bytes over the bandwidth, whichever is longer. Arithmetic alone.

    python benchmarks/floors.py [--config configs/mixtral_8x7b_cs_sparse.yaml] [--shapes 1x128,8x512,32x512,24x2048]
                                [--tflops 780 --gb-per-second 4300] [--json]

What is counted is what the program of this repository does (full rematerialization, frozen weights dequantized once a pass): each operand
read once and each result written once, tiles and padding left out. The default rates were measured by others on one H200: an 8192-cubed
bf16 product, and a copy. The sum of the stages is a floor of this program, kernel after kernel, not of the task.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from models.config import Architecture, BlackMambaConfig, MixtralConfig
from moejax import config as configuration
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.estimator import sizes
from moejax.estimator.roofline import NF4_BYTES

BF16, FP32 = 2, 4


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


def product(tokens: float, inputs: float, outputs: float, passes: float, matrices: float = 1, rows: float | None = None) -> Stage:
    """`passes` products of [tokens, inputs] with bf16 [outputs, inputs], `matrices` of which are read; rows: where they differ."""
    n = tokens if rows is None else rows
    moved = BF16 * (matrices * inputs * outputs + n * (inputs + outputs))
    return Stage("", passes * 2 * n * inputs * outputs, passes * moved)


def merged(name: str, times: float, *stages: Stage) -> Stage:
    return Stage(name, times * sum(s.flops for s in stages), times * sum(s.bytes for s in stages))


def dequantization(weights: float, passes: float) -> Stage:
    """Codes and scales read, bf16 written."""
    return Stage("", 2 * weights * passes, weights * passes * (NF4_BYTES + BF16))


def experts(config: Architecture, n: float, trained: bool, quantized: bool, rank: int = 0) -> list[Stage]:
    """w1 and w3 are multiplied forward, again, and for the gradient of their input; w2 not again; trained ones for their own too."""
    c = config
    d, f, e, k = c.hidden_size, c.intermediate_size, c.num_experts, c.experts_per_token
    layers = c.num_layers // 2 if isinstance(c, BlackMambaConfig) else c.num_layers
    passes = (3 + trained) + (3 + trained) + (2 + trained)
    out = [merged("moe/w1, w3, w2", layers, product(n, d, f, passes, e, n * k))]
    if quantized:
        out.append(merged("moe: dequantization", layers, dequantization(3 * e * d * f, 2)))
    if rank:  # forward, again, and a product each for the gradients of A, B and what goes in
        out.append(merged("moe/lora", layers, *(product(n, d + f, rank, 4, e, n * k),) * 3))
    moved = 0.0 if c.dense else 8 * BF16 * n * k * d
    out.append(Stage("moe/dispatch, combine", 0, layers * moved))
    # Forward (read two, write one), and backward (read three, write three); recomputed rows stay where they are.
    out.append(Stage("moe/act", layers * 10 * n * k * f, layers * 9 * BF16 * n * k * f))
    return out


def mixtral(c: MixtralConfig, rows: int, length: int, trained_weights: float, quantized: bool, rank: int) -> list[Stage]:
    n, d, layers = rows * length, c.hidden_size, c.num_layers
    q, kv = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    matrices = [product(n, d, q + 2 * kv, 3), product(n, q, d, 2)]
    pairs = rows * length * (length + 1) / 2
    out = [merged("attention: projections", layers, *matrices)]
    if quantized:
        out.append(merged("attention: dequantization", layers, dequantization(d * (q + 2 * kv), 3), dequantization(q * d, 2)))
    # Scores and weighted values; backward the scores again, and the gradients of weights, values, queries and keys. Nothing is written.
    out.append(Stage("attention: scores", layers * 14 * pairs * q, layers * 3 * BF16 * n * (2 * q + 2 * kv)))
    out += experts(c, n, False, quantized, rank)
    out.append(Stage("norms, stream", 0, layers * 2 * 8 * BF16 * n * d))
    return [*out, *ends(c, n, False, trained_weights, FP32)]


def blackmamba(c: BlackMambaConfig, rows: int, length: int, trained_weights: float, param_bytes: int) -> list[Stage]:
    n, d, i, s = rows * length, c.hidden_size, c.inner_size, c.state_size
    layers = c.num_layers // 2
    matrices = [product(n, d, 2 * i, 4), product(n, i, c.rank + 2 * s, 4), product(n, c.rank, i, 4), product(n, i, d, 3)]
    out = [merged("mamba: projections", layers, *matrices)]
    # u, dt in fp32, y out, forward and again; backward reads them and dy, and writes du and ddt. States never leave the registers.
    out.append(Stage("mamba/scan", layers * 3 * 9 * n * i * s, layers * FP32 * n * i * (3 + 3 + 5)))
    out.append(Stage("mamba/conv, gate", layers * 3 * 2 * c.conv_size * n * i, layers * BF16 * n * i * 14))
    out += experts(c, n, True, False)
    out.append(Stage("norms, stream", 0, layers * 2 * 8 * FP32 * n * d))
    return [*out, *ends(c, n, True, trained_weights, param_bytes)]


def ends(c: Architecture, n: float, trained: bool, weights: float, param_bytes: int) -> list[Stage]:
    """The loss in chunks of 1024 tokens, which read the head anew; Adam: weight, two moments, read and written, and the gradient twice."""
    chunks = -(-n // 1024)
    head = product(n, c.hidden_size, c.vocab_size, 2 + trained, chunks)
    return [Stage("loss", head.flops, head.bytes), Stage("optimizer", 14 * weights, weights * param_bytes * 8)]


def floors(experiment: Experiment, config: Architecture, rows: int, length: int) -> list[Stage]:
    """All stages of one optimizer step with one micro-batch of rows x length tokens."""
    trained = float(sum(w.size for w in sizes.stored(experiment, config) if w.trained))
    if isinstance(config, BlackMambaConfig):
        return blackmamba(config, rows, length, trained, FP32 if experiment.training.param_dtype == "float32" else BF16)
    rank = 0 if experiment.adapter is None else experiment.adapter.rank
    return mixtral(config, rows, length, trained, experiment.quantization.format == "nf4", rank)


def useful_flops(config: Architecture, experiment: Experiment, rows: int, length: int) -> float:
    """Model FLOPs as model FLOP utilization counts them (moejax/training/flops.py): no recomputation."""
    from moejax.training import flops
    from moejax.training.state import adapter_config

    counted = flops.count(config, adapter_config(experiment))
    return counted.step(rows * length, flops.visible_pairs([length] * rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", default="configs/mixtral_8x7b_cs_sparse.yaml")
    parser.add_argument("--shapes", default="1x128,8x512,32x512,24x2048", help="rows x tokens, comma-separated")
    parser.add_argument("--tflops", type=float, default=780.0, help="matrix rate")
    parser.add_argument("--gb-per-second", type=float, default=4300.0)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    rates = options.tflops * 1e12, options.gb_per_second * 1e9
    try:
        experiment = configuration.load(options.config, options.overrides)
        config = experiment.model.architecture(None)
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in options.shapes.split(",")]
        if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
            raise UserError(f"--shapes {options.shapes}: expected rows x tokens, e.g. 8x512,24x2048")
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    found: dict[str, Any] = {}
    for rows, length in shapes:
        stages = floors(experiment, config, rows, length)
        seconds = [s.seconds(*rates) for s in stages]
        useful = useful_flops(config, experiment, rows, length)
        whole = sum(t for t, _ in seconds)
        found[f"{rows}x{length}"] = {
            "stages": {s.name: vars(s) | {"floor_seconds": t, "bound": b} for s, (t, b) in zip(stages, seconds, strict=True)},
            "floor_seconds": whole, "tokens_per_second": rows * length / whole, "share_of_matrix_rate": useful / whole / rates[0],
        }  # fmt: skip
    if options.json:
        print(json.dumps(found, indent=1))
        return 0
    print(f"{options.config}: floor in ms at {options.tflops:g} TFLOP/s and {options.gb_per_second:g} GB/s (c: compute, b: bandwidth)\n")
    print("| stage | " + " | ".join(found) + " |\n|---|" + "---|" * len(found))
    for name in next(iter(found.values()))["stages"]:
        cells = [f["stages"][name] for f in found.values()]
        print(f"| {name} | " + " | ".join(f"{1e3 * c['floor_seconds']:.1f} {c['bound'][0]}" for c in cells) + " |")
    print("| **all** | " + " | ".join(f"**{1e3 * f['floor_seconds']:.1f}**" for f in found.values()) + " |")
    print("| tokens/s | " + " | ".join(f"{f['tokens_per_second']:,.0f}" for f in found.values()) + " |")
    print("| useful FLOPs, of the matrix rate | " + " | ".join(f"{100 * f['share_of_matrix_rate']:.0f} %" for f in found.values()) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""The least a step can take, stage by stage: FLOPs over the matrix rate, bytes over the bandwidth, whichever is longer. Arithmetic alone.

    python benchmarks/floors.py [--config configs/mixtral_8x7b_cs_sparse.yaml] [--shapes 1x128,8x512,32x512,24x2048]
                                [--tflops 780 --gb-per-second 4300] [--json]
    python benchmarks/floors.py --measured RUN            # floor, measured seconds and their ratio, stage by stage, of a profiled run
    moejax breakdown RUN --json > FILE; python benchmarks/floors.py --measured FILE --config CONFIG --shapes 10x128

What is counted is what the program of this repository does (full rematerialization, frozen weights dequantized once a pass): each operand
read once and each result written once, tiles and padding left out. The default rates were measured by others on one H200: an 8192-cubed
bf16 product, and a copy; of a profiled run they are those that it measured, or its GPU's data sheet's. The sum of the stages is a floor of
this program, kernel after kernel, not of the task.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, assert_never

sys.path.insert(0, str(Path(__file__).parent.parent))

from moejax import config as configuration
from moejax.config import Experiment
from moejax.errors import UserError
from moejax.estimator import sizes
from moejax.estimator.roofline import QLORA_BYTES
from moejax.estimator.sizes import architecture_of
from moejax.models.config import Architecture, specs
from moejax.models.config.adapters import Pair

FP32 = 4
SIZES = {"bfloat16": 2, "float32": 4}


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


def dequantization(item: int, weights: float, passes: float) -> Stage:
    """Codes and scales read, numbers of `item` bytes written."""
    return Stage("", 2 * weights * passes, weights * passes * (QLORA_BYTES + item))


def experts(item: int, d: int, spec: specs.MoE, n: float, trained: bool, quantized: bool, pairs: list[Pair]) -> list[Stage]:
    """w1 and w3 are multiplied forward, again, and for the gradient of their input; w2 not again; trained ones for their own too.
    pairs: the adapters on the three."""
    f, e, k = spec.hidden, spec.experts, spec.experts_per_token
    passes = (3 + trained) + (3 + trained) + (2 + trained)
    out = [merged("moe/w1, w3, w2", product(item, n, d, f, passes, e, n * k))]
    if quantized:
        out.append(merged("moe: dequantization", dequantization(item, 3 * e * d * f, 2)))
    if pairs:  # forward, again, and a product each for the gradients of A, B and what goes in; a shared A (its input has d numbers) once
        sides = [(d + f if pair.shares is None else f, pair.rank) for pair in pairs]
        out.append(merged("moe/lora", *(product(item, n, side, rank, 4, e, n * k) for side, rank in sides)))
    moved = 0.0 if spec.dense else 8 * item * n * k * d
    out.append(Stage("moe/dispatch, combine", 0, moved))
    # Forward (read two, write one), and backward (read three, write three); recomputed rows stay where they are.
    out.append(Stage("moe/act", 10 * n * k * f, 9 * item * n * k * f))
    return out


def attention(item: int, d: int, spec: specs.GQA, rows: int, length: int, trained: bool, quantized: bool) -> list[Stage]:
    n, q, kv = rows * length, spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim
    pairs = rows * length * (length + 1) / 2
    out = [merged("attention: projections", product(item, n, d, q + 2 * kv, 3 + trained), product(item, n, q, d, 2 + trained))]
    if quantized:
        out.append(merged("attention: dequantization", dequantization(item, d * (q + 2 * kv), 3), dequantization(item, q * d, 2)))
    # Scores and weighted values; backward the scores again, and the gradients of weights, values, queries and keys. Nothing is written.
    return [*out, Stage("attention: scores", 14 * pairs * q, 3 * item * n * (2 * q + 2 * kv))]


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
    """The loss in chunks of 1024 tokens, which read the head anew; Adam: weight, two moments, read and written, and the gradient twice."""
    chunks = -(-n // 1024)
    head = product(item, n, c.hidden_size, c.vocab_size, 2 + trained, chunks)
    return [Stage("loss", head.flops, head.bytes), Stage("optimizer", 14 * weights, weights * param_bytes * 8)]


def floors(experiment: Experiment, config: Architecture, rows: int, length: int) -> list[Stage]:
    """All stages of one optimizer step with one micro-batch of rows x length tokens."""
    t, adapter, q = experiment.training, experiment.adapter, experiment.quantization
    item, d, n, full = SIZES[t.compute_dtype], config.hidden_size, rows * length, adapter is None
    quantized = set(config.resolve_groups(q.modules)) if q.kind else set()
    weights = float(sum(w.size for w in sizes.stored(experiment, config) if w.trained))
    found: dict[str, Stage] = {}
    for stack in config.stacks:
        mixer, moe = stack.block.halves
        match mixer:
            case specs.GQA():
                stages = attention(item, d, mixer, rows, length, full, "attention" in quantized)
            case specs.Mamba():
                stages = mamba(item, d, mixer, n, full)
            case _:
                assert_never(mixer)
        pairs = adapter.lora.of(config) if adapter else {}
        on_experts = [pair for target, pair in pairs.items() if target in moe.groups["experts"]]
        stages += experts(item, d, moe, n, full, "experts" in quantized, on_experts)
        stages.append(Stage("norms, stream", 0, 2 * 8 * (FP32 if config.stream.fp32 else item) * n * d))
        for stage in stages:
            found[stage.name] = merged(stage.name, found.get(stage.name, Stage("", 0, 0)), *[stage] * stack.repeats)
    return [*found.values(), *ends(item, config, n, full, weights, SIZES[t.stored_dtype] if full else FP32)]


def useful_flops(config: Architecture, experiment: Experiment, rows: int, length: int) -> float:
    """Model FLOPs as model FLOP utilization counts them (moejax/training/flops.py): no recomputation."""
    from moejax.hub.model import adapter_config
    from moejax.training import flops

    counted = flops.count(config, adapter_config(experiment))
    return counted.step(rows * length, flops.visible_pairs([length] * rows))


# What is measured under a stage's floor, by the profile's names (moejax/profiling/scopes.py). The rest is told as "no floor".
MEASURED = {
    "attention: projections": ("attention", "attention/norm", "attention/lora"), "attention: dequantization": ("attention/dequant",),
    "attention: scores": (),
    "mamba: projections": ("mamba", "mamba/dequant", "mamba/lora"), "mamba/scan": ("mamba/scan",), "mamba/conv, gate": ("mamba/conv",),
    "moe/w1, w3, w2": ("moe/w1", "moe/w3", "moe/w2"), "moe: dequantization": ("moe/w1_dequant", "moe/w3_dequant", "moe/w2_dequant"),
    "moe/lora": ("moe/lora",), "moe/dispatch, combine": ("moe/dispatch", "moe/combine"), "moe/act": ("moe/act",),
    "norms, stream": ("norm", "layers", "embed"), "loss": ("loss", "head_dequant"), "optimizer": ("optimizer",),
}  # fmt: skip
TOGETHER = {"attention: scores": "attention: projections"}  # one name in the profile


@dataclass(frozen=True)
class Profiled:
    """A profiled run. seconds: by stage, a step's. rates: FLOP/s and bytes/s of its device; None, as config and shape, where unknown."""

    seconds: dict[str, float]
    rates: tuple[float | None, float | None]
    config: str | None = None
    shape: str | None = None


def profiled(path: Path) -> Profiled:
    """A profiled run's folder, or what `moejax breakdown --json` printed of one run. Raises UserError."""
    from moejax.commands import breakdown
    from moejax.profiling import schema

    if path.is_dir():
        run, profile = breakdown.as_dict(breakdown.load(path)), schema.read(path)
        shape = f"{round(profile.batch.rows or 0)}x{round(profile.batch.row_tokens or 0)}"
        return Profiled(*_stages(run, path), str(path / "config.yaml"), shape)
    how = f"--measured {path}: expected a profiled run's folder, or what `moejax breakdown RUN --json` printed"
    try:
        runs = json.loads(path.read_text(encoding="utf-8"))
        if len(runs) != 1:
            raise UserError(f"{how} of one run, found {len(runs)}")
        return Profiled(*_stages(runs[0], path))
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{how} ({type(error).__name__}: {error})") from None


def _stages(run: dict[str, Any], path: Path) -> tuple[dict[str, float], tuple[float | None, float | None]]:
    if not run["stages"]:
        raise UserError(f"--measured {path}: there is no trace, so no stage's time is known: profile the run with `moejax profile CONFIG`")
    seconds = {stage["name"]: stage["seconds"] for stage in run["stages"]} | {"idle": run["idle"] or 0.0}
    return seconds, (run["peaks"]["flops_per_second"], run["peaks"]["bytes_per_second"])


def compared(stages: list[Stage], rates: tuple[float, float], seconds: dict[str, float]) -> list[tuple[str, float | None, float]]:
    """(stage, floor's seconds or None, measured seconds); what has no floor behind the others. Every measured second is in one row."""
    floor = {s.name: s.seconds(*rates)[0] for s in stages}
    rest = dict(seconds)
    rows: list[tuple[str, float | None, float]] = []
    for name in floor:
        if name in TOGETHER:
            continue
        joined = [name, *(other for other, first in TOGETHER.items() if first == name and other in floor)]
        title = " and ".join([name, *(other.partition(": ")[2] for other in joined[1:])])
        rows.append((title, sum(floor[j] for j in joined), sum(rest.pop(scope, 0.0) for scope in MEASURED[name])))
    return rows + [(f"no floor: {name}", None, spent) for name, spent in sorted(rest.items(), key=lambda item: -item[1]) if spent]


def tell(rows: list[tuple[str, float | None, float]]) -> None:
    """The comparison as Markdown."""
    whole = "all", sum(floor or 0.0 for _, floor, _ in rows), sum(spent for _, _, spent in rows)
    print("| stage | floor, ms | measured, ms | times |\n|---|---|---|---|")
    for name, floor, spent in [*rows, whole]:
        cells = ("", "") if floor is None else (f"{1e3 * floor:.2f}", f"{spent / floor:.1f}" if floor else "")
        print(f"| {name} | {cells[0]} | {1e3 * spent:.2f} | {cells[1]} |")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--config", help="default: configs/mixtral_8x7b_cs_sparse.yaml, or the profiled run's own")
    parser.add_argument("--shapes", help="rows x tokens, comma-separated (default: 1x128,8x512,32x512,24x2048, or the profiled run's own)")
    parser.add_argument("--tflops", type=float, help="matrix rate (default: 780, or the profiled run's)")
    parser.add_argument("--gb-per-second", type=float, help="bandwidth (default: 4300, or the profiled run's)")
    parser.add_argument("--measured", type=Path, metavar="RUN", help="a profiled run's folder, or what moejax breakdown RUN --json printed")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("overrides", nargs="*", metavar="key.sub=value")
    options = parser.parse_args()
    try:
        run = None if options.measured is None else profiled(options.measured)
        known = (None, None) if run is None else run.rates
        given = (options.tflops and options.tflops * 1e12, options.gb_per_second and options.gb_per_second * 1e9)
        rates = given[0] or known[0] or 780e12, given[1] or known[1] or 4300e9
        options.config = options.config or (run and run.config) or "configs/mixtral_8x7b_cs_sparse.yaml"
        options.shapes = options.shapes or (run and run.shape) or "1x128,8x512,32x512,24x2048"
        experiment = configuration.load(options.config, options.overrides)
        config = architecture_of(experiment)
        shapes = [tuple(int(n) for n in shape.split("x")) for shape in options.shapes.split(",")]
        if any(len(shape) != 2 or min(shape) < 1 for shape in shapes):
            raise UserError(f"--shapes {options.shapes}: expected rows x tokens, e.g. 8x512,24x2048")
        if run is not None and len(shapes) != 1:
            raise UserError("--measured FILE: say what was run, with --config FILE and --shapes ROWSxTOKENS")
    except (UserError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    told = f"at {rates[0] / 1e12:.4g} TFLOP/s and {rates[1] / 1e9:.4g} GB/s"
    if run is not None:
        stages = compared(floors(experiment, config, *shapes[0]), rates, run.seconds)
        if options.json:
            print(json.dumps([dict(zip(("stage", "floor_seconds", "seconds"), row, strict=True)) for row in stages], indent=1))
            return 0
        print(f"{options.measured}, {options.shapes}: floor {told}\n")
        tell(stages)
        return 0
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
    print(f"{options.config}: floor in ms {told} (c: compute, b: bandwidth)\n")
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

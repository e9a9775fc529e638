"""What a config's step is on a GPU that is not there, read from the program that XLA compiles for it: bytes, FLOPs, kernels, launches,
memory of the device (and, with `placement`, of the host). Nothing runs; milliseconds are derived.

    python benchmarks/gpu_model.py --config configs/mixtral_8x7b_cs_sparse.yaml --gpu H100 --shapes 1x128,8x512,24x2048 [--stages]
    python benchmarks/gpu_model.py --config configs/*.yaml --gpu H100,A100-80,A40 --shapes own,8xown --remat none,full --out FILE

--shapes: rows x tokens; `own`: the config's, `8xown`: eight times as many rows. Loops over the experts' tiles run as often as 64 drawn
routings need (--even: as equal loads need, which flatters them).

kernels: all that the device is given, by XLA's thunks after its passes; outside: those that the host launches one by one; graphs: launches
of CUDA graphs, which hold the others; syncs: how often a loop whose trip count is data asks the host; copies: how often a tile copies an
expert's matrix in bf16; fetched: what is copied out of the host's memory. Milliseconds: by the constants below, and of a GPU other than
Hopper its data sheet in their place, in the same proportion; +-30 %, a difference of two programs is better than that.
closed_form_error: the estimator's closed form over the compiler's peak, less 1.

With `mesh.devices=8 mesh.weights=spread` (or experts, whole) rows are those of all devices, everything else is of one; received: what
it gets from the others, and what the estimator says of it.

Needs the extra: pip install -e '.[aot]'; JAX_PLATFORMS=cpu is set here.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import sys
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
sys.path.insert(0, str(Path(__file__).parent.parent))

import floors
import kept

from moejax import config, gpus, installation
from moejax.errors import UserError
from moejax.estimator.own import DECODE, GROUPED, H200_CLOCKS, SCAN_BACKWARD, SCAN_FORWARD

PRODUCTS, EFFICIENCY, BANDWIDTH, OTHERS = 790e12, 0.85, 4.3e12, 60e12
"""Of one H200: FLOP/s of a large bf16 product, what of it products of a step reach, bytes/s of a copy, FLOP/s outside of products."""
HOST_SPACE = 5  # XLA's number of the host's memory
IN_GRAPH, OUTSIDE, GRAPH, SYNC = 2e-6, 4e-6, 8e-6, 20e-6
"""Seconds beyond its work: of a kernel in a CUDA graph and outside; of a graph's launch; of asking the host."""
FLASH_FORWARD, FLASH_BACKWARD = 375e12, 275e12
"""FLOP/s of kernels of Pallas, which nobody has timed here."""
SHEET = 989e12, 4.8e12
"""The data sheet's figures of the same card: another card's constants are in proportion to its own."""
_THUNK = re.compile(r"^(\s*)(\d{3,}): (k\w+)\s")
_NESTING = ("kCommandBuffer", "kWhile", "kConditional", "kSequential", "kDynamicSliceFusion")


@dataclass(frozen=True)
class Rates:
    """FLOP/s of products and of the rest, bytes/s."""

    products: float = PRODUCTS
    others: float = OTHERS
    bandwidth: float = BANDWIDTH

    @classmethod
    def of(cls, card: gpus.GPU) -> Rates:
        if card.compiler is None or card.compiler.compute_capability == "9.0":
            return cls()
        products, bandwidth = card.flops_per_second / SHEET[0], card.bytes_per_second / SHEET[1]
        units = card.compiler.multiprocessors * card.compiler.clock_ghz / H200_CLOCKS
        return cls(PRODUCTS * products, OTHERS * units, BANDWIDTH * bandwidth)


@dataclass
class Thunks:
    """What the host does, by the names of instructions: how many kernels of each, whether in a graph, which graphs and loops it runs."""

    kernels: Counter[str] = field(default_factory=Counter)
    buffered: set[str] = field(default_factory=set)
    graphs: list[str] = field(default_factory=list)
    """One of the instructions of each."""
    host_loops: set[str] = field(default_factory=set)


def thunks(folder: Path) -> Thunks:
    """Of a program that XLA dumped there."""
    files = {path.name.split(".", 2)[-1]: path for path in folder.iterdir()}
    sequence = files.get("thunk_sequence_after_thunk_passes.txt") or files["thunk_sequence.txt"]
    named = re.findall(r'profile_annotation: "([^"]*)"\s*thunk_id: (\d+)', files["thunk_metadata.txt"].read_text())
    names = {int(number): name for name, number in named}
    found, open_ones, graphs = Thunks(), [], []  # type: ignore[var-annotated]
    for line in sequence.read_text().splitlines():
        match = _THUNK.match(line)
        if match is None:
            continue
        indent, kind, name = len(match[1]), match[3], names.get(int(match[2]), "")
        while open_ones and open_ones[-1][0] >= indent:
            open_ones.pop()
        kinds = [kind for _, kind, _ in open_ones]
        inside = "kCommandBuffer" in kinds
        if kind in _NESTING:
            graph: list[str] = []
            open_ones.append((indent, kind, graph))
            if kind == "kCommandBuffer":
                graphs.append(graph)
            if kind == "kWhile" and not inside:
                found.host_loops.add(name)
        if kind in ("kCommandBuffer", "kWhile", "kConditional", "kSequential") or "kDynamicSliceFusion" in kinds:
            continue
        found.kernels[name] += 1
        if inside:
            found.buffered.add(name)
            next(graph for _, kind, graph in reversed(open_ones) if kind == "kCommandBuffer").append(name)
    found.graphs = [graph[0] for graph in graphs if graph]
    return found


@dataclass
class Step:
    """One run of a program: what it computes, moves and launches; `stages`: seconds of each by the rates, its launches included."""

    flops: float = 0.0
    bytes: float = 0.0
    kernels: float = 0.0
    outside: float = 0.0
    graphs: float = 0.0
    syncs: float = 0.0
    copies: float = 0.0
    fetched: float = 0.0
    seconds: float = 0.0
    stages: dict[str, float] = field(default_factory=lambda: defaultdict(float))


def step(executable: Any, host: Thunks, trips: Any, rates: Rates, matrix: int = 0) -> Step:
    """Counted along the loops as `trips` says. matrix: numbers of an expert's matrix."""
    from moejax.profiling.program import BF16, CONTAINERS, Program, known_trips, module_of

    program, found = Program(module_of(executable)), Step()
    runs, tiles = program.executions({}, trips), program.loops_of_data()
    times: dict[str, float] = {}
    for computation, count in runs.items():
        for i in program.computations[computation].instructions:
            times[i.name] = count
            if i.name in host.host_loops and i.opcode == "while":
                body = runs[i.called_computation_ids[0]]
                found.syncs += 0 if known_trips(i) is not None else count + body
            found.fetched += count * _fetched(i)
            kernels = host.kernels.get(i.name, 0)
            if i.opcode in CONTAINERS or not (kernels or program.bytes_of(i) or program.flops_of(i)):
                continue
            flops, moved, product = program.flops_of(i), program.bytes_of(i), program.is_product(i)
            rate, least = rates.products * EFFICIENCY if product else rates.others, 0.0
            if (kernel := _kernel(i)) is not None:
                flops, rate = kernel.work(i), kernel.rate * getattr(rates, kernel.follows) / getattr(Rates(), kernel.follows)
            if (grouped := _grouped(i, program.operands(i))) is not None:
                flops, moved, weights = grouped
                rate, least = GROUPED * rates.products / PRODUCTS, weights / DECODE * OTHERS / rates.others
            if computation in tiles and program.copies(i, matrix, BF16):
                found.copies += count
            extra = IN_GRAPH if i.name in host.buffered else OUTSIDE
            seconds = count * (max(flops / rate, moved / rates.bandwidth, least) + kernels * extra)
            found.flops += count * flops
            found.bytes += count * moved
            found.kernels += count * kernels
            found.outside += 0 if i.name in host.buffered else count * kernels
            found.seconds += seconds
            place = max(program.shares(i.name).items(), key=lambda item: item[1])[0]
            found.stages[f"{place.stage} ({place.phase})"] += seconds
    found.graphs = sum(times.get(name, 0.0) for name in host.graphs)
    waiting = found.graphs * GRAPH + found.syncs * SYNC
    found.seconds += waiting
    found.stages["graphs' launches, host"] = waiting
    return found


def _fetched(i: Any) -> float:
    """Bytes that an instruction begins to bring out of the host's memory."""
    from moejax.profiling.program import size

    if i.opcode not in ("async-start", "copy-start"):
        return 0.0
    first, second = i.shape.tuple_shapes[:2]
    source, result = (first.tuple_shapes[0], second) if i.opcode == "async-start" else (second, first)
    return size(result) if source.layout.memory_space == HOST_SPACE != result.layout.memory_space else 0.0


class Kernel(NamedTuple):
    """One of Pallas. rate: its FLOP/s (of a scan states/s) on an H200; follows: which of a card's rates it goes with; work: what a call of
    it computes, in the same."""

    rate: float
    follows: str
    work: Callable[[Any], float]


def _attended(i: Any, products: int) -> float:
    """FLOPs of causal products of queries with keys, half of the square: the first result is [rows, tokens, heads, numbers of a head]."""
    from moejax.profiling.program import elements

    first = i.shape.tuple_shapes[0]
    return products * elements(first) * first.dimensions[1]


def _scanned(i: Any, states: int) -> float:
    """States that the scan runs through: rows x tokens x channels (the first result) x states (of the result with this number)."""
    from moejax.profiling.program import elements

    results = i.shape.tuple_shapes
    return elements(results[0]) * results[states].dimensions[1]


KERNELS = {
    "mha_forward": Kernel(FLASH_FORWARD, "products", partial(_attended, products=2)),
    "mha_backward": Kernel(FLASH_BACKWARD, "products", partial(_attended, products=5)),  # as FlashAttention's rates are given
    "scan_forward": Kernel(SCAN_FORWARD, "others", partial(_scanned, states=1)),
    "scan_backward": Kernel(SCAN_BACKWARD, "others", partial(_scanned, states=2)),
}
"""By what stands in its name."""


def _kernel(i: Any) -> Kernel | None:
    if i.opcode != "custom-call":
        return None
    name = f"{i.metadata.op_name} {i.name}"
    return next((kernel for word, kernel in KERNELS.items() if word in name), None)


def _grouped(i: Any, operands: list[Any]) -> tuple[float, float, float] | None:
    """Of a kernel of the backend `decode`: FLOPs, bytes, and how many weights it decodes: once for each tile of rows of an expert. Of the
    stack of layers it reads one. None of anything else."""
    from moejax.models.ops.grouped import kernels
    from moejax.profiling.program import elements, size

    name = re.search(r"(?:decode|grouped)_(forward|backward|gradient)", f"{i.metadata.op_name} {i.name}")
    if i.opcode != "custom-call" or name is None:
        return None
    shapes, result = [o.shape for o in operands], i.shape.tuple_shapes[0] if i.shape.tuple_shapes else i.shape
    if name[1] == "gradient":
        return 2 * shapes[1].dimensions[0] * elements(result) / result.dimensions[0], size(result) + sum(map(size, shapes)), 0.0
    (rows, columns), stack = shapes[2].dimensions, shapes[3]
    read = [size(s) / (s.dimensions[0] if len(s.dimensions) > 2 else 1) for s in shapes]
    tiles = max(1.0, rows / kernels.MOST_ROWS / stack.dimensions[1])
    weights = 2 * elements(stack) / stack.dimensions[0] if len(shapes) > 4 else 0.0
    flops = 2.0 * elements(result) / result.dimensions[0] * columns
    return flops, size(result) + sum(read), weights * tiles


def compiled(experiment: Any, gpu: str, rows: int, length: int, even: bool = False) -> tuple[dict[str, Any], Step, Any]:
    """One step for one GPU, or for each of several: what is told of it, its counts, and the executable."""
    from moejax.estimator import closed_form, spread
    from moejax.estimator.sizes import architecture_of
    from moejax.profiling import collectives
    from moejax.profiling.program import Program, module_of
    from moejax.training import experts
    from moejax.training.program import TrainProgram

    if experiment.training.remat == "auto":  # what it comes down to on a full card
        experiment = experiment.changed("training", remat="full")
    sizes, card, mesh, n = architecture_of(experiment), gpus.find(gpu), experiment.mesh, spread.count(experiment)
    each, dealt = rows // n, n if mesh is not None and mesh.weights == "experts" else 1
    tokens = dealt * each * length
    together = experiment.training.together
    with tempfile.TemporaryDirectory() as folder:
        c = TrainProgram(experiment, sizes, gpu=gpu, dump=Path(folder)).compile(rows, length)
        host = thunks(Path(folder))
    plan, closed = experts.plan(experiment, sizes, tokens, card), None
    if experiment.training.remat in closed_form.KNOWN:
        closed = closed_form.on(card, experiment, sizes, rows, length).total
    loads = (experts.uniform_loads if even else experts.random_loads)(sizes, together * tokens)[..., : sizes.num_experts // dealt]
    rates = Rates.of(card)
    matrix = sizes.hidden_size * sizes.intermediate_size
    trips = None if plan is None else experts.routed(plan, loads)
    s = step(c.executable, host, trips, rates, matrix)
    floor = sum(stage.seconds(rates.products, rates.bandwidth)[0] for stage in floors.floors(experiment, sizes, each, length))
    useful = floors.model_flops(experiment, each, length)
    between = {}
    if mesh is not None:
        program = Program(module_of(c.executable))
        found = collectives.of_program(program, n, trips)
        between = {
            "devices": n, "weights": mesh.weights, "moments": mesh.moments,
            "collectives": {kind: round(k.count) for kind, k in found.items()},
            "received_gb": round(sum(k.bytes for k in found.values()) / 1e9, 4),
            "estimated_gb": round(spread.traffic(experiment, sizes, rows * length).total / 1e9, 4),
            "under_data": collectives.under_data(program),
        }  # fmt: skip
    return {
        "config": experiment.name, "gpu": gpu, "rows": rows, "row_tokens": length, "remat": experiment.training.remat,
        "backend": "dense" if plan is None else plan.backend, "tile": None if plan is None else [plan.tile, plan.small_tile],
        "peak_gb": round(c.peak_bytes / 1e9, 3), "host_gb": round(c.host_bytes / 1e9, 3), "arguments_gb": round(c.argument_bytes / 1e9, 3),
        "closed_form_error": None if closed is None else round(closed / c.peak_bytes - 1, 4),
        "tflop": round(s.flops / 1e12, 2), "moved_gb": round(s.bytes / 1e9, 1), "fetched_gb": round(s.fetched / 1e9, 2),
        "kernels": round(s.kernels), "outside": round(s.outside), "graphs": round(s.graphs), "syncs": round(s.syncs),
        "copies": round(s.copies),
        "derived_ms": round(1e3 * s.seconds, 1), "floor_ms": round(1e3 * floor, 1),
        "useful_share": round(useful / s.seconds / rates.products, 4), "compile_seconds": round(c.seconds, 1), **between,
    }, s, c.executable  # fmt: skip


def shape(text: str, experiment: Any) -> tuple[int, int]:
    """`8x512`, `own` or `8xown`. Raises UserError."""
    match = re.fullmatch(r"(?:(\d+)x)?(own|\d+)", text)
    if match is None or (match[2] != "own" and match[1] is None):
        raise UserError(f"--shapes {text}: expected rows x tokens (8x512), `own` or `8xown`")
    if match[2] == "own":
        return int(match[1] or 1) * experiment.data.batch_rows, experiment.data.longest_row
    return int(match[1]), int(match[2])


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", nargs="+", default=["configs/mixtral_8x7b_cs_sparse.yaml"])
    parser.add_argument("--gpu", default="H100", help="comma-separated")
    parser.add_argument("--shapes", default="1x128,8x512", help="comma-separated")
    parser.add_argument("--remat", default=None, help="comma-separated policies; by default the config's own")
    parser.add_argument("--even", action="store_true", help="every expert has its share, instead of drawn routings")
    parser.add_argument("--stages", action="store_true", help="derived milliseconds by stage, the largest first")
    parser.add_argument("--dump", type=Path, help="write the optimized HLO of the last program here")
    parser.add_argument("--out", type=Path, help="JSON of everything, with versions")
    parser.add_argument("overrides", nargs="*", default=[])
    options = parser.parse_intermixed_args()
    report = kept.about(versions=installation.versions(), steps=[])
    for path, gpu in itertools.product(options.config, options.gpu.split(",")):
        for remat in options.remat.split(",") if options.remat else [None]:
            chosen = [] if remat is None else [f"training.remat={remat}"]
            experiment = config.load(path, [*options.overrides, *chosen])
            for text in options.shapes.split(","):
                told, counts, executable = compiled(experiment, gpu, *shape(text, experiment), options.even)
                print(json.dumps(told), flush=True)
                if options.stages:
                    for name, seconds in sorted(counts.stages.items(), key=lambda item: -item[1])[:25]:
                        print(f"  {1e3 * seconds:9.2f} ms  {name}")
                report["steps"].append(told)
                kept.write(options.out, report)
    if options.dump:
        options.dump.write_text(executable.as_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Both frameworks on one GPU at the real shapes, with random weights: `make bench-gpu`.

    python benchmarks/gpu_frameworks.py [--cases NAME …] [--out FILE.json]
    python benchmarks/gpu_frameworks.py --tiny           # the whole path with small models on a CPU

Each case is measured twice. "same batch": all sides at once, each in its share of the memory, take turns step by step. "best batch": each
side alone doubles its rows until memory is full, then tries the middle; its fastest batch is timed again, the sides' processes in turn.
"one query": a single row, moejax alone, where the case has a bar for it. A cell that cannot be run holds the reason and the others go on.
Weights are made on the device (NF4 codes without a 16-bit model), tokens are random, one query fills a row. The first steps are warm-up;
compilation is apart. Behind the table: every bar, what it needs and what was reached. On a GPU nothing of this has been run yet.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # here; the sides' processes take the GPU
HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT), str(HERE)]

import handover
import kept
import torch_run
import turns
from turns import Side, Stopped

from moejax import config as configuration
from moejax import gpus
from moejax.config import Experiment
from moejax.device import cpu_name
from moejax.errors import UserError
from moejax.estimator import prices
from moejax.estimator.roofline import QLORA_BYTES
from moejax.hub.model import adapter_config, architecture
from moejax.training import flops

RANDOM = [
    "model.source=null", "data.source=null", "data.records=null", "data.bytes=null", "data.sha256=null", "data.batching=fixed",
    "training.steps=1000000", "training.epochs=null", "checkpoint.every=null",
]  # fmt: skip
FORMULA = (
    "share of the matrix rate = model FLOPs of a step / (median step seconds x matrix rate). Model FLOPs: moejax/training/flops.py, the "
    "same for both sides, recomputation left out. Matrix rate: 2 n^3 / seconds of a square product, the best that any side measured here"
)


@dataclass(frozen=True)
class Case:
    """What is trained, by a config and overrides, and which stack of PyTorch stands beside it."""

    config: str
    stack: str
    overrides: tuple[str, ...] = ()


# A family's tiny model for a CPU; bitsandbytes reads 4-bit weights rightly there where rows are multiples of its blocks of 64.
_TINY = (
    "training.compute_dtype=float32", "training.param_dtype=float32", "data.row_tokens=64", "data.max_length=64",
    "model.overrides={num_layers: 2, intermediate_size: 128}",
)  # fmt: skip
TINY = {"mixtral": "mixtral-tiny", "blackmamba": "blackmamba-tiny", "qwen3": "qwen3-moe-tiny", "olmoe": "olmoe-tiny"}
_BF16 = "quantization.format=none"
_SHARED = (_BF16, "adapter.share=[w1,w3]")  # what `today` trains
_SMALL = "model.overrides.num_layers=8"
NF4, BF16, BF16_SMALL, MAMBA = (
    "Mixtral-8x7B, NF4, k = 2", "Mixtral-8x7B, bf16, shared A, k = 2", "Mixtral, 8 of 32 layers, bf16, shared A, k = 2",
    "BlackMamba-2.8B, bf16, k = 2",
)  # fmt: skip
CASES = {
    NF4: Case("mixtral_8x7b_cs_sparse", "study"),
    "Mixtral-8x7B, NF4, k = 8": Case("mixtral_8x7b_cs_dense", "study"),
    BF16: Case("mixtral_8x7b_cs_sparse", "today", _SHARED),
    BF16_SMALL: Case("mixtral_8x7b_cs_sparse", "today", (*_SHARED, _SMALL)),
    "Mixtral, 8 of 32 layers, bf16, k = 2": Case("mixtral_8x7b_cs_sparse", "study", (_BF16, _SMALL)),
    MAMBA: Case("blackmamba_2.8b_cs_sparse", "plain"),
    "BlackMamba-2.8B, bf16, k = 8": Case("blackmamba_2.8b_cs_dense", "plain"),
    "Qwen3-30B-A3B, NF4, k = 8": Case("qwen3_30b_a3b_24gb", "study"),
    "Qwen3-30B-A3B, bf16, shared A, k = 8": Case("qwen3_30b_a3b_80gb", "today", _SHARED),
    "OLMoE-1B-7B, NF4, k = 8": Case("olmoe_1b_7b", "study"),
    "OLMoE-1B-7B, bf16, shared A, k = 8": Case("olmoe_1b_7b", "today", _SHARED),
}


@dataclass(frozen=True)
class Settings:
    """What the command line says. pythons: of each stack's environment; arguments: for every process of PyTorch's."""

    tiny: bool
    steps: int
    row_tokens: int
    rows: int
    most_rows: int
    pythons: dict[str, Path]
    arguments: list[str]

    def overrides(self, case: Case, rows: int) -> list[str]:
        length = [f"data.row_tokens={self.row_tokens}", f"data.max_length={self.row_tokens}"]
        tiny = (f"model.preset={TINY[case.config.split('_')[0]]}", *_TINY) if self.tiny else ()
        return [*RANDOM, *length, *case.overrides, *tiny, f"data.batch_rows={rows}"]

    def experiment(self, case: Case, rows: int) -> Experiment:
        return configuration.load(ROOT / "configs" / f"{case.config}.yaml", self.overrides(case, rows))


def start(name: str, case: Case, rows: int, settings: Settings, fraction: float) -> Side:
    """One side's process ("moejax", or a stack), with `fraction` of the memory. Raises Stopped, UserError."""
    if name == "moejax":
        environment: dict[str, str | None] = {"XLA_CLIENT_MEM_FRACTION": f"{0.94 * fraction:.2f}"}
        environment["JAX_PLATFORMS"] = "cpu" if settings.tiny else None
        path = ROOT / "configs" / f"{case.config}.yaml"
        return turns.jax_side(path, settings.overrides(case, rows), ["--random", "--peaks"], environment)
    with tempfile.TemporaryDirectory() as folder:  # read when the process says that it is ready
        handover.write_random(settings.experiment(case, rows), Path(folder), stack_name=name)
        arguments = ["--base", "nf4", "--peaks", "--memory-fraction", f"{fraction:.2f}", *settings.arguments]
        return turns.torch_side(Path(folder), name, settings.pythons[name], arguments)


def reason(error: Exception) -> dict[str, Any]:
    """A cell that could not be run."""
    memory = isinstance(error, Stopped) and error.out_of_memory
    return {"error": f"out of memory: {error}" if memory else str(error), "out_of_memory": memory}


def same_batch(names: list[str], case: Case, settings: Settings, begin: Callable[..., Side]) -> dict[str, Any]:
    """All sides at `settings.rows`, step by step in turn. One that cannot run leaves the others in the game."""
    cells: dict[str, Any] = {}
    fraction = 1.0 / len(names)
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in names:
            try:
                sides[name] = stack.enter_context(begin(name, case, settings.rows, settings, fraction))
            except (Stopped, UserError) as error:
                cells[name] = reason(error)
        taken: dict[str, list[dict[str, Any]]] = {}
        while sides and not taken:
            try:
                taken = turns.alternate(sides, settings.steps)
            except Stopped as error:  # one fell; the rest goes on without it
                fallen = next(name for name, side in sides.items() if side.ended)
                cells[fallen] = reason(error)
                del sides[fallen]
        for name, steps in taken.items():
            cells[name] = {"rows": settings.rows, "about": sides[name].about} | turns.summary(steps)
    return {name: cells[name] for name in names}


def best_batch(names: list[str], case: Case, settings: Settings, begin: Callable[..., Side]) -> dict[str, Any]:
    """Each side's own fastest batch: found alone in the whole memory, then timed in two rounds, the sides in turn."""
    cells: dict[str, Any] = {}
    for name in names:
        tried = search(name, case, settings, begin)
        ran = [t for t in tried if "error" not in t]
        if ran:
            best, largest = max(ran, key=lambda t: t["queries_per_second"])["rows"], max(t["rows"] for t in ran)
            cells[name] = {"rows": best, "largest_rows_that_ran": largest, "tried": tried, "steps": []}
        else:
            cells[name] = tried[-1] | {"tried": tried}
    for _ in range(2):
        for name, cell in cells.items():
            if "error" not in cell:
                try:
                    with begin(name, case, cell["rows"], settings, 1.0) as side:
                        cell["steps"] += turns.alternate({name: side}, -(-settings.steps // 2))[name]
                        cell["about"] = side.about
                except Stopped as error:
                    cell |= reason(error)
    for cell in cells.values():
        steps = cell.pop("steps", [])
        cell |= {} if "error" in cell else turns.summary(steps)
    return cells


def search(name: str, case: Case, settings: Settings, begin: Callable[..., Side]) -> list[dict[str, Any]]:
    """Rows doubled until memory is full, then one try half-way. Every try, with its speed or why it did not run."""
    tries: list[dict[str, Any]] = []

    def attempt(rows: int) -> bool:
        try:
            with begin(name, case, rows, settings, 1.0) as side:
                tries.append({"rows": rows} | turns.summary(turns.alternate({name: side}, 3)[name]))
        except (Stopped, UserError) as error:
            tries.append({"rows": rows} | reason(error))
        return "error" not in tries[-1]

    rows = settings.rows
    while rows <= settings.most_rows and attempt(rows):
        rows *= 2
    if len(tries) > 1 and tries[-1].get("out_of_memory"):
        attempt(rows * 3 // 4)
    return tries


def judge(cells: list[dict[str, Any]], case: Case, settings: Settings, gpu: gpus.GPU | None) -> None:
    """Adds to every cell of a case: its share of the matrix rate (one rate for all of them), and dollars per 1,000 queries by the
    cheapest dated price of this GPU."""
    ran = [cell for cell in cells if "error" not in cell]
    rates = [cell["about"]["matrix_rate_flops"] for cell in ran if cell["about"].get("matrix_rate_flops")]
    price = prices.cheapest(prices.DATED, gpu.name) if gpu is not None else None
    for cell in ran:
        rate_cell(cell, model_flops(settings.experiment(case, cell["rows"])), max(rates, default=None), price)


def model_flops(experiment: Experiment) -> float:
    """Of a step whose rows are a query each."""
    rows, length = experiment.data.batch_rows, experiment.data.longest_row
    count = flops.count(architecture(experiment, None), adapter_config(experiment))
    return count.step(rows * length, flops.visible_pairs([length] * rows))


def rate_cell(cell: dict[str, Any], work: float, matrix_rate: float | None, price: prices.Price | None) -> None:
    """Adds what follows from a step's model FLOPs (`FORMULA`) and an hour's price."""
    cell["model_flops"], cell["matrix_rate_flops"] = work, matrix_rate
    cell["share_of_matrix_rate"] = work / cell["median"] / matrix_rate if matrix_rate else None
    cell["compile_seconds"] = cell["about"].get("compile_seconds")
    cell["usd_per_1000_queries"] = price.usd_per_hour / 3600 * 1000 / cell["queries_per_second"] if price else None
    cell["price"] = price.told if price else "no dated price of this device (moejax/estimator/prices.py)"


BATCHES = ("same batch", "best batch", "one query")
HEADER = ("case", "batch", "side", "rows x tokens", "s/step (spread)", "queries/s", "tokens/s", "of matrix rate", "peak memory",
          "USD per 1,000 queries", "compiled in")  # fmt: skip


def table(report: dict[str, Any]) -> str:
    """All cells as Markdown."""
    lines = ["| " + " | ".join(HEADER) + " |", "|" + "---|" * len(HEADER)]
    for name, case in report["cases"].items():
        for batch in BATCHES:
            for side, cell in case.get(batch, {}).items():
                lines.append("| " + " | ".join((name, batch, side, *_cells(cell, case["row_tokens"]))) + " |")
    return "\n".join(lines)


def _cells(cell: dict[str, Any], row_tokens: int) -> tuple[str, ...]:
    if "error" in cell:
        return (f"cannot run: {cell['error']}", *[""] * (len(HEADER) - 4))
    peak = next((value for key, value in cell.items() if key.endswith("peak_bytes")), None)
    share, usd, compiled = cell["share_of_matrix_rate"], cell["usd_per_1000_queries"], cell["compile_seconds"]
    return (
        f"{cell['rows']} x {row_tokens}",
        f"{cell['median']:.3f} ({cell['fastest']:.3f} to {cell['slowest']:.3f})",
        f"{cell['queries_per_second']:.2f}",
        f"{cell['tokens_per_second']:.0f}",
        "" if share is None else f"{100 * share:.1f} %",
        "" if peak is None else f"{peak / 1e9:.2f} GB",
        "no price" if usd is None else f"{usd:.3f}",
        "" if compiled is None else f"{compiled:.0f} s",
    )


class Missing(Exception):
    """What a bar is judged by was not measured: why."""


def _cell(cases: dict[str, Any], case: str, batch: str, side: str) -> dict[str, Any]:
    cell = cases.get(case, {}).get(batch, {}).get(side)
    if cell is None or "error" in cell:
        raise Missing(f"{case}, {batch}, {side}: {'not run' if cell is None else cell['error']}")
    found: dict[str, Any] = cell
    return found


def _ratio(cases: dict[str, Any], case: str, rate: str) -> float:
    """moejax's rate over PyTorch's, each at its own best batch."""
    theirs, ours = (_cell(cases, case, "best batch", side)[rate] for side in (CASES[case].stack, "moejax"))
    return float(ours / theirs)


def _matrix_share(cases: dict[str, Any]) -> float:
    share = _cell(cases, NF4, "best batch", "moejax")["share_of_matrix_rate"]
    if share is None:
        raise Missing("no matrix rate was measured")
    return float(share)


def _above_floor(cases: dict[str, Any]) -> float:
    """One query's seconds over the floor of the experts' weights: codes read, and bf16 written and read, three times over."""
    cell = _cell(cases, NF4, "one query", "moejax")
    bandwidth = cell["about"].get("copy_bytes_per_second")
    if not bandwidth:
        raise Missing("no bandwidth was measured")
    return float(cell["median"] * bandwidth / (3 * cases[NF4]["expert_weights"] * (QLORA_BYTES + 2 + 2)))


def _peak_error(cases: dict[str, Any]) -> float:
    """The largest deviation of the compiler's peak from the device's, over all of moejax's best batches."""
    found = [c["best batch"]["moejax"] for c in cases.values() if "error" not in c.get("best batch", {}).get("moejax", {"error": ""})]
    errors = [abs(c["about"]["compiler_peak_bytes"] / c["device_peak_bytes"] - 1) for c in found if "device_peak_bytes" in c]
    if not errors:
        raise Missing("no device told its peak")
    return max(errors)


Bar = tuple[str, str, float, Callable[[dict[str, Any]], float]]
BARS: tuple[Bar, ...] = (
    (f"{NF4}: queries/s over stack `study`, each at its best batch", "at least", 10.0,
     lambda c: _ratio(c, NF4, "queries_per_second")),
    (f"{NF4}: model FLOPs of the measured matrix rate", "at least", 0.4, _matrix_share),
    (f"{NF4}: one query over the floor of reading codes and writing and reading bf16 three times", "at most", 1.5, _above_floor),
    (f"{BF16}: tokens/s over stack `today`, each at its best batch", "at least", 1.2,
     lambda c: _ratio(c, BF16, "tokens_per_second")),
    (f"{BF16_SMALL}: the same", "at least", 1.2, lambda c: _ratio(c, BF16_SMALL, "tokens_per_second")),
    (f"{MAMBA}: queries/s over stack `plain`, each at its best batch", "at least", 2.0,
     lambda c: _ratio(c, MAMBA, "queries_per_second")),
    ("all cases: compiler's peak beside the device's, largest deviation", "at most", 0.03, _peak_error),
)  # fmt: skip


def bars(cases: dict[str, Any]) -> list[dict[str, Any]]:
    """Every bar with what was reached (None: not measured, and why)."""
    found = []
    for name, kind, needed, reached in BARS:
        value, why_not = None, None
        try:
            value = reached(cases)
        except Missing as error:
            why_not = str(error)
        met = None if value is None else value >= needed if kind == "at least" else value <= needed
        found.append({"bar": name, "needed": f"{kind} {needed:g}", "reached": value, "met": met, "why_not": why_not})
    return found


def bar_table(found: list[dict[str, Any]]) -> str:
    """The bars as Markdown."""
    lines = ["| bar | needed | reached | |", "|---|---|---|---|"]
    for b in found:
        reached = "" if b["reached"] is None else f"{b['reached']:.3g}"
        verdict = f"not measured: {b['why_not']}" if b["met"] is None else "met" if b["met"] else "MISSED"
        lines.append(f"| {b['bar']} | {b['needed']} | {reached} | {verdict} |")
    return "\n".join(lines)


def device() -> str:
    """What jax calls the first GPU here. Raises UserError where it finds none."""
    platform, kind = kept.device({name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"})
    if platform != "gpu":
        raise UserError(
            "jax finds no GPU here: install moejax with the extra cuda12 or cuda13 (BUILD.md); --tiny runs on a CPU"
        )
    return kind


def measure(name: str, settings: Settings, gpu: gpus.GPU | None, begin: Callable[..., Side] = start) -> dict[str, Any]:
    """One case, both batches."""
    case = CASES[name]
    names = ["moejax", case.stack]
    experiment = settings.experiment(case, settings.rows)
    result: dict[str, Any] = {"config": f"configs/{case.config}.yaml", "overrides": settings.overrides(case, settings.rows)}
    result["row_tokens"] = experiment.data.row_tokens
    result["same batch"] = same_batch(names, case, settings, begin)
    result["best batch"] = best_batch(names, case, settings, begin)
    if name == NF4:
        result["one query"] = same_batch(["moejax"], case, replace(settings, rows=1), begin)
        config = architecture(experiment, None)
        result["expert_weights"] = 3 * config.num_layers * config.num_experts * config.hidden_size * config.intermediate_size
    judge([cell for batch in BATCHES for cell in result.get(batch, {}).values()], case, settings, gpu)
    return result


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", choices=CASES, default=list(CASES), metavar="NAME", help="; ".join(CASES))
    parser.add_argument("--tiny", action="store_true", help="small models in fp32 on a CPU")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of every side")
    parser.add_argument("--seq-len", type=int, default=128, help="tokens of a query; one fills a row")
    parser.add_argument("--rows", type=int, default=8, help="rows of the batch that all sides run")
    parser.add_argument("--most-rows", type=int, default=1024)
    torch_run.add_references(parser)
    parser.add_argument("--attention", choices=("sdpa", "eager"), default="sdpa")
    parser.add_argument("--scan", choices=("loop", "mamba_ssm"), default="loop", help="of PyTorch's BlackMamba")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    try:
        pythons = torch_run.references(options, {CASES[name].stack for name in options.cases})
        kind = cpu_name() if options.tiny else device()
        gpu = None if options.tiny else gpus.of_device_kind(kind)
        arguments = ["--attention", options.attention, "--scan", options.scan, "--device", "cpu" if options.tiny else "cuda"]
        settings = Settings(
            options.tiny, options.steps, options.seq_len, options.rows, options.most_rows, pythons, arguments
        )
        report = kept.about(device=kind, formula=FORMULA, cases={})
        for name in options.cases:
            report["cases"][name] = measure(name, settings, gpu)
            report["bars"] = bars(report["cases"])
            print(f"{name}: done", flush=True)
            kept.write(options.out, report)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"\n{table(report)}\n\n{FORMULA}.\n\n{bar_table(report['bars'])}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

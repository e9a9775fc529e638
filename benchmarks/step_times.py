"""A training step here and in PyTorch, in turn, from the same config: `make bench` (this CPU) and `make bench-gpu` (this GPU).

    python benchmarks/step_times.py --cpu [--cases NAME …] [--reference4 PYTHON] [--reference5 PYTHON] [--out FILE.json]
    python benchmarks/step_times.py [--cases NAME …] [--out FILE.json]
    python benchmarks/step_times.py --tiny           # the GPU's whole path with small models on a CPU

On a CPU: small models in fp32, every layer recomputed in both, from the same weights on the same batch ("same batch"). On a GPU: the real
shapes; weights are made on the device (NF4 codes without a 16-bit model), tokens are random, one query fills a row. There each case is also
measured at its "best batch": each side alone doubles its rows until memory is full, then tries the middle. (A CPU's memory is the
machine's, and full means swapping.) In "same batch" the sides take turns step by step, so that a noisy machine troubles all alike; on a
GPU each has its share of the memory. A cell that cannot be run holds the reason and the others go on. The first steps are warm-up;
compilation is apart. Peak memory is the device's; on a CPU the compiler's for moejax's step and what the whole process held for PyTorch.
On a GPU nothing of this has been run yet.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
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
from floors import model_flops
from kept import RANDOM
from turns import Side, Stopped

from moejax import config as configuration
from moejax import gpus
from moejax.config import Experiment
from moejax.device import cpu_name
from moejax.errors import UserError
from moejax.estimator import prices

FORMULA = (
    "share of the matrix rate = model FLOPs of a step / (median step seconds x matrix rate). Model FLOPs: moejax/training/flops.py, the "
    "same for both sides, recomputation left out. Matrix rate: 2 n^3 / seconds of a square product, the best that any side measured here"
)


@dataclass(frozen=True)
class Case:
    """What is trained, by a config and overrides, and the stack of PyTorch next to it. random: weights, made by each side on its device
    (else the config's own, the same on both sides), at as many rows as the command line says (else the config's own)."""

    config: str
    stack: str
    overrides: tuple[str, ...] = ()
    random: bool = True


# A family's tiny model for a CPU; bitsandbytes reads 4-bit weights rightly there where rows are multiples of its blocks of 64.
_TINY = (
    "training.compute_dtype=float32", "training.param_dtype=float32", "data.row_tokens=64", "data.max_length=64",
    "model.overrides={num_layers: 2, intermediate_size: 128}",
)  # fmt: skip
TINY = {"mixtral": "mixtral-tiny", "blackmamba": "blackmamba-tiny", "qwen3": "qwen3-moe-tiny", "olmoe": "olmoe-tiny"}
_PLAIN = "quantization.format=none"
_SHARED = (_PLAIN, "adapter.share=[w1,w3]")  # what `today` trains
_SMALL = "model.overrides.num_layers=8"
CASES = {
    "Mixtral-8x7B, NF4, k = 2": Case("mixtral_8x7b_cs_sparse", "study"),
    "Mixtral-8x7B, NF4, k = 8": Case("mixtral_8x7b_cs_dense", "study"),
    "Mixtral-8x7B, bf16, shared A, k = 2": Case("mixtral_8x7b_cs_sparse", "today", _SHARED),
    "Mixtral, 8 of 32 layers, bf16, shared A, k = 2": Case("mixtral_8x7b_cs_sparse", "today", (*_SHARED, _SMALL)),
    "Mixtral, 8 of 32 layers, bf16, k = 2": Case("mixtral_8x7b_cs_sparse", "study", (_PLAIN, _SMALL)),
    "BlackMamba-2.8B, bf16, k = 2": Case("blackmamba_2.8b_cs_sparse", "plain"),
    "BlackMamba-2.8B, bf16, k = 8": Case("blackmamba_2.8b_cs_dense", "plain"),
    "Qwen3-30B-A3B, NF4, k = 8": Case("qwen3_30b_a3b_24gb", "study"),
    "Qwen3-30B-A3B, bf16, shared A, k = 8": Case("qwen3_30b_a3b_80gb", "today", _SHARED),
    "OLMoE-1B-7B, NF4, k = 8": Case("olmoe_1b_7b", "study"),
    "OLMoE-1B-7B, bf16, shared A, k = 8": Case("olmoe_1b_7b", "today", _SHARED),
}


def _lora(**sizes: int) -> tuple[str, ...]:
    """Overrides for a LoRA step of these sizes and 4 x 512 tokens."""
    sizes = {"hidden_size": 512, "num_heads": 8, "head_dim": 64, "vocab_size": 2048} | sizes
    rows = ("data.row_tokens=512", "data.max_length=512", "data.batch_rows=4")
    return (_PLAIN, f"model.overrides={json.dumps(sizes)}", *rows)


MIXTRAL = _lora(intermediate_size=1024, num_layers=8, num_kv_heads=4)
QWEN3 = _lora(intermediate_size=192, num_layers=4, num_kv_heads=4, num_experts=128, experts_per_token=8)
OLMOE = _lora(intermediate_size=256, num_layers=4, num_kv_heads=8, num_experts=64, experts_per_token=8)
CPU_CASES = {
    "mixtral": Case("bench_mixtral_tiny", "study", MIXTRAL, random=False),
    "blackmamba": Case("bench_blackmamba_tiny", "plain", random=False),
    "qwen3_moe": Case("bench_qwen3_moe_tiny", "study", QWEN3, random=False),
    "qwen3_moe, shared A": Case("bench_qwen3_moe_tiny", "today", (*QWEN3, *_SHARED), random=False),
    "olmoe": Case("bench_olmoe_tiny", "study", OLMOE, random=False),
    "olmoe, shared A": Case("bench_olmoe_tiny", "today", (*OLMOE, *_SHARED), random=False),
}


@dataclass(frozen=True)
class Settings:
    """What the command line says. pythons: of each stack's environment; arguments: for every process of PyTorch's."""

    cpu: bool
    tiny: bool
    steps: int
    row_tokens: int
    rows: int
    most_rows: int
    pythons: dict[str, Path]
    arguments: list[str]

    def overrides(self, case: Case, rows: int) -> list[str]:
        if not case.random:
            return [*case.overrides, "training.steps=2"]
        length = [f"data.row_tokens={self.row_tokens}", f"data.max_length={self.row_tokens}"]
        tiny = (f"model.preset={TINY[case.config.split('_')[0]]}", *_TINY) if self.tiny else ()
        return [*RANDOM, "training.remat=full", *length, *case.overrides, *tiny, f"data.batch_rows={rows}"]

    def experiment(self, case: Case, rows: int) -> Experiment:
        return configuration.load(ROOT / "configs" / f"{case.config}.yaml", self.overrides(case, rows))


def start(name: str, case: Case, rows: int, settings: Settings, fraction: float) -> Side:
    """One side's process ("moejax", or a stack), with `fraction` of the memory. Raises Stopped, UserError."""
    if name == "moejax":
        environment: dict[str, str | None] = {"XLA_CLIENT_MEM_FRACTION": f"{0.94 * fraction:.2f}"}
        environment["JAX_PLATFORMS"] = "cpu" if settings.cpu else None
        path = ROOT / "configs" / f"{case.config}.yaml"
        return turns.jax_side(path, settings.overrides(case, rows), ["--random"] if case.random else [], environment)
    with tempfile.TemporaryDirectory() as folder:  # read when the process says that it is ready
        write = handover.write_random if case.random else handover.write
        write(settings.experiment(case, rows), Path(folder), stack_name=name)
        arguments = ["--base", "nf4", "--memory-fraction", f"{fraction:.2f}", *settings.arguments]
        return turns.torch_side(Path(folder), name, settings.pythons[name], arguments)


def reason(error: Exception) -> dict[str, Any]:
    """A cell that could not be run."""
    memory = isinstance(error, Stopped) and error.out_of_memory
    return {"error": f"out of memory: {error}" if memory else str(error), "out_of_memory": memory}


def same_batch(names: list[str], case: Case, rows: int, settings: Settings, begin: Callable[..., Side]) -> dict[str, Any]:
    """All sides at this many rows, step by step in turn. One that cannot run leaves the others in the game."""
    cells: dict[str, Any] = {}
    fraction = 1.0 / len(names)
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        for name in names:
            try:
                sides[name] = stack.enter_context(begin(name, case, rows, settings, fraction))
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
            cells[name] = {"rows": rows, "about": sides[name].about} | turns.summary(steps)
    return {name: cells[name] for name in names}


def best_batch(name: str, case: Case, settings: Settings, begin: Callable[..., Side]) -> dict[str, Any]:
    """A side's own fastest batch, alone in the whole memory: rows are doubled until it is full, then one try half-way. With every try, its
    speed or why it did not run."""
    tries: list[dict[str, Any]] = []

    def attempt(rows: int) -> bool:
        try:
            with begin(name, case, rows, settings, 1.0) as side:
                tries.append({"rows": rows, "about": side.about} | turns.summary(turns.alternate({name: side}, settings.steps)[name]))
        except (Stopped, UserError) as error:
            tries.append({"rows": rows} | reason(error))
        return "error" not in tries[-1]

    rows = settings.rows
    while rows <= settings.most_rows and attempt(rows):
        rows *= 2
    if len(tries) > 1 and tries[-1].get("out_of_memory"):
        attempt(rows * 3 // 4)
    ran = [t for t in tries if "error" not in t]
    return dict(max(ran, key=lambda t: t["queries_per_second"]) if ran else tries[-1]) | {"tried": tries}


def judge(cells: list[dict[str, Any]], case: Case, settings: Settings, gpu: gpus.GPU | None) -> None:
    """Adds to every cell of a case: its share of the matrix rate (one rate for all of them), and dollars per 1,000 queries by the
    cheapest dated price of this GPU."""
    ran = [cell for cell in cells if "error" not in cell]
    rates = [cell["about"]["matrix_rate_flops"] for cell in ran if cell["about"].get("matrix_rate_flops")]
    price = prices.cheapest(prices.DATED, gpu.name) if gpu is not None else None
    for cell in ran:
        rate_cell(cell, model_flops(settings.experiment(case, cell["rows"])), max(rates, default=None), price)


def rate_cell(cell: dict[str, Any], work: float, matrix_rate: float | None, price: prices.Price | None) -> None:
    """Adds what follows from a step's model FLOPs (`FORMULA`) and an hour's price."""
    cell["model_flops"], cell["matrix_rate_flops"] = work, matrix_rate
    cell["share_of_matrix_rate"] = work / cell["median"] / matrix_rate if matrix_rate else None
    cell["compile_seconds"] = cell["about"].get("compile_seconds")
    cell["usd_per_1000_queries"] = price.usd_per_hour / 3600 * 1000 / cell["queries_per_second"] if price else None
    cell["price"] = price.told if price else "no dated price of this device (moejax/estimator/prices.py)"


BATCHES = ("same batch", "best batch")
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
    peak = cell.get("device_peak_bytes") or cell["about"].get("compiler_peak_bytes") or cell.get("host_peak_bytes")
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


def times_as_fast(case: dict[str, Any]) -> dict[str, float]:
    """moejax's queries/s over PyTorch's, of every batch that both ran."""
    found = {}
    for batch in BATCHES:
        rates = [cell["queries_per_second"] for cell in case.get(batch, {}).values() if "error" not in cell]
        if len(rates) == 2:
            found[batch] = rates[0] / rates[1]
    return found


def device() -> str:
    """What jax calls the first GPU here. Raises UserError where it finds none."""
    platform, kind = kept.device({name: value for name, value in os.environ.items() if name != "JAX_PLATFORMS"})
    if platform != "gpu":
        raise UserError(
            "jax finds no GPU here: install moejax with the extra cuda12 or cuda13 (BUILD.md); --tiny runs on a CPU"
        )
    return kind


def measure(name: str, settings: Settings, gpu: gpus.GPU | None, begin: Callable[..., Side] = start) -> dict[str, Any]:
    """One case: the same batch, and, of random weights, each side's best."""
    case = (CPU_CASES | CASES)[name]
    names, data = ["moejax", case.stack], settings.experiment(case, settings.rows).data
    result: dict[str, Any] = {"config": f"configs/{case.config}.yaml", "overrides": settings.overrides(case, settings.rows)}
    result["row_tokens"] = data.longest_row
    result["same batch"] = same_batch(names, case, data.batch_rows, settings, begin)
    if case.random:
        result["best batch"] = {name: best_batch(name, case, settings, begin) for name in names}
    judge([cell for batch in BATCHES for cell in result.get(batch, {}).values()], case, settings, gpu)
    return result | {"times_as_fast": times_as_fast(result)}


@kept.refusing
def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", metavar="NAME", help="; ".join([*CPU_CASES, *CASES]))
    parser.add_argument("--cpu", action="store_true", help="small models in fp32, of this CPU's size")
    parser.add_argument("--tiny", action="store_true", help="the GPU's cases with small models in fp32 on a CPU")
    parser.add_argument("--steps", type=int, default=10, help="timed steps of every side")
    parser.add_argument("--seq-len", type=int, default=128, help="of the GPU's cases: tokens of a query; one fills a row")
    parser.add_argument("--rows", type=int, default=8, help="of the GPU's cases: rows of the batch that all sides run")
    parser.add_argument("--most-rows", type=int, default=1024)
    torch_run.add_references(parser)
    parser.add_argument("--scan", choices=("loop", "mamba_ssm"), default="loop", help="of PyTorch's BlackMamba")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    known, on_cpu = CPU_CASES if options.cpu else CASES, options.cpu or options.tiny
    names = options.cases or list(known)
    if strange := [name for name in names if name not in known]:
        raise UserError(f"--cases {strange[0]!r}: with{'' if options.cpu else 'out'} --cpu expected {'; '.join(known)}")
    if options.most_rows < options.rows:
        raise UserError(f"--most-rows {options.most_rows}: expected at least --rows ({options.rows})")
    pythons = torch_run.references(options, {known[name].stack for name in names})
    kind = cpu_name() if on_cpu else device()
    gpu = None if on_cpu else gpus.of_device_kind(kind)
    arguments = ["--scan", options.scan, "--device", "cpu" if on_cpu else "cuda"]
    settings = Settings(
        on_cpu, options.tiny, options.steps, options.seq_len, options.rows, options.most_rows, pythons, arguments
    )
    report = kept.about(device=kind, formula=FORMULA, cases={})
    for name in names:
        found = report["cases"][name] = measure(name, settings, gpu)
        ratios = (f"moejax is {times:.2f} times as fast ({batch})" for batch, times in found["times_as_fast"].items())
        print(f"{name}: {', '.join(ratios) or 'not compared'}", flush=True)
        kept.write(options.out, report)
    print(f"\n{table(report)}\n\n{FORMULA}.")
    return int(options.cpu and any("error" in cell for case in report["cases"].values() for cell in case["same batch"].values()))


if __name__ == "__main__":
    sys.exit(main())

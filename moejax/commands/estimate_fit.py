"""`moejax estimate fit RUN…`: fit coefficients.json to the step_profile.json of several runs of one model."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.commands.tables import print_json, show_table
from moejax.errors import UserError
from moejax.estimator import coefficients
from moejax.estimator.fitting import Fitted, Run, fit_runs
from moejax.profiling import schema


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a profiled run, or a step_profile.json")
    parser.add_argument("--out", default="coefficients.json", metavar="FILE", help="output file (default: coefficients.json)")
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")


def run(options: argparse.Namespace) -> int:
    fitted = fit_runs([measured(Path(path)) for path in options.runs])
    paper = {f.entry.gpu: {"equation_1": f.equation_1, "equation_2": f.equation_2} for f in fitted}
    coefficients.write(options.out, [f.entry for f in fitted], paper)
    report(fitted, options.out, as_json=options.json)
    return 0


def measured(path: Path) -> Run:
    """A run's step_profile.json as plain figures. Raises UserError for one that is missing, or says too little."""
    p = schema.read(path)
    needed = {"step_seconds.median": p.step_seconds.median, "batch.queries": p.batch.queries, "batch.tokens": p.batch.tokens}
    missing = [name for name, value in needed.items() if not value]
    if missing:
        raise UserError(f"{path}: {', '.join(missing)} is null or 0: nothing can be fitted to this run; profile it again")
    peak = p.memory.compiler_peak_bytes or p.memory.measured_peak_bytes
    return Run(
        str(path), p.framework, p.device.name, p.model.name, p.model.params_total, p.method, p.moe.experts, p.moe.top_k,
        float(p.batch.queries or 0), float(p.batch.tokens or 0), float(p.step_seconds.median or 0), peak, p.memory.arguments_bytes,
        p.precision, p.remat, round(p.batch.row_tokens or 0) or None,
    )  # fmt: skip


def report(found: Sequence[Fitted], out: str, *, as_json: bool) -> None:
    """Coefficients by device with their errors, the residual of every run, and where the file is."""
    if as_json:
        print_json({"file": out, "fits": [_told(f) for f in found]})
        for f in found:
            if f.entry.doubt is not None:
                print(f"warning: {f.entry.gpu}: {_warned(f)}", file=sys.stderr)
    for f in [] if as_json else found:
        e = f.entry
        rows = [
            (Path(run.path).name if Path(run.path).suffix else run.path, run.queries, run.tokens, run.share, run.seconds, 100 * error)
            for run, error in zip(f.runs, f.errors, strict=True)
        ]
        t0, u, v = e.coefficients.tolist()
        notes = [
            f"seconds = {t0:.4g} + tokens·({u:.4g} + {v:.4g}·k/E); mean error {100 * sum(map(abs, f.errors)) / len(f.errors):.1f} %",
            *_limits(f),
            *_equations(f),
        ]
        show_table(f"{e.model} by {e.method} on {e.gpu}", ("run", "queries", "tokens", "k/E", "s/step", "error %"), rows, notes)
    print(f"written: {out}", file=sys.stderr if as_json else sys.stdout)


def _limits(f: Fitted) -> list[str]:
    told = [] if f.entry.doubt is None else [f"WARNING: {_warned(f)}"]
    if len(f.runs) == f.entry.points == (2 if f.entry.only_share else 3):
        told.append("as many runs as coefficients: they meet every run whatever was measured, and the errors say nothing")
    if f.entry.only_share:
        told.append(f"one number of experts per token: u holds v as well, for k/E = {f.entry.only_share:g} only")
    if not len(f.entry.samples):
        told.append("no interval: fewer than two runs more than coefficients")
    return told


def _warned(f: Fitted) -> str:
    return f"do not trust these coefficients: {f.entry.doubt}. Profile again on a machine that does nothing else, with more steps"


def _equations(f: Fitted) -> list[str]:
    told = []
    if f.equation_1 is None:
        told.append("equation 1: unknown (the profiles lack the peak or the bytes of the arguments)")
    else:
        e = f.equation_1
        c1 = f"C1 unknown (k/E = {e['sparsity']:g} only)" if e["c1"] is None else f"C1 = {e['c1']:.4g}"
        rmse = f"RMSE {e['rmse_gb']:.3g} GB over {e['points']} runs"
        told.append(f"equation 1: C0 = {e['c0']:.4g}, {c1}, model {e['model_gb']:.3f} GB; {rmse}")
    for form, e in (f.equation_2 or {}).items():
        rmse = e["rmse_queries_per_second"]
        told.append(f"equation 2, {form}: C2 = {e['c2']:.4g}, C3 = {e['c3']:g} (fixed), C4 = {e['c4']:.4g}; RMSE {rmse:.4g} queries/s")
    return told


def _told(f: Fitted) -> dict[str, Any]:
    e = f.entry
    runs = [
        {"run": r.path, "queries": r.queries, "tokens": r.tokens, "share": r.share, "seconds": r.seconds, "error": error}
        for r, error in zip(f.runs, f.errors, strict=True)
    ]
    return {"model": e.model, "method": e.method, "gpu": e.gpu, **e.named, "only_share": e.only_share, "doubt": e.doubt, "runs": runs,
            "equation_1": f.equation_1, "equation_2": f.equation_2}  # fmt: skip

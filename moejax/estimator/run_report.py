"""What `estimate.py fit` and `compare` print, and the figure of a fit's residuals."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moejax.estimator import comparison
from moejax.estimator.commands import draw, print_json, show_table
from moejax.estimator.fitting import Fitted
from moejax.estimator.units import counted


def fitted(found: Sequence[Fitted], out: str, *, as_json: bool, plot: str | None) -> int:
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
    draw(plot, lambda figures, folder: figures.residuals(folder, found))
    return 0


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
    coefficients = dict(zip(("t0_seconds", "token_seconds", "expert_token_seconds"), e.coefficients.tolist(), strict=True))
    return {"model": e.model, "method": e.method, "gpu": e.gpu, **coefficients, "only_share": e.only_share, "doubt": e.doubt, "runs": runs,
            "equation_1": f.equation_1, "equation_2": f.equation_2}  # fmt: skip


def compared(found: dict[str, dict[str, Any]], *, as_json: bool) -> int:
    """Predicted against measured of every run."""
    if as_json:
        print_json(found)
        return 0
    for folder, document in found.items():
        print(f"{folder}: {document['model']} by {document['method']} on {document['gpu']}, {counted(document['steps'], 'step')}")
        for line in comparison.lines(document):
            print(f"  {line}")
        print(f"  kept in {Path(folder) / comparison.COMPARISON}")
    return 0

"""The report of one or several characterizations, as a page: a table for each of the study's tables and figures."""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moejax import __version__
from moejax.profiling.bars import KERNELS, NO_LAYERS
from moejax.profiling.scopes import PHASES
from moejax.study.reference import REFERENCE
from moejax.study.report import published, status, takeaways
from moejax.study.report.compare import Source, role
from moejax.study.report.grid import Grid
from moejax.study.report.naming import Naming, Rows, family, grouped, rows_of, said
from moejax.study.report.page import Block, Code, Number, Page, Paragraph, Section, text
from moejax.study.report.quantities import rounded
from moejax.study.report.results import Row

PAPER = "arXiv 2408.04693"


@dataclass(frozen=True)
class Spec:
    """A section: an experiment's values of these metrics (by their words), in the order in which they come.

    about: what is measured; theirs: how the study's differs. columns: of a setting's name. group, line: what of a row (`_parts`) stands
    in its group's name behind the setting's, and in its line's; by them the rows are sorted, scopes by `order`. scopes: only these, where
    any are named. whole: which scopes the shares are of, where there are shares. bars: of which metrics. also: rows of another experiment.
    """

    experiment: str
    title: str
    about: str
    metrics: dict[str, str]
    group: tuple[str, ...]
    line: tuple[str, ...]
    theirs: str = ""
    columns: tuple[str, ...] = ("model", "method", "data", "seq_len")
    whole: Callable[[str], bool] | None = None
    bars: tuple[str, ...] = ()
    also: tuple[str, str] | None = None
    order: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()


_STEP: dict[str, Any] = {"group": ("routing", "role"), "line": ("scope",)}
_RATE = {"compute_utilization": "of the peak matrix rate", "memory_utilization": "of the peak bandwidth"}
SECTIONS = (
    Spec(
        "largest_batch", "Table III: the largest batch",
        "How many queries fit in a step: predicted from the compiled program, then proved by running it and failing one above.",
        {"proved_batch": "", "swept_batch": "in the study's sweeps", "predicted_batch": "predicted by the compiler",
         "failed_batch": "did not run", "peak_bytes": "peak memory of the largest", "memory_limit": "memory limit"},
        (), ("routing", "metric", "scope"), "The study's: on an A40 of 48 GB.",
    ),
    Spec(
        "stages", "Figure 4: a step by phase", "Shares are of the time in which the device was busy (idle is apart).",
        {"seconds": ""}, **_STEP, whole=lambda s: s not in ("idle", published.BACKWARD), order=(*PHASES, published.BACKWARD),
        theirs="The study's backward pass holds its recomputation. Its seconds are an A40's: shares compare, seconds do not.",
    ),
    Spec(
        "layers", "Figure 5: a step by kind of layer",
        "Shares are of the layers' time: embedding, loss and optimizer are not counted in it. \"rest of the layers\" is the loop over "
        "them: reading each layer's part of the stacked weights, additions to the stream, what is saved for the backward pass.",
        {"seconds": ""}, **_STEP, whole=lambda s: s not in (*NO_LAYERS, "idle"), order=("moe", "attention", "mamba", "norm", "layers"),
    ),
    Spec(
        "kernels", "Figure 6: the mixture of experts by kernel",
        "Shares are of the mixture of experts' time, in all layers of a whole step. \"Rest of the MoE\" is what lies between its "
        "kernels: the loops over experts and tiles.",
        {"seconds": ""}, **_STEP, whole=lambda s: True, order=KERNELS,
        theirs="The study's is the kernels of one layer, each expert matrix counted for one expert: shares compare, seconds do not.",
    ),
    Spec(
        "throughput", "Figure 8: throughput by batch size",
        "Queries trained on per second of training steps. Programs were compiled and run once before the clock started; a padded batch "
        "takes the time of its padding too.",
        {"queries_per_second": ""}, ("routing",), ("batch", "batching"), columns=("model", "method", "data"), bars=("queries_per_second",),
    ),
    Spec(
        "utilization", "Figures 9 and 10: how busy the device is", "Ours: the work that the program must do, as a share of the peak.",
        _RATE, ("routing", "role", "metric"), ("scope",), order=KERNELS, bars=tuple(_RATE),
        theirs="The study's: the share of time in which the multiprocessors (SM) or the memory (DRAM) had anything to do, by Nsight "
        "Compute: a busy device may still do little work.",
    ),
    Spec(
        "expert_load", "Figure 11: how the tokens fall on the experts",
        "Tokens per query that an expert gets, mean over the layers, and their variance over the experts.",
        {"tokens_per_query": "", "variance": "variance", "largest_share": "largest share of all choices"},
        ("routing", "when"), ("expert", "metric"), bars=("tokens_per_query",),
        theirs="The study's are on HellaSwag (beside commonsense) and GSM8K (beside math and word problems).",
    ),
    Spec(
        "length", "The length of the queries",
        "A step of equal rows: as many as hold the tokens of the largest batch of the longest queries (fewer where the compiler says that "
        "they do not fit). Utilization is the mixture of experts', weighted by time.",
        {"step_seconds": "seconds a step"} | _RATE, ("routing", "metric"), ("seq_len",), columns=("model", "method", "data"),
        bars=("step_seconds", *_RATE), scopes=("", published.MOE), theirs="The study's: at the largest batch of each length.",
    ),
    Spec(
        "fit_batch", "Figure 13: the largest batch by equation 1",
        "batch = C0·(GPU memory - model) / (tokens·((1 - C1) + C1·k/E)), C0 in tokens/GB, GB of 1e9 bytes, fitted to the peaks of the "
        "padded throughput trials, beside what ran.",
        {"c0": "C0", "c1": "C1", "model_gb": "model", "rmse_gb": "RMSE", "points": "points", "predicted_batch": "by equation 1",
         "proved_batch": "as it ran"},
        (), ("routing", "scope", "metric"), "The study's: 40 GB is an A100, 48 an A40, 80 an H100.",
        columns=("model", "data"), also=("largest_batch", "proved_batch"),
    ),
    Spec(
        "fit_throughput", "Figures 14 and 15: models of the throughput",
        "Equation 2 as printed: C2·ln(batch / (k/E·C3)) + C4; as the study's figures were fitted: C2·ln(batch^(1 / (k/E·C3))) + C4, with a "
        "fixed C3. moejax: seconds = t0 + tokens·(u + v·k/E). RMSE over all measured points; its predictions are in results.csv.",
        {"c2": "C2, queries/s", "c3": "C3", "c4": "C4, queries/s", "rmse": "RMSE, queries/s", "printed_rmse": "printed RMSE, queries/s",
         "t0_seconds": "t0", "token_seconds": "u, per token", "expert_token_seconds": "v, per token through all experts",
         "mean_error": "mean error, of the step's seconds", "points": "points"},
        ("scope",), ("metric",), columns=("model", "data"), theirs="The study's: fitted anew to its measurements on an A40.",
    ),
    Spec(
        "cost", "Table IV: what it costs",
        "Hours and dollars of the config's whole run (so many queries, all epochs together) at the fastest measured batch; on other GPUs "
        "carried over by their data sheets.",
        {"queries": "queries", "batch": "batch", "queries_per_second": "queries/s", "hours": "hours", "usd": "$", "usd_per_hour": "$/hour",
         "measured": "measured here (1) or carried over (0)"},
        ("routing",), ("scope", "metric"), "The study's: MATH at CUDO's prices of 2024; hours are its dollars over its dollars an hour.",
    ),
)  # fmt: skip


def build(sources: Sequence[Source]) -> Page:
    """Everything that is known, in the study's order."""
    sections = [section(sources, spec) for spec in SECTIONS]
    made = Code(shlex.join(["moejax", "report", *(str(s.folder) for s in sources)]))
    how = Paragraph(text("This page: ", made, f" (moejax {__version__}). All values, exactly: results.csv; commands: characterize.json."))
    sections.append(Section("Trials and environment", "environment", (*status.without_result(sources), how, *status.environment(sources))))
    lead = (*status.unfinished(sources), Paragraph(text(_beside(sources))), *takeaways.table(sources))
    return Page(f"Fine-tuning mixtures of experts on {' and '.join(s.label for s in sources)}", lead, tuple(sections))


def _beside(sources: Sequence[Source]) -> str:
    """What of the study stands beside ours."""
    models = {m.name: m.family for source in sources for m in source.study.models}
    alone = [name for name, known in models.items() if known is None]
    none = f"The study ({PAPER}) had no model like {' or '.join(alone)}: nothing of it stands there."
    if len(alone) == len(models):
        return none
    told = (
        f"Beside ours stands the PyTorch reference of the study ({PAPER}), as its group says: Mixtral-8x7B or BlackMamba-2.8B, on an A40 "
        "unless another GPU is named. It stands where it has the same setting or one of the same meaning: batch 1, the largest batch, or a "
        "sparse batch as large as dense's largest."
    )
    return f"{told} {none.replace(f' ({PAPER})', '')}" if alone else told


def section(sources: Sequence[Source], spec: Spec) -> Section:
    rows = [(s, r) for s, r in rows_of(sources, spec.experiment, *spec.metrics) if not spec.scopes or r.scope in spec.scopes]
    theirs = spec.theirs if any(m.family for source in sources for m in source.study.models) else ""
    naming = Naming([row for _, row in rows], spec.columns)
    limits = [] if spec.experiment != "largest_batch" else [status.artificial_limit(source) for source in sources]
    caption = " ".join(filter(None, (spec.about, theirs, *limits, naming.constant())))
    block: Block = Paragraph(text("Nothing was measured: its trials have no result, or none was planned."), warning=True)
    if rows:
        block = _grid(sources, spec, naming, rows + (rows_of(sources, *spec.also) if spec.also else [])).table(caption)
    return Section(spec.title, spec.experiment.replace("_", "-"), (block,))


def _grid(sources: Sequence[Source], spec: Spec, naming: Naming, rows: Rows) -> Grid:
    """Ours, setting by setting, with the study's in the same cells; what it has of other data alone comes last."""
    grid = Grid(sources, "")
    apart: dict[str, list[Row]] = {}
    for setting, mine in grouped(rows, naming.name).items():
        for source in sources:
            _put(grid, spec, setting, source, [r for s, r in mine if s is source])
        first = mine[0][1]
        if model := family(sources, first.model):
            same, other = published.beside(spec.experiment, model, first.data)
            _put(grid, spec, setting, None, same, REFERENCE[model])
            apart[model] = other
    for model, other in apart.items():
        _put(grid, spec, f"{REFERENCE[model]}, {said('data', 'cs')}", None, other, REFERENCE[model])
    if spec.line[0] in ("batch", "seq_len"):  # smallest first, whoever measured it
        for group, lines in grid.cells.items():
            grid.cells[group] = dict(sorted(lines.items(), key=lambda item: float(re.findall(r"[\d.]+", item[0])[0])))
    return grid


def _put(grid: Grid, spec: Spec, setting: str, source: Source | None, rows: list[Row], study: str = "") -> None:
    """Rows of one setting of a folder, or of this model of the study's: in groups of ours, or in its own where that is the setting."""
    alone = source is None and setting.startswith(study)
    if spec.experiment == "stages" and source is not None:
        rows = [*rows, *_backward(rows)]
    wholes: dict[tuple[str | None, float | None], float] = {}
    for row in rows:
        if spec.whole and (spec.whole(row.scope) or (source is None and row.scope == published.BACKWARD)):
            wholes[row.routing, row.batch] = wholes.get((row.routing, row.batch), 0.0) + row.value
    places = [*spec.order, *dict.fromkeys(r.scope for r in rows)]
    for row in sorted(rows, key=lambda r: [_rank(spec, r, key, places) for key in (*spec.group, *spec.line)]):
        parts = _parts(spec, row, rows)
        group, line = (", ".join(part for key in keys if (part := parts[key])) for keys in (spec.group, spec.line))
        value = _number(source, row)
        numbers = [replace(value, bar=row.value) if row.metric in spec.bars else value]
        whole = wholes.get((row.routing, row.batch))
        if whole and spec.whole and (spec.whole(row.scope) or row.scope == published.BACKWARD):
            share = row.value / whole
            numbers.append(Number(rounded(share, "share"), repr(share), "derived", bar=None if row.trial == "derived" else share))
        group = ", ".join(filter(None, (setting, group)))
        if source is not None or alone or group in grid.cells:
            grid.put(group, line, source, *numbers, study="" if alone else study)


def _rank(spec: Spec, row: Row, key: str, scopes: list[str]) -> float:
    """Where a row comes by a part of its name."""
    if key in ("batch", "seq_len", "role"):
        return (row.seq_len if key == "seq_len" else row.batch) or 0
    if key == "metric":
        return list(spec.metrics).index(row.metric)
    return scopes.index(row.scope) if key in ("scope", "when", "expert") else row.routing == "dense"


def _backward(rows: list[Row]) -> list[Row]:
    """Our backward pass with its recomputation, as the study counts it."""
    found = []
    for row in rows:
        again = [r.value for r in rows if (r.scope, r.routing, r.batch) == ("recompute", row.routing, row.batch)]
        if row.scope == "backward" and again:
            found.append(replace(row, trial="derived", scope=published.BACKWARD, value=row.value + again[0]))
    return found


def _number(source: Source | None, row: Row) -> Number:
    if source is not None and row.trial != "derived":
        return source.number(row)
    return Number(rounded(row.value, row.unit), repr(row.value), "study" if row.trial == "study" else "derived")


def _parts(spec: Spec, row: Row, rows: list[Row]) -> dict[str, str]:
    """A row in words, for the names of its group and line."""
    when, _, expert = row.scope.partition("/")
    several = len({r.batching for r in rows}) > 1
    names = {"moe": "MoE" if spec.experiment == "layers" else "rest of the MoE", "layers": "rest of the layers"}
    return {
        "routing": row.routing or "", "role": role(row, rows), "metric": spec.metrics.get(row.metric, ""),
        "scope": names.get(row.scope) or row.scope.removeprefix("moe/").replace("_", " "),
        "when": f"{when} fine-tuning", "expert": f"expert {expert}" if expert else "", "seq_len": f"{row.seq_len}",
        "batch": f"batch {row.batch:g}" if row.batch is not None else "",
        "batching": said("batching", row.batching) if several and row.batching == "pack" else "",
    }  # fmt: skip

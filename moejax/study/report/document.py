"""The report of one or several characterizations, as a page: a table for each of the study's tables and figures."""

from __future__ import annotations

import re
import shlex
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib import resources

from moejax import __version__
from moejax.profiling.bars import KERNELS, NO_LAYERS
from moejax.profiling.scopes import PHASES
from moejax.study.reference import REFERENCE
from moejax.study.report import advice, published, status, takeaways
from moejax.study.report.compare import Source, role
from moejax.study.report.grid import Grid
from moejax.study.report.naming import Naming, Rows, family, grouped, rows_of, said
from moejax.study.report.page import Block, Code, Number, Page, Paragraph, Section, text
from moejax.study.report.quantities import rounded
from moejax.study.report.results import Row

PAPER = "arXiv 2408.04693"


@dataclass(frozen=True)
class Spec:
    """A section, as `sections.toml` has it: an experiment's values of these metrics (with their words), in the order in which they come.

    about: what is measured; theirs: how the study's differs. columns: of a setting's name. group, line: what of a row (`_parts`) stands
    in its group's name behind the setting's, and in its line's; by them the rows are sorted. scopes: only these, where any are named.
    bars: of which metrics. also: rows of another experiment (its name, its metric).
    """

    experiment: str
    title: str
    about: str
    metrics: dict[str, str]
    group: tuple[str, ...]
    line: tuple[str, ...]
    theirs: str = ""
    columns: tuple[str, ...] = ("model", "method", "data", "seq_len")
    bars: tuple[str, ...] = ()
    also: tuple[str, ...] = ()
    scopes: tuple[str, ...] = ()


_FILE = resources.files(__package__).joinpath("sections.toml")
SECTIONS = tuple(Spec(name, **spec) for name, spec in tomllib.loads(_FILE.read_text("utf-8")).items())
# Scopes in the order in which they stand, and those that shares are not of.
_ORDER: dict[str, tuple[str, ...]] = {
    "stages": (*PHASES, published.BACKWARD), "layers": ("moe", "attention", "mamba", "norm", "layers"), "kernels": KERNELS,
    "utilization": KERNELS,
}  # fmt: skip
_UNCOUNTED: dict[str, tuple[str, ...]] = {"stages": ("idle", published.BACKWARD), "layers": (*NO_LAYERS, "idle"), "kernels": ()}


def build(sources: Sequence[Source]) -> Page:
    """Everything that is known, in the study's order."""
    sections = [section(sources, spec) for spec in SECTIONS]
    made = Code(shlex.join(["moejax", "report", *(str(s.folder) for s in sources)]))
    how = Paragraph(text("This page: ", made, f" (moejax {__version__}). All values, exactly: results.csv; commands: characterize.json."))
    sections.append(Section("Trials and environment", "environment", (*status.without_result(sources), how, *status.environment(sources))))
    lead = (*status.unfinished(sources), *advice.paragraphs(sources), Paragraph(text(_beside(sources))), *takeaways.table(sources))
    return Page(f"Fine-tuning mixtures of experts on {' and '.join(s.label for s in sources)}", lead, tuple(sections))


def _beside(sources: Sequence[Source]) -> str:
    """What of the study stands next to ours."""
    models = {m.name: m.family for source in sources for m in source.study.models}
    alone = [name for name, known in models.items() if known is None]
    none = f"The study ({PAPER}) had no model like {' or '.join(alone)}: none of its numbers are shown there."
    if len(alone) == len(models):
        return none
    told = (
        f"Next to ours are the numbers of the study's PyTorch reference ({PAPER}), named in each group: Mixtral-8x7B or BlackMamba-2.8B, "
        "on an A40 unless another GPU is named. They are there where it has the same setting or one of the same meaning: batch 1, the "
        "largest batch, or a sparse batch as large as dense's largest."
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
    if spec.line[0] in ("batch", "seq_len"):  # smallest first, anyone who measured it
        for group, lines in grid.cells.items():
            grid.cells[group] = dict(sorted(lines.items(), key=lambda item: float(re.findall(r"[\d.]+", item[0])[0])))
    return grid


def _put(grid: Grid, spec: Spec, setting: str, source: Source | None, rows: list[Row], study: str = "") -> None:
    """Rows of one setting of a folder, or of this model of the study's: in groups of ours, or in its own where that is the setting."""
    alone = source is None and setting.startswith(study)
    if spec.experiment == "stages" and source is not None:
        rows = [*rows, *_backward(rows)]
    uncounted = _UNCOUNTED.get(spec.experiment)
    wholes: dict[tuple[str | None, float | None], float] = {}
    for row in rows:
        if uncounted is not None and (row.scope not in uncounted or (source is None and row.scope == published.BACKWARD)):
            wholes[row.routing, row.batch] = wholes.get((row.routing, row.batch), 0.0) + row.value
    sized: set[str] = set()
    places = [*_ORDER.get(spec.experiment, ()), *dict.fromkeys(r.scope for r in rows)]
    for row in sorted(rows, key=lambda r: [_rank(spec, r, key, places) for key in (*spec.group, *spec.line)]):
        parts = _parts(spec, row, rows)
        group, line = (", ".join(part for key in keys if (part := parts[key])) for keys in (spec.group, spec.line))
        value = _number(source, row)
        numbers = [replace(value, bar=row.value) if row.metric in spec.bars else value]
        whole = wholes.get((row.routing, row.batch))
        if whole and uncounted is not None and (row.scope not in uncounted or row.scope == published.BACKWARD):
            share = row.value / whole
            numbers.append(Number(rounded(share, "share"), repr(share), "derived", bar=None if row.trial == "derived" else share))
        group = ", ".join(filter(None, (setting, group)))
        if source is None and not alone and group not in grid.cells:
            continue
        if "role" in spec.group and row.batch is not None and group not in sized:
            sized.add(group)
            grid.put(group, "batch, queries", source, Number(f"{row.batch:g}", repr(row.batch), "derived"))
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

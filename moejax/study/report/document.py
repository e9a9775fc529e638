"""The report of one or several characterizations, as a page."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from functools import partial

from moejax import __version__
from moejax.study.report import sections_model, sections_rate, sections_time, status, summary
from moejax.study.report.compare import Source
from moejax.study.report.grid import Grid
from moejax.study.report.naming import Naming, Rows, metric, rows_of
from moejax.study.report.page import Block, Code, Fold, Items, Page, Paragraph, Section, numbers, text

PAPER = "arXiv 2408.04693"
Make = Callable[[Sequence[Source], Rows], tuple[Block, ...]]
# Experiment, its metrics (none: all), title, what is measured, how the study's differs where it stands beside, the blocks.
_SECTIONS: tuple[tuple[str, tuple[str, ...], str, str, str, Make], ...] = (
    (
        "largest_batch", (),
        "Table III: the largest batch",
        "How many queries fit in a step: predicted from the compiled program, then proved by running it and failing one above.",
        "The study's: on an A40 of 48 GB.",
        sections_rate.largest_batch,
    ),
    (
        "stages", ("seconds",),
        "Figure 4: a step by phase",
        "Shares are of the time in which the device was busy (idle is apart).",
        "The study's backward pass holds its recomputation. Its seconds are an A40's: shares compare, seconds do not.",
        partial(sections_time.seconds, kind=sections_time.STAGES),
    ),
    (
        "layers", ("seconds",),
        "Figure 5: a step by kind of layer",
        "Shares are of the layers' time: embedding, loss and optimizer are not counted in it. \"Rest of the layers\" is the loop over "
        "them: reading each layer's part of the stacked weights, additions to the stream, what is kept for the backward pass.",
        "The study's shares are of the layers' time too.",
        partial(sections_time.seconds, kind=sections_time.LAYERS),
    ),
    (
        "kernels", ("seconds",),
        "Figure 6: the mixture of experts by kernel",
        "Shares are of the mixture of experts' time, in all layers of a whole step. \"Rest of the MoE\" is what lies between its kernels: "
        "the loops over experts and tiles.",
        "The study's is the kernels of one layer, each expert matrix counted for one expert: shares compare, seconds do not.",
        partial(sections_time.seconds, kind=sections_time.KERNELS),
    ),
    (
        "throughput", ("queries_per_second",),
        "Figure 8: throughput by batch size",
        "Queries trained on per second of training steps. Programs were compiled and run once before the clock started; a padded batch "
        "takes the time of its padding too.",
        "",
        sections_rate.throughput,
    ),
    (
        "utilization", ("compute_utilization", "memory_utilization"),
        "Figures 9 and 10: how busy the device is",
        "Ours: the work that the program must do, as a share of the device's peak.",
        "The study's: the share of time in which the multiprocessors or the memory had anything to do, by Nsight Compute: a busy device "
        "may still do little work.",
        sections_time.utilization,
    ),
    (
        "expert_load", (),
        "Figure 11: how the tokens fall on the experts",
        "Shares are of all choices of an expert (each token chooses several), mean over the layers.",
        "The study's tokens per query are on HellaSwag and GSM8K with Mixtral-8x7B and BlackMamba-2.8B.",
        sections_rate.expert_load,
    ),
    (
        "length", ("step_seconds", "compute_utilization", "memory_utilization"),
        "The length of the queries",
        "A step of equal rows: as many as hold the tokens of the largest batch of the longest queries (fewer where the compiler says that "
        "they do not fit). Longer queries, fewer of them.",
        "",
        sections_rate.length,
    ),
    (
        "fit_batch", (),
        "Figure 13: the largest batch by equation 1",
        "The study's equation with coefficients fitted to the peaks of the padded throughput trials, beside what ran.",
        "",
        sections_model.fit_batch,
    ),
    (
        "fit_throughput", (),
        "Figures 14 and 15: models of the throughput",
        "The study's equation 2 and moejax's own step model, fitted to the throughput above.",
        "",
        sections_model.fit_throughput,
    ),
    ("cost", (), "Table IV: what it costs", "Hours and dollars of a whole fine-tuning.", "", sections_model.cost),
)


def build(sources: Sequence[Source]) -> Page:
    """Everything that is known, in the study's order."""
    sections = [_section(sources, *spec) for spec in _SECTIONS]
    sections.append(Section("Trials", "trials", status.trial_tables(sources)))
    made = Code(shlex.join(["moejax", "report", *(str(s.folder) for s in sources)]))
    how = Paragraph(text("This page: ", made, f" (moejax {__version__})."))
    sections.append(Section("Environment and commands", "environment", (how, *status.environment(sources))))
    lead = (
        *status.unfinished(sources),
        *status.does_not_fit(sources),
        Items(summary.sentences(sources)),
        Paragraph(text(_beside(sources), "Rounded numbers keep their exact value; every value of the results files is on this page.")),
    )
    names = " and ".join(s.label for s in sources)
    return Page(f"Fine-tuning mixtures of experts on {names}", lead, tuple(sections))


def _beside(sources: Sequence[Source]) -> str:
    """What of the study stands beside ours."""
    models = {m.name: m.family for source in sources for m in source.study.models}
    alone = [name for name, family in models.items() if family is None]
    none = f"The study ({PAPER}) had no model like {' or '.join(alone)}: nothing of it stands there. "
    if len(alone) == len(models):
        return none
    told = (
        f"Beside ours stands the PyTorch reference of the study ({PAPER}): Mixtral-8x7B or BlackMamba-2.8B, as its row or figure "
        "says, on an A40 unless another GPU is named. It stands where it has the same setting or one of the same meaning: batch 1, "
        "the largest batch, or a sparse batch as large as dense's largest. "
    )
    return told + (none.replace(f" ({PAPER})", "") if alone else "")


def _section(
    sources: Sequence[Source], experiment: str, metrics: tuple[str, ...], title: str, about: str, theirs: str, make: Make
) -> Section:
    wanted, rows = rows_of(sources, experiment, *metrics), rows_of(sources, experiment)
    made = make(sources, wanted) if wanted else ()
    gaps = status.gaps(sources, experiment)
    beside = theirs and any(m.family for source in sources for m in source.study.models)
    blocks: list[Block] = [Paragraph(text(f"{about} {theirs}" if beside else about))]
    if not rows:
        why = "its trials have no result" if gaps else "no trial of it was planned"
        blocks.append(Paragraph(text(f"Nothing was measured: {why}."), warning=True))
    blocks += [*made, *gaps, *_rest(sources, rows, made), *status.commands(sources, experiment)]
    return Section(title, experiment.replace("_", "-"), tuple(blocks))


def _rest(sources: Sequence[Source], rows: Rows, made: tuple[Block, ...]) -> tuple[Block, ...]:
    """What the section's own tables leave out."""
    shown = {n.place for n in numbers(made)}
    rows = [(s, r) for s, r in rows if s.number(r).place not in shown]
    if not rows:
        return ()
    naming, grid = Naming(rows), Grid(sources, "", None)
    for source, row in rows:
        batch = f"batch {row.batch:g}: " if row.batch is not None else ""
        grid.put(naming.name(row, row.routing or ""), f"{batch}{metric(row)}", source, text(source.number(row)))
    caption = f"What else was measured. {naming.constant()}"
    return (Fold(f"Other values ({len(rows)})", (grid.table(text(caption)),)),)

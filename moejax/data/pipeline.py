"""The whole way from the config's data section to batches, with one table of what came out."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from moejax.config import DataConfig
from moejax.contents import records_content
from moejax.data import chat
from moejax.data.batching import Batches, GivenBatches, synthetic
from moejax.data.records import Record
from moejax.data.sources import load_records
from moejax.data.supervision import TalkOptions
from moejax.data.tokenize import Tokenized, tokenize
from moejax.errors import UserError
from moejax.progress import Table

SYNTHETIC_ROWS = 1000


@dataclass(frozen=True)
class Dataset:
    """Batches to train on, batches to evaluate on (or None), and the counts behind them."""

    train: Batches | GivenBatches
    evaluation: Batches | None
    tokenized: Tokenized
    source: str
    held_out_dropped: int = 0
    config: DataConfig | None = None  # with the template and the day in the place of null
    contents: dict[str, str] = field(default_factory=dict)  # "data", "evaluation": hash of the records

    def statistics(self) -> dict[str, float]:
        """Counts; lengths in tokens with the template and the end of sequence."""
        lengths = np.array([len(q.ids) for q in self.tokenized.queries])
        return {
            "records": self.tokenized.records,
            **self._talks(),
            "dropped": self.tokenized.dropped,
            "  blank answers": self.tokenized.blank_answers,
            "  blank questions": self.tokenized.blank_questions,
            **({"  without an answer": len(self.tokenized.talks.unanswered)} if self.tokenized.talks else {}),
            "  answers cut off": self.tokenized.cut_off,
            "cut": self.tokenized.cut,
            "with control tokens": self.tokenized.marked,
            "queries": len(lengths),
            "tokens": int(lengths.sum()),
            "supervised tokens": int(sum(np.count_nonzero(q.supervised[1:]) for q in self.tokenized.queries)),
            "shortest": int(lengths.min()),
            "median": float(np.median(lengths)),
            "mean": float(lengths.mean()),
            "95th percentile": float(np.percentile(lengths, 95)),
            "longest": int(lengths.max()),
            "rows": self.train.rows(),
            "padding": self.train.waste(),
        }

    def _talks(self) -> dict[str, float]:
        """Of conversations, where there are any."""
        talks = self.tokenized.talks
        if talks is None:
            return {}
        counts: dict[str, float] = {"  conversations": talks.conversations, "  answers trained on": talks.answers}
        return counts | ({"  a query an answer": talks.split, "  extra tokens": talks.extra_tokens} if talks.split else {})

    def table(self) -> Table:
        def text(name: str, value: float) -> str:
            return f"{100 * value:.1f} %" if name == "padding" else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"

        rows = [(name, text(name, value)) for name, value in self.statistics().items()]
        if self.evaluation is not None:
            dropped = f" ({self.held_out_dropped:,} dropped)" if self.held_out_dropped else ""
            rows.append(("held out queries", f"{len(self.evaluation.queries):,}{dropped}"))
        return Table(rows)

    def notes(self) -> list[str]:
        """What a user should know beside the table."""
        t, found = self.tokenized, self.tokenized.talks.notes() if self.tokenized.talks else []
        if t.first_marked is not None:
            index, mark = t.first_marked
            kept = "as tokens: data.template = text takes its records as they are written" if t.as_written else "as text"
            many = f"{t.marked:,} record{'s hold' if t.marked > 1 else ' holds'}"
            found.append(f"{many} control tokens or the template's marks (first: record {index}, {mark!r}): kept, {kept}")
        if t.end != t.end_of_sequence:
            text = t.end.removesuffix(t.end_of_sequence)
            found.append(
                f"the chat template ends a turn with {text!r}, "
                + (
                    f"not with the tokenizer's end of sequence {t.end_of_sequence!r}: answers end with it, and generation stops at both"
                    if text == t.end
                    else f"which is no token of this tokenizer: the end of sequence {t.end_of_sequence!r} follows it"
                )
            )
        return found


def load(config: DataConfig, tokenizer: Any, seed: int, vocab_size: int) -> Dataset:
    """Read, tokenize and batch. `tokenizer` may be None for synthetic rows. Raises UserError for every fault of the data."""
    if config.source is None:
        queries = synthetic(config, vocab_size, seed, max(SYNTHETIC_ROWS, config.batch_rows))
        return Dataset(Batches(queries, config, seed), None, Tokenized(queries, len(queries)), "random tokens")
    records, held_out = read(config)
    contents = {"data": records_content(records if config.eval_source else [*records, *held_out])}
    if config.eval_source is not None:
        contents["evaluation"] = records_content(held_out)
    config = settled(config, records, tokenizer)
    train = _tokenized(config, records, tokenizer, str(config.source))
    evaluation, dropped = None, 0
    if held_out:
        source = config.eval_source or str(config.source)
        judged = _tokenized(config, held_out, tokenizer, source, len(records) if config.holdout else 0)
        evaluation, dropped = Batches(judged.queries, config, seed, shuffle=False), judged.dropped
    return Dataset(Batches(train.queries, config, seed), evaluation, train, str(config.source), dropped, config, contents)


def settled(config: DataConfig, records: Sequence[Record], tokenizer: Any) -> DataConfig:
    """The config with a template in the place of null, and the day where the chat template asks for it; the tokenizer's chat template is
    rendered with them from now on."""
    template = config.template or ("chat" if any("conversation" in record for record in records) else "mistral")
    chat.settle(tokenizer, template, config.template_args, config.template_date)
    date = config.template_date
    if date is None and template in ("chat", "chatml") and chat.asks_date(tokenizer):
        date = datetime.date.today().isoformat()
        chat.settle(tokenizer, template, config.template_args, date)
    return config.model_copy(update={"template": template, "template_date": date})


def _tokenized(config: DataConfig, records: Sequence[Record], tokenizer: Any, source: str, first: int = 0) -> Tokenized:
    options = TalkOptions(config.turns, config.train_on.last_turn, config.train_on.roles)
    return tokenize(records, tokenizer, config.template or "mistral", _limit(config), source, first, options)


def read(config: DataConfig) -> tuple[list[Record], list[Record]]:
    """The records that are trained on, and those held out. Raises UserError for what is wrong before they are tokenized."""
    records = load_records(config)
    if config.eval_source is not None:
        return records, load_records(config, config.eval_source)
    if config.holdout >= len(records):
        raise UserError(f"data.holdout = {config.holdout} leaves nothing of {len(records)} records to train on")
    border = len(records) - config.holdout
    return records[:border], records[border:]


def in_order(
    config: DataConfig, records: list[Record], tokenizer: Any, seed: int, source: str = "the held-out data", first: int = 0
) -> Batches:
    """Batches of these records as the config's training would make them, but in their own order. source, first: as in `tokenize`."""
    return Batches(_tokenized(config, records, tokenizer, source, first).queries, config, seed, shuffle=False)


def _limit(config: DataConfig) -> int:
    """Tokens at which a query is cut."""
    return min(config.row_tokens, config.max_length) if config.batching == "fixed" else config.max_length

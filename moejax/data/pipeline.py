"""The whole way from the config's data section to batches, with one table of what came out."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np

from moejax.config_data import DataConfig
from moejax.contents import records_content
from moejax.data import chat
from moejax.data.batching import Batches, GivenBatches, synthetic
from moejax.data.places import list_of
from moejax.data.records import Record
from moejax.data.sources import Source, load_sources, parted
from moejax.data.sums import added
from moejax.data.supervision import TalkOptions
from moejax.data.tokenize import Tokenized, check_left, tokenize, tokenize_pairs
from moejax.errors import UserError
from moejax.progress import Table

SYNTHETIC_ROWS = 1000
WINDOW = 4096
"""Records that are tokenized at once with data.streaming."""


@dataclass(frozen=True)
class Counted:
    """What came of one source. duplicates: records equal to an earlier one, of this source or another."""

    source: Source
    tokenized: Tokenized
    duplicates: int

    def counts(self) -> dict[str, str | float]:
        t, lengths = self.tokenized, [len(query.ids) for query in self.tokenized.queries]
        return {
            "source": self.source.name, "weight": self.source.weight, "records": t.records, "dropped": t.dropped, "cut": t.cut,
            "split": t.split, "duplicate": self.duplicates, "queries": len(lengths), "tokens": sum(lengths),
            "longest": max(lengths, default=0),
        }  # fmt: skip


@dataclass(frozen=True)
class Dataset:
    """Batches to train on, batches to evaluate on (or None), and the counts behind them: of all together, and of each source."""

    train: Batches | GivenBatches
    evaluation: Batches | None
    tokenized: Tokenized
    source: str
    held_out_dropped: int = 0
    config: DataConfig | None = None  # with the template and the day in the place of null
    contents: dict[str, str] = field(default_factory=dict)  # "data", "evaluation": hash of the records
    sources: tuple[Counted, ...] = ()

    def statistics(self) -> dict[str, float]:
        """Counts; lengths in tokens with the template and the end of sequence."""
        lengths = np.array([len(q.ids) for q in self.tokenized.queries])
        return {
            "records": self.tokenized.records,
            **self._talks(),
            "dropped": self.tokenized.dropped,
            "  blank answers": self.tokenized.blank_answers,
            "  blank questions": self.tokenized.blank_questions,
            **self._left_out(),
            "  answers cut off": self.tokenized.cut_off,
            "  too long": self.tokenized.too_long,
            "cut": self.tokenized.cut,
            "split": self.tokenized.split,
            "duplicate": sum(one.duplicates for one in self.sources),
            "with control tokens": self.tokenized.marked,
            "unknown tokens": self.tokenized.unknown,
            **({"pairs": len(lengths) // 2} if self.tokenized.pairs else {}),
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

    def _held_out(self) -> tuple[str, int]:
        queries = 0 if self.evaluation is None else len(self.evaluation.queries)
        return ("held out pairs", queries // 2) if self.tokenized.pairs else ("held out queries", queries)

    def _left_out(self) -> dict[str, float]:
        """Of conversations, those without an answer; of preferences, those that say nothing."""
        refused, talks = self.tokenized.pairs, self.tokenized.talks
        if refused is not None:
            return {"  equal sides": len(refused.equal), "  an empty side": len(refused.empty), "  a side cut off": len(refused.emptied)}
        return {"  without an answer": len(talks.unanswered)} if talks else {}

    def table(self) -> Table:
        def text(name: str, value: float) -> str:
            return f"{100 * value:.1f} %" if name == "padding" else f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"

        seldom = ("  too long", "split", "unknown tokens")
        counts = {name: value for name, value in self.statistics().items() if value or name not in seldom}
        rows = [(name, text(name, value)) for name, value in counts.items()]
        if self.evaluation is not None:
            dropped = f" ({self.held_out_dropped:,} dropped)" if self.held_out_dropped else ""
            name, count = self._held_out()
            rows.append((name, f"{count:,}{dropped}"))
        return Table(rows)

    def by_source(self) -> list[Table]:
        """What came of each, where there are several."""
        if len(self.sources) < 2:
            return []
        counts = [one.counts() for one in self.sources]
        rows = [[value if isinstance(value, str) else f"{value:,g}" if isinstance(value, float) else f"{value:,}" for value in c.values()]
                for c in counts]  # fmt: skip
        return [Table(rows, tuple(counts[0]), range(1, len(counts[0])))]

    def document(self) -> dict[str, Any]:
        """All of it for JSON."""
        return {
            "source": self.source,
            "statistics": {name.strip(): value for name, value in [*self.statistics().items(), self._held_out()]},
            "sources": [one.counts() for one in self.sources],
            "notes": self.notes(),
        }

    def notes(self) -> list[str]:
        """What a user should know next to the table."""
        t, found = self.tokenized, []
        for one in self.sources:
            found += [f"columns of {one.source.name}: {one.source.columns.told()}", *one.source.notes]
        several = len(self.sources) > 1 or any(len(one.source.parts) > 1 for one in self.sources)
        files = {kind: f"{name}, " for kind, name in t.files.items()} if several else {}
        found += t.talks.notes(files) if t.talks else []
        found += t.pairs.notes(files) if t.pairs else []
        if t.thoughtless:
            many = f"{len(t.thoughtless):,} answer{'s have' if len(t.thoughtless) > 1 else ' has'}"
            found.append(
                f"the chat template's prompt opens a thinking, and {many} none (first: {files.get('thoughtless', '')}record "
                f"{t.thoughtless[0]}): an empty one is trained on, after which the model does not think; a thinking lies under "
                "reasoning_content, or between <think> and </think> at the beginning of an answer"
            )
        if t.first_marked is not None:
            index, mark = t.first_marked
            kept = "as tokens: data.template = text takes its records as they are written" if t.as_written else "as text"
            many = f"{t.marked:,} record{'s hold' if t.marked > 1 else ' holds'}"
            first = f"{files.get('marked', '')}record {index}, {mark!r}"
            found.append(f"{many} control tokens or the template's marks (first: {first}): kept, {kept}")
        if t.first_unknown is not None:
            index, letter = t.first_unknown
            first = f"{files.get('unknown', '')}record {index}{f', {letter!r}' if letter else ''}"
            found.append(
                f"{t.unknown:,} token{'s are' if t.unknown > 1 else ' is'} the tokenizer's unknown one (first: {first}): it has no token "
                "for such letters, and the model sees nothing of them"
            )
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


def load(config: DataConfig, tokenizer: Any, seed: int, vocab_size: int, *, pairs: bool = False) -> Dataset:
    """Read, tokenize and batch. `tokenizer` may be None for synthetic rows. pairs: both sides of preferences. Raises UserError for every
    fault of the data."""
    if config.source is None:
        queries = synthetic(config, vocab_size, seed, max(SYNTHETIC_ROWS, config.batch_rows))
        return Dataset(Batches(queries, config, seed), None, Tokenized(queries, len(queries)), "random tokens")
    everything = load_sources(config, pairs=pairs)
    sources, held_out = _held_out(config, everything, pairs)
    contents = {"data": _content(everything)}
    if config.eval_source is not None:
        contents["evaluation"] = _content(held_out)
    config = settled(config, chain.from_iterable(source.records for source in sources), tokenizer)
    seen: set[int] = set()
    counted = [_counted(config, source, tokenizer, seen, pairs) for source in sources]
    tokenized = added([one.tokenized for one in counted])
    check_left(tokenized, config.named, config.max_length)
    weights = [(len(one.tokenized.queries), one.source.weight) for one in counted]
    for one in counted:
        n = len(one.tokenized.queries) // (2 if pairs else 1)
        if n and n * one.source.weight < 1:
            raise UserError(f"data.source: {one.source.name}: weight = {one.source.weight:g} of {n} records is less than one an epoch")
    evaluation, dropped = None, 0
    if held_out:
        held = added([_tokenized(config, source, tokenizer, pairs) for source in held_out])
        check_left(held, "the held-out data", config.max_length)
        evaluation, dropped = Batches(held.queries, config, seed, shuffle=False, pairs=pairs), held.dropped
    train = Batches(tokenized.queries, config, seed, weights=weights, pairs=pairs)
    return Dataset(train, evaluation, tokenized, config.named, dropped, config, contents, tuple(counted))


def settled(config: DataConfig, records: Iterable[Record], tokenizer: Any) -> DataConfig:
    """The config with a template in the place of null, and the day where the chat template asks for it; the tokenizer's chat template is
    rendered with them from now on."""
    template = config.template or ("chat" if any("conversation" in record for record in records) else "mistral")
    chat.settle(tokenizer, template, config.template_args, config.template_date)
    date = config.template_date
    if date is None and template in ("chat", "chatml") and chat.asks_date(tokenizer):
        date = datetime.date.today().isoformat()
        chat.settle(tokenizer, template, config.template_args, date)
    return config.model_copy(update={"template": template, "template_date": date})


def read(config: DataConfig, *, pairs: bool = False) -> tuple[list[Source], list[Source]]:
    """What is trained on, and what is held out. Raises UserError for what is wrong before records are tokenized."""
    return _held_out(config, load_sources(config, pairs=pairs), pairs)


def _held_out(config: DataConfig, everything: list[Source], pairs: bool) -> tuple[list[Source], list[Source]]:
    if config.eval_source is not None:
        return everything, load_sources(config, config.eval_source, pairs=pairs)
    return parted(everything, config.holdout)


def _content(sources: Sequence[Source]) -> str:
    """Of records as they were read, in order; of several sources, or of one with a weight, with the weights."""
    plain = len(sources) == 1 and sources[0].weight == 1
    return records_content(chain.from_iterable(chain(one.records, [] if plain else [["weight", one.weight]]) for one in sources))


def _counted(config: DataConfig, source: Source, tokenizer: Any, seen: set[int], pairs: bool) -> Counted:
    tokenized = _tokenized(config, source, tokenizer, pairs)
    duplicates = 0
    for record in source.records:
        content = int(records_content([record])[:16], 16)
        duplicates += content in seen
        seen.add(content)
    return Counted(source, tokenized, duplicates)


def _tokenized(config: DataConfig, source: Source, tokenizer: Any, pairs: bool) -> Tokenized:
    """A source's queries, file by file; with data.streaming a window of records after the other, and the queries on disk."""
    done, queries = [], list_of(config.streaming)(())
    for part in source.parts:
        n = WINDOW if config.streaming else len(part.records)
        for at in range(0, len(part.records), max(n, 1)):
            records, first = list(part.records[at : at + n]), part.first + at
            one = _of_records(config, records, tokenizer, part.name, first, whole=False, pairs=pairs)
            queries.extend(one.queries)
            one.queries = []
            done.append(one)
    tokenized = added(done) if done else Tokenized()
    tokenized.queries = queries
    return tokenized


def _of_records(
    config: DataConfig, records: Sequence[Record], tokenizer: Any, source: str, first: int = 0, *, whole: bool = True,
    pairs: bool = False,
) -> Tokenized:  # fmt: skip
    options = TalkOptions(config.turns, config.train_on.last_turn, config.train_on.roles)
    template = config.template or "mistral"
    if pairs:
        return tokenize_pairs(records, tokenizer, template, _limit(config), source, first, options, too_long=config.too_long)
    return tokenize(records, tokenizer, template, _limit(config), source, first, options, whole=whole, too_long=config.too_long)


def in_order(config: DataConfig, records: list[Record], tokenizer: Any, seed: int, source: str = "the held-out data") -> Batches:
    """Batches of these records as the config's training would make them, but in their own order. source: as in `tokenize`."""
    return Batches(_of_records(config, records, tokenizer, source).queries, config, seed, shuffle=False)


def _limit(config: DataConfig) -> int:
    """Tokens at which a query is cut."""
    return min(config.row_tokens, config.max_length) if config.batching == "fixed" else config.max_length

"""The section `data`: what is trained on, and how it becomes batches. No jax here."""

from __future__ import annotations

import datetime
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from moejax.config_sources import FieldNames, Sources, WeightedSource, named
from moejax.config_values import Place, Positive, Section, as_tuple

ROW_MULTIPLE = 16
"""Every batch has rows of a multiple of this many tokens. XLA's products for a GPU work in tiles of at least 16 tokens, and a tile may
not cross from one row of the batch into the next: products of two rows of 372 tokens, joined by XLA, compiled for no GPU."""


def whole_row(tokens: int) -> int:
    """The length of a row that holds this many tokens: the next multiple of ROW_MULTIPLE."""
    return -(-tokens // ROW_MULTIPLE) * ROW_MULTIPLE


_PADDED = f"padded up to a multiple of {ROW_MULTIPLE}"


class TrainOn(Section):
    """What of a conversation the loss is on: the messages of these roles, or the last of them alone."""

    roles: Annotated[tuple[Literal["assistant", "user", "system", "tool"], ...], BeforeValidator(as_tuple), Field(min_length=1)] = (
        "assistant",
    )
    last_turn: bool = False


class DataConfig(Section):
    """What is trained on, and how it becomes batches. Lengths in tokens."""

    source: Sources = Field(
        None, description="a file, a folder or a glob of files, a URL, or a name for `datasets`; several: [{source: NAME, weight: 2.0}, "
        "NAME]; null: random tokens (fixed only)"
    )  # fmt: skip
    config_name: str | None = None
    split: str = "train"
    fields: FieldNames = FieldNames()
    records: Positive | None = Field(None, description="declared number of records, checked after loading")
    bytes: Positive | None = Field(None, description="declared file size, checked")
    sha256: str | None = Field(None, description="declared hash of the file, checked")
    template: Literal["mistral", "alpaca", "chat", "chatml", "text"] | None = Field(
        None, description="null: mistral for questions and answers, chat (the tokenizer's own) for conversations; stored with the run"
    )
    template_args: dict[str, Any] = Field(
        default_factory=dict, description="further arguments of the chat template: {enable_thinking: false}"
    )
    template_date: Annotated[str, Field(pattern=r"^\d{4}-\d{2}-\d{2}$")] | None = Field(
        None, description="current date for chat templates; null: the run's first day, stored with the run"
    )
    turns: Literal["auto", "whole", "split", "last"] = Field(
        "auto",
        description="queries per conversation: auto: one where its answers are as at inference, else one per answer; whole: always "
        "one; split: one per answer; last: one, of the last answer",
    )
    train_on: TrainOn = TrainOn()
    max_length: Positive = Field(1024, description="maximum tokens of a query")
    too_long: Literal["cut", "drop", "split"] = Field(
        "cut", description="a longer query is cut at its end, left out, or (template: text) split in queries of max_length; counted"
    )
    batching: Literal["pack", "pad_longest", "pad_bucket", "fixed"] = "pack"
    row_tokens: Positive = Field(2048, description=f"row length for pack and fixed, {_PADDED}")
    buckets: Annotated[tuple[int, ...], BeforeValidator(as_tuple)] = Field(
        (128, 256, 512, 1024), description=f"row lengths for pad_bucket, {_PADDED}"
    )
    batch_rows: Positive = Field(1, description="rows of one micro-batch")
    shuffle: bool = True
    streaming: bool = Field(
        False, description="for data larger than memory: read files in windows, store records and queries on disk (TMPDIR)"
    )
    holdout: Annotated[int, Field(ge=0)] = Field(0, description="number of records at the end used for the evaluation loss")
    eval_source: Place | None = Field(None, description="a file or name with held-out records, instead of holdout")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.source is None and self.batching != "fixed":
            raise ValueError(f"source is missing: batching {self.batching!r} needs records (only `fixed` makes random rows)")
        if self.batching == "pack" and self.max_length > self.row_tokens:
            raise ValueError(
                f"max_length = {self.max_length} exceeds row_tokens = {self.row_tokens}: a query must fit into a row"
            )
        if self.batching == "pad_bucket" and (not self.buckets or max(self.buckets) < self.max_length):
            raise ValueError(f"buckets = {list(self.buckets)}: the largest must be at least max_length = {self.max_length}")
        if self.template_date is not None:
            try:
                datetime.date.fromisoformat(self.template_date)
            except ValueError as error:
                raise ValueError(f"template_date = {self.template_date!r}: {error}: expected a day, as 2026-03-09") from None
        if isinstance(self.source, tuple) and len(self.source) > 1 and (self.bytes is not None or self.sha256 is not None):
            raise ValueError("bytes and sha256 are of one file, and source has several: remove them (records counts those of all)")
        if self.too_long == "split" and self.template != "text":
            raise ValueError(
                f"too_long = split is for whole texts (template = text): with template = {self.template or 'null'} a later part of an "
                "answer has lost its question. Choose cut or drop"
            )
        if self.holdout and self.eval_source is not None:
            raise ValueError("holdout and eval_source exclude each other")
        return self

    @property
    def sources(self) -> tuple[WeightedSource, ...]:
        """All of `source`, each with what it has of `data`; none for random tokens."""
        several = self.source if isinstance(self.source, tuple) else () if self.source is None else (WeightedSource(source=self.source),)
        usual = {"config_name": self.config_name, "split": self.split, "fields": self.fields}
        return tuple(
            one.model_copy(update={name: value for name, value in usual.items() if getattr(one, name) is None}) for one in several
        )

    @property
    def named(self) -> str:
        """`source` in words."""
        return named(self.sources)

    @property
    def longest_text(self) -> int:
        """Tokens that the longest row can hold."""
        if self.batching in ("pack", "fixed"):
            return self.row_tokens
        return max(self.buckets) if self.batching == "pad_bucket" else self.max_length

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that can occur, padding included."""
        return whole_row(self.longest_text)

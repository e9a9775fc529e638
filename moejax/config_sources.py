"""What `data.source` may be: one name or several with weights, and the columns of each."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field, ValidationError

from moejax.config_file import explain
from moejax.config_values import Place, Real, Section


class FieldNames(Section):
    """The columns of a record's parts; null: known by their names (data/columns.py)."""

    instruction: str | None = Field(default=None, description="question or task")
    input: str | None = Field(default=None, description="context of the question")
    output: str | None = Field(default=None, description="the answer (with the loss)")
    text: str | None = Field(default=None, description="the whole text, for template: text")
    messages: str | None = Field(default=None, description="a conversation")
    chosen: str | None = Field(default=None, description="the better of two answers, for `preference`")
    rejected: str | None = Field(default=None, description="the worse of two answers")


class WeightedSource(Section):
    """One of several sources. weight: how often each of its records is seen an epoch, on average; of 0.3 three tenths of them are, each
    epoch others. Null: as in `data`."""

    source: Place
    weight: Annotated[Real, Field(gt=0, le=1000)] = 1.0
    config_name: str | None = None
    split: str | None = None
    fields: FieldNames | None = None


def _sources(value: Any) -> Any:
    """Of a list each entry as it is meant: a name alone has weight 1."""
    if value is None or isinstance(value, tuple):
        return value
    if isinstance(value, str):
        return WeightedSource(source=value).source
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a name, or a list of names or of {{source: NAME, weight: 2.0}}, got {value!r}")
    made = []
    for number, entry in enumerate(value):
        try:
            made.append(WeightedSource.model_validate(entry if isinstance(entry, dict) else {"source": entry}))
        except ValidationError as error:
            raise ValueError(f"entry {number + 1} of {len(value)}: {explain(error, WeightedSource)}") from None
    return tuple(made)


Sources = Annotated[str | tuple[WeightedSource, ...] | None, BeforeValidator(_sources)]


def named(sources: tuple[WeightedSource, ...]) -> str:
    """In words."""
    return ", ".join(one.source if one.weight == 1 else f"{one.source} (weight {one.weight:g})" for one in sources)

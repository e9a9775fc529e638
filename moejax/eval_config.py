"""The `eval:` section of an experiment: right answers counted on held-out problems while it trains. No jax here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

_Positive = Annotated[int, Field(ge=1)]


def _expanded(value: Any) -> Any:
    """A leading ~ is the user's home, as a shell has it."""
    try:
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value
    except RuntimeError:  # ~NAME of a user who is not there
        return value


Place = Annotated[str, BeforeValidator(_expanded)]
"""A file or folder, or a name for the Hub or `datasets`."""


class EvalConfig(BaseModel):
    """Score the untrained model, then as `each_epoch` and `every_steps` say, and the model at the end."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True)

    task: str = Field(description="prompts and the rule by which an answer is right, by name: see moejax eval")
    data: Place = Field(description="held-out problems: a .json, .jsonl, .csv or .parquet file, or a name for `datasets`")
    split: str | None = None
    limit: _Positive | None = Field(None, description="only the first so many problems")
    each_epoch: bool = False
    every_steps: _Positive | None = None
    max_new_tokens: _Positive | None = Field(None, description="where an answer ends; null: as many tokens as the task allows")
    rows: _Positive = Field(64, description="problems answered at a time")
    metric: Literal["accuracy", "loss"] = Field("accuracy", description="what decides which model is kept in best/")
    allow_overlap: bool = Field(False, description="go on where held-out problems are in the training data too")

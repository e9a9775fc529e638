"""What sections of an experiment are made of: kinds of values, and the strict base of all."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


def number(value: Any) -> Any:
    """YAML 1.1 reads `1e-4` as a string: a string that is a number is that number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _expanded(value: Any) -> Any:
    """A leading ~ is the user's home, as a shell has it."""
    try:
        return str(Path(value).expanduser()) if isinstance(value, str) and value.startswith("~") else value
    except RuntimeError:  # ~NAME of a user who is not there
        return value


Place = Annotated[str, BeforeValidator(_expanded)]
"""A file or folder, or a name for the Hub or `datasets`."""


Real = Annotated[float, BeforeValidator(number)]
Positive = Annotated[int, Field(ge=1)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, validate_default=True, allow_inf_nan=False)


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


Names = Annotated[tuple[str, ...], BeforeValidator(as_tuple)]

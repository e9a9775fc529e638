"""What a trial left, as it lies in DIR/trials."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from moejax.errors import UserError
from moejax.files import replace_text
from moejax.study.report.results import Row

HOST_MEMORY = "out of memory on the host"


@dataclass
class Result:
    """Rows, facts (plain JSON data that other trials compute with) and a remark. seconds: of the whole process; None: it did not run.
    Out of the host's memory, which others use too, is `failed`."""

    status: Literal["done", "out_of_memory", "failed"] = "done"
    message: str | None = None
    seconds: float | None = None
    command: str = ""
    rows: list[Row] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def final(self) -> bool:
        """Whether it need not run again: a failed one does."""
        return self.status != "failed"

    def waits(self, name: str) -> Result:
        """Of a trial that waits for this one, NAME, which gave nothing: it is not run, and tried again when this one is."""
        status: Literal["failed", "out_of_memory"] = "failed" if self.status == "failed" else "out_of_memory"
        return Result(status, f"not run: {name}: {self.message}")


_RESULT = TypeAdapter(Result)


def path_of(folder: Path, trial: str, rows: int | None = None) -> Path:
    """Where a trial's result lies; of an attempt, with its rows."""
    return folder / "trials" / f"{trial}{'' if rows is None else f'@{rows}'}.json"


def read(path: Path) -> Result | None:
    """A kept result; None where there is none. Raises UserError for a file that is none."""
    if not path.is_file():
        return None
    try:
        return _RESULT.validate_json(path.read_bytes())
    except ValidationError:
        raise UserError(f"{path} is no result of a trial: delete it, and the trial runs again") from None


def keep(path: Path, result: Result) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_text(path, json.dumps(asdict(result), indent=1, allow_nan=False) + "\n")

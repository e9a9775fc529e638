"""Receipts: what a step took, measured and published, of this tool or another. No jax.

A file is one receipt, or {"about": …, "receipts": [receipt, …]}; the tool's own are `published/receipts_2026.json`. A number has its unit
in its name (`step_seconds`, `peak_gb_allocator`: 1e9 bytes, torch's max_memory_allocated or the same of jax); null: not measured. Two
receipts of one recipe that differ both stay.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from moejax import gpus
from moejax.documents import read_json
from moejax.errors import UserError
from moejax.estimator import published
from moejax.gpus import GPU

RECEIPT = "receipt.json"
"""What a finished run writes into its folder."""
PUBLISHED = published.FOLDER / "receipts_2026.json"
DIFFERENT = 1.05
"""Measurements of one recipe that are farther apart contradict each other."""
_MEASURED = ("step_seconds", "tokens_per_second", "peak_gb_allocator", "driver_mib")
_NO_RECIPE = {*_MEASURED, "id", "source", "note", "tool", "row_tokens", "row_tokens_mean", "day", "predicted", "engagement", "versions"}


class Receipt(BaseModel):
    """One measurement. step_seconds: of an optimizer step of micro_batch x accumulation rows; row_tokens_mean: real tokens of a row."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    id: str = Field(min_length=1)
    model: str
    tool: str
    tool_name: str
    tool_version: str | None = None
    gpu: str | None = None
    weights: str
    experts_in: Literal["device", "host RAM"]
    lora_rank: int | None = Field(None, ge=1)
    targets: str | None = None
    optimizer: str | None = None
    micro_batch: int | None = Field(None, ge=1)
    accumulation: int | None = Field(None, ge=1)
    row_tokens: str | None = None
    row_tokens_mean: float | None = Field(None, gt=0)
    row_tokens_max: float | None = Field(None, gt=0)
    step_seconds: float | None = Field(None, gt=0)
    tokens_per_second: float | None = Field(None, gt=0)
    peak_gb_allocator: float | None = Field(None, gt=0)
    driver_mib: float | None = Field(None, gt=0)
    source: str
    note: str = ""
    day: str | None = None
    predicted: dict[str, Any] | None = None
    """Of a run of this tool: what was predicted of it, under the measurements' names."""
    engagement: dict[str, Any] | None = None
    """Which kernel and which fallback ran."""
    versions: dict[str, str | None] | None = None

    @property
    def rows(self) -> int | None:
        """Of an optimizer step."""
        return None if self.micro_batch is None or self.accumulation is None else self.micro_batch * self.accumulation

    @property
    def recipe(self) -> tuple[tuple[str, Any], ...]:
        """All that was chosen, without what was measured and who says so."""
        return tuple((key, value) for key, value in self if key not in _NO_RECIPE)

    @property
    def campaign(self) -> tuple[str, str]:
        """(tool, last folder of the source): measurements of one session of work."""
        parts = [part for part in re.split(r"[\s/]+", self.source) if "." not in part]
        return self.tool_name, parts[-1] if parts else self.source


def read(path: Path, table: dict[str, GPU] | None = None, given: str = "") -> tuple[Receipt, ...]:
    """All receipts of a file, cards under the table's names. given: the option that named it. Raises UserError for what is none, for a
    measurement without its unit, and for a card that the table does not know."""
    content = read_json(path, given, "expected a receipt, as a finished run writes one (receipt.json)")
    several = content.get("receipts") if "receipts" in content else [content]
    if not isinstance(several, list) or not several:
        raise UserError(f"{given}{path}: `receipts` is {several!r:.40}: expected a list of receipts")
    found = tuple(_one(f"{given}{path}, receipt {number}", item, table) for number, item in enumerate(several, 1))
    names = [r.id for r in found]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise UserError(f"{given}{path}: two receipts have the id {twice!r}: give each its own")
    return found


def _one(where: str, item: Any, table: dict[str, GPU] | None) -> Receipt:
    if not isinstance(item, dict):
        raise UserError(f"{where}: expected an object, got {type(item).__name__}")
    where = f"{where} ({item['id']})" if isinstance(item.get("id"), str) else where
    try:
        receipt = Receipt.model_validate(item)
    except ValidationError as error:
        raise UserError("\n".join(f"{where}: {_told(e)}" for e in error.errors())) from None
    if receipt.gpu is None:
        return receipt
    try:
        return receipt.model_copy(update={"gpu": gpus.find(receipt.gpu, table).name})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def _told(e: Any) -> str:
    """One of pydantic's findings, in our words."""
    name = ".".join(map(str, e["loc"]))
    if e["type"] == "extra_forbidden":
        meant = next((key for key in _MEASURED if key.startswith(name.split("_")[0])), None)
        if meant is not None:
            return f"{name} = {e['input']!r} has no unit that is known here: expected {meant}"
        near = difflib.get_close_matches(name, Receipt.model_fields, n=1)
        return f"unknown key {name}: " + (f"did you mean {near[0]}?" if near else f"expected one of {', '.join(Receipt.model_fields)}")
    if e["type"] == "missing":
        return f"{name} is missing"
    if name in _MEASURED and isinstance(e["input"], str):
        return f"{name} = {e['input']!r}: expected a number alone, in the unit of its name"
    return f"{name} = {e['input']!r}: {e['msg'][0].lower()}{e['msg'][1:]}".replace("input should be", "expected")


@cache
def shipped() -> tuple[Receipt, ...]:
    """Published measurements that come with the package."""
    return read(PUBLISHED)


def of_folder(folder: Path, table: dict[str, GPU] | None = None) -> tuple[Receipt, ...]:
    """A user's own: every JSON file of the folder, and each run's below it. Raises UserError where there is none."""
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"--receipts {folder} {what}: expected a folder with receipts (*.json), or with runs that have a {RECEIPT}")
    files = sorted({*folder.glob("*.json"), *folder.rglob(RECEIPT)})
    if not files:
        raise UserError(f"--receipts {folder} holds no receipt: expected *.json, or runs with a {RECEIPT} (every finished run writes one)")
    return tuple(receipt for file in files for receipt in read(file, table, "--receipts "))


def with_own(folder: str | None, table: dict[str, GPU] | None = None) -> tuple[Receipt, ...]:
    """The package's, and those of a user's folder."""
    return shipped() if folder is None else (*shipped(), *of_folder(Path(folder), table))


def contradictions(receipts: Iterable[Receipt], measured: str = "step_seconds") -> list[tuple[Receipt, ...]]:
    """Receipts of one recipe whose measurements differ by more than `DIFFERENT`: each group, in their order."""
    groups: dict[tuple[tuple[str, Any], ...], list[Receipt]] = {}
    for receipt in receipts:
        if getattr(receipt, measured) is not None and receipt.rows is not None:
            groups.setdefault(receipt.recipe, []).append(receipt)
    return [tuple(group) for group in groups.values() if _ratio(group, measured) > DIFFERENT]


def _ratio(group: Sequence[Receipt], measured: str) -> float:
    values = [getattr(receipt, measured) for receipt in group]
    return max(values) / min(values)

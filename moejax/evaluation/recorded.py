"""What a run's folder says of its evaluations while it trained."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moejax import config, json_lines
from moejax.config import EvalConfig
from moejax.errors import UserError

Record = dict[str, float]


def recorded(folder: Path) -> dict[int, Record]:
    """step -> the evaluation in metrics.jsonl, the last one where a step has several; none without the file."""
    return {r.pop("step"): r for r in _lines(folder) if "eval/accuracy" in r}


def percent(record: Record) -> str:
    """Accuracy with its 95 % interval."""
    share, low, high = (100 * record[f"eval/accuracy{end}"] for end in ("", "_low", "_high"))
    return f"{share:.1f} % ({low:.1f} to {high:.1f})"


@dataclass(frozen=True)
class ScoredRun:
    """A run with evaluations. results: by step; top_k of experts: as its steps counted them; median seconds of its steps, None before
    there are steps."""

    name: str
    folder: Path
    asked: EvalConfig
    results: dict[int, Record]
    top_k: int | None
    experts: int | None
    step_seconds: float | None

    @property
    def kind(self) -> str:
        """"dense" where every token visits every expert, else "sparse"."""
        return "dense" if self.top_k is not None and self.top_k == self.experts else "sparse"

    @property
    def by_epoch(self) -> dict[float, Record]:
        return {r["eval/epoch"]: r for _, r in sorted(self.results.items())}

    def predictions(self, step: int) -> list[dict[str, Any]]:
        """The answers after this step. Raises UserError where the file is not there."""
        path = self.folder / "eval" / f"step-{step}" / "predictions.jsonl"
        if not path.is_file():
            raise UserError(f"{path} is not there: was the folder copied without eval/?")
        # Not splitlines: an answer may hold a line separator of Unicode's.
        try:
            return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]
        except (ValueError, RecursionError):
            raise UserError(f"{path} is not whole: a copy that was cut off?") from None


def open_scored(folder: Path) -> ScoredRun:
    """Raises UserError where the folder is not a run, or was trained without `eval:`."""
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} is not a run (expected config.yaml and metrics.jsonl in it)")
    asked = config.load(folder / "config.yaml").eval
    results = recorded(folder)
    if asked is None or not results:
        why = "its config has no eval: section (docs/training.md)" if asked is None else "not even the untrained model was evaluated yet"
        raise UserError(f"{folder} holds no evaluations: {why}")
    steps = [r for r in _lines(folder) if "step_seconds" in r]
    seconds = sorted(r["step_seconds"] for r in steps)
    counts, tokens = (steps[-1]["expert_counts"][0], steps[-1]["real_tokens"]) if steps else (None, 1)
    return ScoredRun(
        folder.resolve().name,
        folder,
        asked,
        results,
        None if counts is None else round(sum(counts) / tokens),
        None if counts is None else len(counts),
        seconds[len(seconds) // 2] if seconds else None,
    )


def _lines(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    return json_lines.read(path)[0] if path.is_file() else []

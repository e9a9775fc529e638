"""Coefficients of step times by model, method and GPU: the study's, or a file's; and what to take for a GPU that nobody measured.

A file (`coefficients.json`, version 1) holds
`{"schema_version": 1, "entries": [{"model", "method", "gpu", "t0_seconds", "token_seconds", "expert_token_seconds", "source", "points",
"samples": [[t0, u, v], …], "scatter": […], "only_share", "framework", "range", "doubt"}], "paper": {…}}`: t0, u and v of
seconds = t0 + tokens·(u + v·k/E), bootstrap samples of them, draws of one step's relative scatter, k/E where it was one only, whose
software was measured ("jax": this project), between which tokens and k/E, and why not to trust them. `paper` (equations 1 and 2, by
`fitting.py`) is for reading.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from moejax import gpus
from moejax.documents import read_json, sealed, unsealed
from moejax.errors import UserError
from moejax.estimator import published, transfer
from moejax.estimator.least_squares import FloatArray, spread
from moejax.files import replace_text
from moejax.gpus import GPU

SCHEMA_VERSION = 1
_NUMBERS = ("t0_seconds", "token_seconds", "expert_token_seconds")
FAR = 1.5  # this many times beyond what was measured a prediction is called an extrapolation


@dataclass(frozen=True)
class Range:
    """Between what the measured steps lie. `row_tokens`: of the longest measured row, None where that is not known."""

    tokens: tuple[float, float]
    shares: tuple[float, float]
    row_tokens: int | None

    def beyond(self, tokens: float, share: float, row_tokens: int) -> list[str]:
        """What of a step lies outside, in words."""
        told = []
        if not self.tokens[0] / FAR <= tokens <= FAR * self.tokens[1]:
            told.append(f"{tokens:,.0f} tokens a step (measured: {self.tokens[0]:,.0f} to {self.tokens[1]:,.0f})")
        if self.row_tokens is not None and row_tokens > FAR * self.row_tokens:
            told.append(f"rows of {row_tokens:,} tokens (measured: up to {self.row_tokens:,})")
        if not self.shares[0] - 1e-9 <= share <= self.shares[1] + 1e-9:
            told.append(f"k/E = {share:g} (measured: {self.shares[0]:g} to {self.shares[1]:g})")
        return [f"extrapolated, which the brackets do not know: {'; '.join(told)}"] if told else []


@dataclass(frozen=True)
class Entry:
    """t0, u and v [3] of one model and method on one GPU, with samples [n, 3] and scatter [m] (both may be empty)."""

    model: str
    method: str
    gpu: str
    coefficients: FloatArray
    samples: FloatArray
    scatter: FloatArray
    source: str
    points: int
    only_share: float | None = None  # k/E of all points, where u and v could not be distinguished: then u holds both, and v is 0
    framework: str | None = None  # whose steps were measured: "jax" (this project), "pytorch"; None: not known
    range: Range | None = None
    doubt: str | None = None  # why not to trust them
    file: str | None = None  # where it was read
    carried: tuple[FloatArray, ...] = ()  # to a GPU that was not measured, by these factors [3]: the first predicts, the interval spans all

    @property
    def named(self) -> dict[str, float]:
        """The coefficients as a file names them."""
        return dict(zip(_NUMBERS, self.coefficients.tolist(), strict=True))

    @property
    def measured(self) -> bool:
        """On the GPU that is asked about."""
        return not self.carried

    @property
    def basis(self) -> str:
        if self.measured:
            return f"{self.source}, {self.points} points"
        return f"carried over from the {self.gpu} ({self.source}) by data-sheet figures: not measured here"

    def seconds(self, tokens: float, share: float) -> float:
        """Predicted seconds of a step that computes `tokens`, each visiting this share of the experts."""
        factors = self.carried[0] if self.carried else 1.0
        return float(np.array([1.0, tokens, tokens * share]) @ (self.coefficients * factors))

    def interval(self, tokens: float, share: float, level: float = 0.95) -> tuple[float, float] | None:
        """Seconds between which one measured step would lie; None without samples."""
        if not len(self.samples) or not len(self.scatter):
            return None
        one = np.array([1.0, tokens, tokens * share])
        ends = [spread((self.samples * factors) @ one, self.scatter, level) for factors in self.carried or (1.0,)]
        return min(low for low, _ in ends), max(high for _, high in ends)

    def beyond(self, tokens: float, share: float, row_tokens: int) -> list[str]:
        """In what a step is an extrapolation; nothing where that is not known."""
        return [] if self.range is None else self.range.beyond(tokens, share, row_tokens)

    def check_share(self, share: float) -> None:
        """Raises UserError for another share of the experts than the one that was measured, where it was only one."""
        if self.only_share is not None and abs(share - self.only_share) > 1e-9:
            raise UserError(
                f"the coefficients of {self.model} on {self.gpu} were measured at k/E = {self.only_share:g} only, and {share:g} is asked: "
                "fit them to runs with two numbers of experts per token"
            )


def study() -> tuple[Entry, ...]:
    """From the study's seven curves: Mixtral by QLoRA on four GPUs, BlackMamba's full fine-tuning on the A40 (PyTorch, 2024)."""
    return read(published.FOLDER / "coefficients.json")


def choose(entries: Sequence[Entry], model: str, method: str, gpu: GPU, table: dict[str, GPU]) -> Entry:
    """The entry of this GPU, or one carried over: from a card of the same chip, else from the nearest peak. UserError without any."""
    fitting = [e for e in entries if (e.model, e.method) == (model, method)]
    if not fitting:
        have = sorted({f"{e.model} by {e.method}" for e in entries})
        raise UserError(f"no coefficients for {model} by {method}: there are {', '.join(have)}; --coefficients FILE brings others")
    for entry in fitting:
        if entry.gpu == gpu.name:
            return entry

    def distance(found: tuple[Entry, GPU]) -> tuple[bool, float]:
        source = found[1]
        return source.chip != gpu.chip, abs(math.log(source.flops_per_second / gpu.flops_per_second))

    entry, source = min(_with_gpus(fitting, table), key=distance)
    rules: list[transfer.Rule] = sorted(transfer.RULES, key=lambda rule: rule != "host-bound")
    return replace(entry, carried=tuple(transfer.factors(source, gpu, rule) for rule in rules))


def _with_gpus(entries: Sequence[Entry], table: dict[str, GPU]) -> list[tuple[Entry, GPU]]:
    """Entries of GPUs whose figures are known, with them. Raises UserError, naming the file, where there is none."""
    found: list[tuple[Entry, GPU]] = []
    why = ""
    for entry in entries:
        try:
            found.append((entry, gpus.find(entry.gpu, table)))
        except UserError as error:
            why = why or f"{entry.file or entry.source}, {entry.model} by {entry.method}: {error}"
    if not found:
        raise UserError(why)
    return found


def read(path: str | Path) -> tuple[Entry, ...]:
    """Entries of a coefficients file. Raises UserError for a file that is none."""
    path = Path(path)
    document = unsealed(read_json(path, "--coefficients ", "expected what `moejax estimate fit` writes"), f"--coefficients {path}")
    if document.get("schema_version") != SCHEMA_VERSION:
        raise UserError(f"--coefficients {path}: expected a JSON object with schema_version {SCHEMA_VERSION}")
    entries = document.get("entries")
    if not isinstance(entries, list) or not entries:
        raise UserError(f"--coefficients {path}: `entries` is empty or missing")
    return tuple(entry_of(f"--coefficients {path}: entries[{index}]", item, path) for index, item in enumerate(entries))


_MOST = 1e18  # seconds, and what they are made of: more would overflow in products


def entry_of(where: str, item: Any, path: Path) -> Entry:
    """The entry that `document_of` wrote. where: for messages. Raises UserError for what is none."""
    if not isinstance(item, dict):
        raise UserError(f"{where} is not an object")
    missing = [key for key in ("model", "method", "gpu", *_NUMBERS) if key not in item]
    if missing:
        raise UserError(f"{where} lacks {', '.join(missing)}")
    try:
        x = np.array([float(item[key]) for key in _NUMBERS])
        samples = np.array(item.get("samples") or np.zeros((0, 3)), float).reshape(-1, 3)
        scatter = np.array(item.get("scatter") or [], float)
        points = int(item.get("points", 0))
    except (TypeError, ValueError, OverflowError) as error:
        raise UserError(f"{where}: {str(error).partition(';')[0]}") from error
    for key, numbers in (("samples", samples), ("scatter", scatter)):
        if numbers.ndim < 1 or not (np.abs(numbers) < _MOST).all():
            raise UserError(f"{where}: {key}: expected a list of numbers below {_MOST:g}")
    if not (x < _MOST).all() or (x < 0).any() or not x.any():
        raise UserError(f"{where}: {', '.join(_NUMBERS)} = {', '.join(f'{v:g}' for v in x)}: expected none below 0, and not all 0")
    model, method, gpu = (str(item[key]) for key in ("model", "method", "gpu"))
    only = item.get("only_share")
    if only is not None and not (isinstance(only, int | float) and 0 < only <= 1):
        raise UserError(f"{where}: only_share = {only!r}: expected null, or k/E above 0 and at most 1")
    source, framework, doubt = (item.get(key) for key in ("source", "framework", "doubt"))
    for key, value in (("framework", framework), ("doubt", doubt)):
        if value is not None and not isinstance(value, str):
            raise UserError(f"{where}: {key} = {value!r}: expected null or text")
    return Entry(
        model, method, gpu, x, samples, scatter, str(source or path.name), points, only, framework, _range(where, item.get("range")), doubt,
        str(path),
    )  # fmt: skip


def _range(where: str, told: Any) -> Range | None:
    if told is None:
        return None
    try:
        low, high = (float(v) for v in told["tokens"])
        least, most = (float(v) for v in told["shares"])
        return Range((low, high), (least, most), None if told.get("row_tokens") is None else int(told["row_tokens"]))
    except (TypeError, ValueError, KeyError, AttributeError, OverflowError):
        raise UserError(f"{where}: range = {told!r}: expected tokens [low, high], shares [low, high], row_tokens") from None


def document_of(e: Entry) -> dict[str, Any]:
    """An entry as a file holds it."""
    return {
        "model": e.model, "method": e.method, "gpu": e.gpu, **e.named,
        "source": e.source, "points": e.points, "samples": e.samples.tolist(), "scatter": e.scatter.tolist(),
        "only_share": e.only_share, "framework": e.framework, "range": None if e.range is None else asdict(e.range), "doubt": e.doubt,
    }  # fmt: skip


def write(path: str | Path, entries: Sequence[Entry], paper: dict[str, Any] | None = None) -> None:
    """The file that `read` reads. Raises OSError where it cannot be written."""
    document: dict[str, Any] = {"schema_version": SCHEMA_VERSION, "entries": [document_of(e) for e in entries]}
    if paper is not None:
        document["paper"] = paper
    replace_text(Path(path), json.dumps(sealed(document), indent=1) + "\n")

"""The results of one `moejax characterize`, schema version 1: written by moejax/study/characterize, read by moejax/study/report.

A folder holds `characterize.json` (`Study` without its rows, with their hash), and the same rows twice: `results.csv` and `results.json`.
A row is one value; what does not apply to it is empty. Experiments, and the metrics of each with their units:

    largest_batch   predicted_batch, proved_batch, failed_batch (queries: the largest by the compiler; the largest that ran; one that did
                    not), peak_bytes (bytes, of the largest that ran), memory_limit (bytes; scope "device" or "artificial"). Table III.
    stages          seconds (s, per step), scope forward, recompute, backward, optimizer, other, idle: together one step. Figure 4.
    layers          seconds (s, per step), scope attention, mamba, moe, norm, embed, loss, optimizer, other …. Figure 5.
    kernels         seconds (s, per step, all layers together), scope moe/router, moe/w1_dequant, moe/w1 …. Figure 6.
    throughput      queries_per_second (queries/s), tokens_per_second (tokens/s, padding not counted), step_seconds (s, median), seconds
                    (s, all queries), queries (queries, how many were trained on), steps, padded_share (share of computed tokens that are
                    padding), compiler_peak_bytes (bytes). Figure 8.
    utilization     compute_utilization, memory_utilization (share of the device's peak matrix rate and bandwidth), seconds (s); scope: a
                    stage of the mixture of experts, or "moe (time-weighted)", or "step (time-weighted)". Figures 9 and 10.
    expert_load     scope "before/0", "after/0" … (expert, mean over layers): tokens_per_query (tokens/query), share (share of all choices);
                    scope "before", "after": variance ((tokens/query)^2, over the experts), largest_share (share). Figure 11.
    length          as throughput; and compute_utilization, memory_utilization (scope "step (time-weighted)" and "moe (time-weighted)").
    fit_batch       equation 1: c0, c1 (tokens/GB, share), model_gb, rmse_gb (GB), points; predicted_batch (queries, next to largest_batch's
                    proved_batch). Figure 13. c1 is missing where one routing was measured.
    fit_throughput  scope "equation 2 (printed)", "equation 2 (fitted)": c2, c3, c4, rmse (queries/s), points; scope "moejax": t0_seconds,
                    token_seconds, expert_token_seconds, rmse (queries/s), mean_error (share of the measured step seconds), points.
                    Figures 14 and 15.
    cost            scope: a GPU's name: batch (queries), queries_per_second, usd_per_hour (USD/h), hours (h), usd (USD); measured (1: on
                    this device; 0: carried over by data-sheet figures). Table IV.

`batch` is in queries: mean queries of a step where rows hold several. `seq_len`: tokens of a row (padded: the longest that can be).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from moejax.documents import read_json, read_text
from moejax.errors import UserError
from moejax.files import replace_text

VERSION = 1
STUDY_FILE, CSV_FILE, JSON_FILE = "characterize.json", "results.csv", "results.json"


class _Strict:
    __pydantic_config__ = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class Row(_Strict):
    """One value. model: a name of `Study.models`. seq_len in tokens, batch in queries; None: does not apply."""

    trial: str
    experiment: str
    model: str
    method: Literal["qlora", "lora", "full"]
    routing: Literal["sparse", "dense"] | None
    data: Literal["cs", "math", "problems", "fixed", "other"] | None
    batching: Literal["pad_longest", "pack", "fixed"] | None
    seq_len: int | None
    batch: int | float | None
    scope: str
    metric: str
    value: int | float
    unit: str

    @classmethod
    def of(cls, trial: str, experiment: str, model: str, method: Any, metric: str, value: float, unit: str, **columns: Any) -> Row:
        """With what applies of the other columns."""
        others = {"routing": None, "data": None, "batching": None, "seq_len": None, "batch": None, "scope": ""} | columns
        plain = value if isinstance(value, int) else float(value)
        return cls(trial=trial, experiment=experiment, model=model, method=method, metric=metric, value=plain, unit=unit, **others)


COLUMNS = tuple(f.name for f in fields(Row))


@dataclass(frozen=True)
class Model(_Strict):
    """What was trained. family: whose figures of the study it stands next to, if any; weights: "random", or where they came from."""

    name: str
    family: Literal["mixtral", "blackmamba"] | None
    method: Literal["qlora", "lora", "full"]
    weights: str
    params_total: int | None = None


@dataclass(frozen=True)
class Planned(_Strict):
    """A line of the plan, as it was made before anything ran. command: what runs this trial alone."""

    trial: str
    experiment: str
    expected_seconds: float
    command: str


@dataclass(frozen=True)
class Trial(_Strict):
    """What became of a trial. seconds None: it has not run."""

    status: Literal["done", "failed", "out_of_memory", "pending"]
    seconds: float | None
    message: str | None
    command: str


@dataclass(frozen=True)
class MemoryLimit(_Strict):
    """What a step may take, in bytes (None: the device does not say). artificial: set by --memory-limit, not by the device."""

    bytes: int | None
    artificial: bool


@dataclass(frozen=True)
class Environment(_Strict):
    """Where it ran. Peaks in FLOP/s and bytes/s: "measured" here by a matmul and a copy, or "tabled": the data sheet's.

    fingerprint: hash of all fields but the peaks, which a measurement moves.
    """

    device: str
    platform: Literal["cpu", "gpu"]
    memory_bytes: int | None
    peak_flops: float | None
    peak_bytes_per_second: float | None
    peaks: Literal["measured", "tabled"]
    versions: dict[str, str]  # python, jax, jaxlib, flax, moejax …
    cpu: str
    git_commit: str | None
    fingerprint: str


@dataclass(frozen=True)
class Study(_Strict):
    """A folder's content. config: every setting of the sweep, experiments resolved; created: UTC, ISO 8601.

    rows_hash: of results.csv as it was written with this (`write` sets it; None: by a moejax that did not). prices: GPU -> seller and day
    of its price an hour.
    """

    schema_version: Literal[1]
    preset: str | None
    command: str
    created: str
    config: dict[str, Any]
    config_hash: str
    models: list[Model]
    environment: Environment
    memory_limit: MemoryLimit
    plan: list[Planned]
    trials: dict[str, Trial]
    finished: bool
    rows: list[Row] = field(default_factory=list)
    rows_hash: str | None = None
    prices: dict[str, str] = field(default_factory=dict)

    def of(self, experiment: str, **where: Any) -> list[Row]:
        """Rows of an experiment in which all these columns have these values."""
        return [r for r in self.rows if r.experiment == experiment and all(getattr(r, k) == v for k, v in where.items())]


_STUDY, _ROWS = TypeAdapter(Study), TypeAdapter(list[Row])


def digest(content: Any) -> str:
    """Hash of plain data, whatever the order of its keys."""
    return _hash(json.dumps(content, sort_keys=True))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write(study: Study, folder: str | Path) -> None:
    """Write the three files, each aside and then renamed. `characterize.json` comes first: with it the folder is a study's, and by its hash
    `read` tells rows of another moment. Raises UserError where that cannot be."""
    folder, rows = Path(folder), as_csv(study.rows)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        told = replace(study, rows=[], rows_hash=_hash(rows))
        replace_text(folder / STUDY_FILE, _json(_STUDY.dump_python(told, mode="json", exclude={"rows"})))
        replace_text(folder / CSV_FILE, rows)
        replace_text(folder / JSON_FILE, _json({"schema_version": VERSION, "rows": [asdict(r) for r in study.rows]}))
    except OSError as error:
        raise UserError(f"{error.filename or folder}: {error.strerror}: the results cannot be written") from None


def _json(content: Any) -> str:
    return json.dumps(content, indent=1, allow_nan=False) + "\n"


def as_csv(rows: list[Row]) -> str:
    """Header and rows. A number is written so that reading gives it back exactly; None is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in rows:
        writer.writerow("" if v is None else repr(v) if isinstance(v, int | float) else v for v in asdict(row).values())
    return out.getvalue()


def _cells(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text, newline="")))


def read(folder: str | Path) -> Study:
    """A folder's study with its rows. Raises UserError for what is missing, cut off, of another schema, or at odds with itself."""
    folder = Path(folder)
    study = read_plan(folder)
    rows = _validated(_ROWS, _version(_load(folder / JSON_FILE), folder / JSON_FILE).get("rows"), folder / JSON_FILE)
    table = folder / CSV_FILE
    if table.exists() and _cells(read_text(table, remedy=AGAIN)) != _cells(as_csv(rows)):
        raise UserError(f"{folder}: {CSV_FILE} and {JSON_FILE} hold different rows: {AGAIN}")
    if study.rows_hash not in (None, _hash(as_csv(rows))):
        raise UserError(f"{folder}: {STUDY_FILE} was written with other rows than those of {JSON_FILE} (killed meanwhile?): {AGAIN}")
    return replace(study, rows=rows)


def read_plan(folder: str | Path) -> Study:
    """A folder's study without its rows: all that resuming and a trial need. Raises UserError as `read` does."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: expected a folder that `moejax characterize --out` wrote")
    return _validated(_STUDY, _version(_load(folder / STUDY_FILE), folder / STUDY_FILE), folder / STUDY_FILE)


AGAIN = "run the same `moejax characterize` again (finished trials are kept), or take another folder"


def _there(path: Path) -> Path:
    if not path.is_file():
        raise UserError(f"{path} does not exist: expected what `moejax characterize --out {path.parent}` writes")
    return path


def _load(path: Path) -> dict[str, Any]:
    return read_json(_there(path), remedy=AGAIN)


def _version(content: dict[str, Any], path: Path) -> dict[str, Any]:
    found = content.get("schema_version")
    if type(found) is int and found == VERSION:
        return content
    told = "schema_version is missing" if found is None else f"schema_version = {found!r}"
    raise UserError(
        f"{path}: {told}, this moejax reads version {VERSION}. Its trials cannot be taken over: run `moejax characterize` into another "
        "folder, or read it with the moejax that wrote it"
    )


def _validated(kind: TypeAdapter[Any], content: Any, path: Path) -> Any:
    """Through JSON: strict about types, and still taking a list of objects for a list of dataclasses."""
    try:
        return kind.validate_json(json.dumps(content))
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg'].lower()}" for e in error.errors()[:3])
        raise UserError(f"{path}: {problems}: {AGAIN}") from None

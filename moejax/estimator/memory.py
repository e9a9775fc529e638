"""Peak memory of a training step: the compiler's figure where there is one, and the largest batch that fits.

Nothing is compiled here: `training/program.py` does it, and the command line hands its figures over. A figure is exact for the program that
was compiled, so it is kept under a hash of all that makes the program: config, architecture, sources, versions, target, rows, row length.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moejax.errors import UserError
from moejax.estimator import closed_form
from moejax.estimator.units import counted
from moejax.files import cache_folder, replace_text
from moejax.gpus import GPU, GPUS
from moejax.progress import note

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.models.config import Architecture

ROWS_LIMIT = 1 << 20
LINES = 7  # batch sizes that may come from lines
_RUN_ONLY = {"epochs", "steps", "eval_every", "learning_rate", "warmup_steps", "min_learning_rate_ratio", "schedule"}


def relevant(experiment: Experiment) -> dict[str, Any]:
    """The part of a config that makes the compiled program; the model's sizes are given by its architecture, the rows by the caller."""
    whole = experiment.model_dump(mode="json")
    training = {k: v for k, v in whole["training"].items() if k not in _RUN_ONLY}
    model = {k: whole["model"][k] for k in ("moe_backend", "attention", "scan", "aux_loss_coef")}
    sections = {name: whole[name] for name in ("quantization", "adapter", "preference", "placement")}
    sections["mesh"] = whole["mesh"] and {name: whole["mesh"][name] for name in ("devices", "weights", "moments")}
    return {"model": model, **sections, "training": training}


def digest(files: Iterable[Path]) -> str:
    """Hash of the contents of source files, in the order of their names."""
    hashed = hashlib.sha256()
    for path in sorted(files):
        hashed.update(path.name.encode() + b"\0" + path.read_bytes())
    return hashed.hexdigest()[:16]


def cached(key: dict[str, Any], compile_it: Callable[[], int], *, folder: Path | None = None) -> tuple[int, bool]:
    """(the compiler's peak in bytes, whether it was there already), kept in `cache_folder`. A file that is not whole is
    made again; that a folder cannot be written is said once."""
    text = json.dumps(key, sort_keys=True)
    folder = folder or cache_folder()
    path = folder / "peaks" / f"{hashlib.sha256(text.encode()).hexdigest()[:32]}.json"
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        if kept["key"] == json.loads(text):
            return int(kept["peak_bytes"]), True
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        pass
    peak = compile_it()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, json.dumps({"key": key, "peak_bytes": peak}, indent=1) + "\n")
    except OSError as error:
        _unwritten(str(path.parent), error.strerror or str(error))
    return peak, False


@cache
def _unwritten(folder: str, why: str) -> None:
    """Once: a search compiles for many numbers of rows."""
    note(f"warning: {folder} cannot be written ({why}): what was compiled is compiled again the next time")


@dataclass(frozen=True)
class Largest:
    """The largest number of rows that fits. `peak`: with these rows (None where not one fits); `next_peak`: with one more.

    `tried`: rows -> peak bytes of everything that was asked for on the way.
    """

    rows: int
    peak: int | None
    next_peak: int
    tried: dict[int, int]

    def times(self, devices: int) -> Largest:
        """Of rows of one device: those of all."""
        return Largest(devices * self.rows, self.peak, self.next_peak, {devices * rows: peak for rows, peak in self.tried.items()})


def largest_rows(peak_of: Callable[[int], int], limit: float, guess: int = 1, slope: float = 0) -> Largest:
    """The largest b with peak_of(b) <= limit < peak_of(b + 1), both asked for: proved, not extrapolated.

    Peaks are nearly affine in the rows, so the boundary is where the line through the nearest two points crosses the limit; where that does
    not find it (a bend: another moment is the worst one), what is left is halved. `guess`: where to begin; `slope`: about how many bytes
    one more row takes, for the second call (0: unknown). Good ones need two or three calls.
    """
    tried: dict[int, int] = {}

    def ask(rows: int) -> int:
        if rows not in tried:
            tried[rows] = peak_of(rows)
        return tried[rows]

    low, high = 0, ROWS_LIMIT  # `low` fits (0 does by definition), `high` does not
    rows = max(1, min(guess, ROWS_LIMIT - 1))
    while high - low > 1:
        if ask(rows) <= limit:
            low = rows
        else:
            high = rows
        rows = _next(tried, low, high, limit, slope)
    if high == ROWS_LIMIT:
        raise UserError(f"more than {ROWS_LIMIT - 1:,} rows fit: rows of so few tokens say nothing about a GPU")
    return Largest(low, tried.get(low), tried[high], tried)


def _next(tried: dict[int, int], low: int, high: int, limit: float, slope: float) -> int:
    """Strictly between low and high: where a line meets the limit, or next to what is known. The line goes through the two known points
    nearest to the limit or, where it leads out of what is left, through low and high."""
    if len(tried) > LINES:
        return min(2 * low, high - 1) if high == ROWS_LIMIT else (low + high) // 2
    known = sorted(tried, key=lambda r: (abs(tried[r] - limit), -r))[:2]
    if len(known) < 2:
        away = int((limit - tried[known[0]]) // slope) if slope > 0 else 0
        aim = known[0] + (away or (1 if high == ROWS_LIMIT else -1))  # a good guess is proved, or mended, by its neighbour
    else:
        aim = _meets(tried, known[0], known[1], limit)
        if not low <= aim < high and low in tried and high in tried:
            aim = _meets(tried, low, high, limit)
        aim = aim + 1 if aim == low else aim
    return max(low + 1, min(high - 1, aim))


def _meets(tried: dict[int, int], first: int, second: int, limit: float) -> int:
    """The last rows within the limit by the line through two points; twice as many where it does not rise."""
    a, b = sorted((first, second))
    slope = (tried[b] - tried[a]) / (b - a)
    return a + int((limit - tried[a]) // slope) if slope > 0 else 2 * max(b, 1)


def usable_bytes(gpu: GPU, fraction: float) -> float:
    """What jax may take of a GPU: the memory that its driver reports (nominal GB where unknown) times device.memory_fraction; of a TPU's
    chip all that its runtime leaves."""
    if gpu.usable_bytes is not None:
        return gpu.usable_bytes
    return gpu.memory_bytes if gpu.platform == "tpu" else gpu.memory_bytes * fraction


def by_gpu(gpu: GPU, fraction: float) -> tuple[float, float]:
    """`by_closed_form` of what jax may take of a GPU."""
    return by_closed_form(usable_bytes(gpu, fraction), error_on(gpu))


# Of programs that nothing was read off, the closed form was at most 3.1 % too low (docs/study.md, Table III next to ours).
CLOSED_FORM_ERROR = 0.035
# A TPU's compiler keeps more (tiles, gathered matrices): docs/tpu.md.
TPU_ERROR = 0.13
LEAST_FREE_BYTES = 0.3e9
COMPILE = "too close to call by the closed form: compile (extra `aot`)"


def error_on(gpu: GPU) -> float:
    """By how much the closed form may be too low, of a peak on this GPU."""
    return TPU_ERROR if gpu.platform == "tpu" else CLOSED_FORM_ERROR


def by_closed_form(usable: float, error: float = CLOSED_FORM_ERROR) -> tuple[float, float]:
    """(a peak by the closed form up to which a step fits whatever its error, one beyond which it does not), bytes. Between the two
    only the compiler can tell."""
    return min(usable / (1 + error), usable - LEAST_FREE_BYTES), usable / (1 - error)


def cards(experiment: Experiment, config: Architecture) -> list[str]:
    """Which cards of the table hold the config's step, by the closed form; none is named as fitting that a run would refuse.

    What fits with the config's own rows, what the closed form cannot call, what does not fit, what lacks bf16. A remat policy between
    `none` and `full` counts as `none`, which holds most; `auto` as `full`, which it comes down to.
    """
    t, rows, row_tokens = experiment.training, experiment.data.batch_rows, experiment.data.longest_row
    policy = {"auto": "full", "dots": "none"}.get(t.remat, t.remat)
    settled = experiment.changed("training", remat=policy)
    found: dict[str, list[str]] = {"fits": [], "close": [], "small": [], "without": []}
    for gpu in GPUS.values():
        peak = closed_form.on(gpu, settled, config, rows, row_tokens).total
        sure, possible = by_gpu(gpu, experiment.device.memory_fraction)
        kind = "without" if t.asks_bf16 and not gpu.bf16 else "fits" if peak <= sure else "close" if peak <= possible else "small"
        found[kind].append(gpu.name)
    share = f"{experiment.device.memory_fraction:g} of the memory"
    heads = {
        "fits": f"fits ({counted(rows, 'row')} of {row_tokens:,} tokens, by the closed form, in {share})",
        "close": COMPILE, "small": "does not fit", "without": "no bf16, which the training section asks for",
    }  # fmt: skip
    return [f"{head}: {', '.join(found[kind]) or 'none'}" for kind, head in heads.items() if found[kind] or kind in ("fits", "small")]


class DoesNotFit(UserError):
    """A step is refused by one GPU; another may take it. `brief`: without which. `what`: the part of it that is the same on every GPU."""

    def __init__(self, brief: str, others: str = "", what: str = "") -> None:
        self.what, self.more = what, brief
        self.brief = f"{what}: {brief}" if what else brief
        super().__init__(f"{self.brief}; {others}" if others else self.brief)


def refusals(left_out: dict[str, DoesNotFit]) -> list[str]:
    """Why these GPUs do not do, without those that would; what is the same of several is said once."""
    told: dict[str, list[str]] = {}
    for why in left_out.values():
        told.setdefault(why.what or why.brief, []).append(why.more)
    return [f"{what}: {', '.join(more)}" if more != [what] else what for what, more in told.items()]


def would_do(gpus: Iterable[GPU]) -> str:
    """These GPUs, smallest first, would do."""
    names = [g.name for g in sorted(gpus, key=lambda g: (g.memory_gb, g.name))]
    return f"{', '.join(names)} would do" if names else "no GPU of the table would do"


def roomy(gpus: Iterable[GPU], fraction: float, peak_on: Callable[[GPU], float]) -> str:
    """Which of these would do, by the closed form's bytes on each."""
    return would_do(g for g in gpus if peak_on(g) <= by_gpu(g, fraction)[0])


def too_large(
    what: str, needed: float, gpu: GPU, fraction: float, others: Iterable[GPU], peak_on: Callable[[GPU], float], *, closed: bool
) -> DoesNotFit:
    """By how much a step exceeds a GPU, or that the closed form cannot tell, and which of `others` would do.

    peak_on: the closed form's bytes on another GPU, where the compiler makes another program; `closed`: `needed` is by the closed form.
    """
    usable = usable_bytes(gpu, fraction)
    would = roomy((g for g in others if g.name != gpu.name), fraction, peak_on)
    part = gpu.usable_bytes is None and gpu.platform != "tpu"
    there = f"{usable / 1e9:.2f} GB usable on {gpu.name}" + (f" ({fraction:.0%} of its memory)" if part else "")
    if closed and needed <= by_gpu(gpu, fraction)[1]:
        return DoesNotFit(f"{what} needs {needed / 1e9:.2f} GB of the {there}: {COMPILE}", would)
    by = " by the closed form" if closed else ""
    return DoesNotFit(f"{what} needs {needed / 1e9:.2f} GB{by}: {(needed - usable) / 1e9:.2f} GB more than the {there}", would)

"""What a run was predicted to take next to what it took. Reads a run's folder; keeps comparison.json in it.

`prediction.json` is written by the run at its start: the compiled step's peak, and coefficients where they were known.
`metrics.jsonl` holds what was measured, step by step. Steps that the run calls disturbed (they warmed up, waited for the compiler, or were
traced) are left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from moejax import json_lines
from moejax.documents import read_json
from moejax.errors import UserError
from moejax.estimator import coefficients, units
from moejax.estimator.coefficients import Entry
from moejax.files import replace_text

PREDICTION, COMPARISON, METRICS = "prediction.json", "comparison.json", "metrics.jsonl"
_TOLD: dict[str, Any] = {
    "compiler_peak_bytes": int, "gpu": str, "model": str, "method": str, "share": int | float, "time": dict | None, "disturbed_steps": list
}  # fmt: skip
_STEP = ("step_seconds", "padded_tokens", "device_peak_bytes", "host_peak_bytes")
Document = dict[str, Any]


def time_prediction(entry: Entry, share: float) -> Document:
    """An entry as prediction.json keeps it: seconds and their interval at these tokens follow from it."""
    entry.check_share(share)
    return coefficients.document_of(entry) | {"share": share}


def step_time(time: Document) -> Entry:
    """The other way round. Raises UserError for what another version wrote."""
    if not _is(share := time.get("share"), int | float):
        raise UserError(f"{PREDICTION}: time: share = {json.dumps(share)[:60]}: expected k/E of the run: damaged?")
    return coefficients.entry_of(f"{PREDICTION}: time", time, Path(PREDICTION))


def write_json(path: Path, document: Document) -> None:
    replace_text(path, json.dumps(document, indent=1) + "\n")


def read_prediction(folder: Path) -> Document:
    """Raises UserError where the run wrote none, or it is not whole."""
    path = folder / PREDICTION
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist (expected a run's folder, e.g. runs/demo)")
    if not path.is_file():
        raise UserError(f"{folder} holds no {PREDICTION}: it is not a run of this version, or it ended before its first step")
    document = read_json(path)
    missing = [key for key in _TOLD if key not in document]
    if missing:
        raise UserError(f"{path} lacks {', '.join(missing)}")
    wrong = next((key for key, kind in _TOLD.items() if not _is(document[key], kind)), None)
    if wrong is not None:
        raise UserError(f"{path}: {wrong} = {json.dumps(document[wrong])[:60]} is not what a run writes: damaged?")
    return document


def _is(value: Any, kind: Any) -> bool:
    """Whether a value read is of a kind, and as a number one that can be meant."""
    if isinstance(value, list):
        return kind is list and all(_is(item, int) for item in value)
    return isinstance(value, kind) and not isinstance(value, bool) and (not isinstance(value, int | float) or 0 <= value < 1e18)


def read_steps(folder: Path, disturbed: list[int]) -> list[Document]:
    """Records of metrics.jsonl that are undisturbed steps, the last one of each step (a resumed run writes a step again)."""
    path = folder / METRICS
    if not path.is_file():
        raise UserError(f"{folder} holds no {METRICS}: nothing was measured")
    found, damaged = json_lines.read(path)
    if damaged and not found:
        raise UserError(f"{path}, line {damaged[0]}: no whole JSON: was it cut off?")
    steps = {record["step"]: record for record in found if "step_seconds" in record}
    left = [steps[step] for step in sorted(steps.keys() - set(disturbed))]
    for record in left:
        wrong = [key for key in _STEP if not _is(record.get(key, 0), int | float)]
        if wrong or "padded_tokens" not in record:
            what = f"{wrong[0]} = {json.dumps(record[wrong[0]])[:60]}, expected a number" if wrong else "no padded_tokens"
            raise UserError(f"{path}: step {record['step']} has {what}: damaged?")
    if not left:
        many = units.counted(len(steps), "step")
        raise UserError(f"{path} has {many}, all of which warmed up, waited for the compiler or were traced: train longer")
    return left


def compare(folder: Path, entry: Entry | None = None) -> Document:
    """Errors in memory and step time, and so in dollars (predicted over measured, less 1), written to comparison.json. `entry`:
    coefficients to predict with instead of those that the run printed. What was not predicted is null, with the reason."""
    told = read_prediction(folder)
    steps = read_steps(folder, told["disturbed_steps"])
    time = told["time"] if entry is None else time_prediction(entry, told["share"])
    seconds = _seconds(told, steps, time)
    versions = told.get("recipe", {}).get("versions", {})
    document: Document = {"memory": _memory(told, steps), "step_seconds": seconds}
    document |= {key: told[key] for key in ("gpu", "model", "method")} | {"steps": len(steps)}
    document["version"] = ", ".join(f"{name} {versions[name]}" for name in ("moejax", "jax") if name in versions) or "unknown"
    write_json(folder / COMPARISON, document)
    return document


def _memory(told: Document, steps: list[Document]) -> Document:
    device = [r["device_peak_bytes"] for r in steps if "device_peak_bytes" in r]
    host = [r["host_peak_bytes"] for r in steps if "host_peak_bytes" in r]
    peak = told["compiler_peak_bytes"]
    if device:
        return {"predicted_bytes": peak, "measured_bytes": max(device), "error": peak / max(device) - 1, "why_not": None}
    why = "a CPU's allocator does not say its peak; measured is the resident memory of the whole process, Python and libraries included"
    return {"predicted_bytes": peak, "measured_bytes": max(host, default=None), "error": None, "why_not": why}


def _seconds(told: Document, steps: list[Document], time: Document | None) -> Document:
    """Means over the steps: a step's own tokens predict it."""
    measured = float(np.mean([r["step_seconds"] for r in steps]))
    program = told.get("program")
    if time is None and program is not None:
        times = float(np.mean([r["padded_tokens"] for r in steps])) / program["tokens"]
        predicted, ends = times * program["predicted"], [times * end for end in program["interval"]]
        return {"predicted": predicted, "interval": ends, "measured": measured, "error": predicted / measured - 1, "why_not": None}
    if time is None:
        return {"predicted": None, "interval": None, "measured": measured, "error": None, "why_not": told.get("why_no_time")}
    law, tokens = step_time(time), [float(r["padded_tokens"]) for r in steps]
    predicted = float(np.mean([law.seconds(t, time["share"]) for t in tokens]))
    interval = law.interval(float(np.mean(tokens)), time["share"])
    return {"predicted": predicted, "interval": interval, "measured": measured, "error": predicted / measured - 1, "why_not": None}


def lines(document: Document, *, compared: bool = False) -> list[str]:
    """The comparison in words. compared: without what was not predicted, and why."""
    m, s = document["memory"], document["step_seconds"]
    measured = "unknown" if m["measured_bytes"] is None else units.told(m["measured_bytes"])
    memory = f"memory: predicted {units.told(m['predicted_bytes'])}, measured {measured}"
    told = []
    if m["error"] is not None:
        told.append(f"{memory}: {_percent(m['error'])}")
    elif not compared:
        told.append(f"{memory} (not comparable: {m['why_not']})")
    if s["error"] is None and not compared:
        told.append(f"step: not predicted ({s['why_not']}), measured {1e3 * s['measured']:.1f} ms")
    elif s["error"] is not None:
        between = "" if s["interval"] is None else f" ({1e3 * s['interval'][0]:.1f} to {1e3 * s['interval'][1]:.1f})"
        step = f"step: predicted {1e3 * s['predicted']:.1f} ms{between}, measured {1e3 * s['measured']:.1f} ms"
        told.append(f"{step}: {_percent(s['error'])}")
    return told


def _percent(error: float) -> str:
    return f"{100 * error:+.1f} %"

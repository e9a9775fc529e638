"""A finished run's receipt: what was chosen, predicted and measured, in the form of `receipts.py`; receipt.json in the run's folder.

The recipe comes from prediction.json, which the run writes at its start; figures from its comparison and its undisturbed steps.
"""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from moejax import __version__, gpus, installation
from moejax.errors import UserError
from moejax.estimator import comparison, fitting, margin, own, receipts
from moejax.estimator.receipts import RECEIPT as RECEIPT
from moejax.estimator.receipts import Receipt
from moejax.files import replace_text

if TYPE_CHECKING:
    from moejax.config import Experiment
    from moejax.models.config import Architecture

_WEIGHTS = {"nf4": "nf4", "nf4-double": "nf4+dq", "mxfp4": "mxfp4"}


def recipe(experiment: Experiment, config: Architecture, engagement: dict[str, Any]) -> dict[str, Any]:
    """What prediction.json keeps of a run for its receipt. engagement: which kernels run."""
    e, t = experiment, experiment.training
    kind = e.kinds(config).get("experts")
    dtype = {"bfloat16": "bf16", "float32": "fp32"}[t.compute_dtype if e.adapter else t.stored_dtype]
    pairs = e.adapter.lora.of(config) if e.adapter else {}
    on_device = e.placement.on_device(config.expert_layers) == config.expert_layers
    return {
        "weights": _WEIGHTS.get(kind or "", dtype), "experts_in": "device" if on_device else "host RAM",
        "lora_rank": max((pair.rank for pair in pairs.values()), default=None), "targets": ", ".join(pairs) or "all weights",
        "optimizer": t.optimizer, "micro_batch": e.data.batch_rows, "accumulation": t.gradient_accumulation,
        "row_tokens": f"{e.data.batching} of {e.data.named if e.data.source else 'random tokens'}",
        "row_tokens_max": float(e.data.longest_row), "engagement": engagement,
        "versions": {"moejax": __version__, **installation.versions()},
    }  # fmt: skip


def program(experiment: Experiment, config: Architecture, gpu: str, tokens: int, known: Iterable[Receipt]) -> dict[str, Any] | None:
    """The roofline of a step of this many tokens on a card of the table, with what runs before said of it; None for another device."""
    if gpu not in gpus.GPUS or experiment.mesh is not None:
        return None
    rows = experiment.data.batch_rows
    length = max(1, tokens // (rows * experiment.training.gradient_accumulation))
    seconds = own.program_seconds(experiment, config, gpus.GPUS[gpu], rows, length)
    found = own.estimate(seconds, gpus.GPUS[gpu], known)
    return {"seconds": seconds, "tokens": tokens, "predicted": found.seconds, "interval": list(found.interval), "basis": found.basis}


def write(folder: Path, document: comparison.Document) -> Path | None:
    """The receipt of a run that was compared; None where its prediction.json is of a version that kept no recipe."""
    told = comparison.read_prediction(folder)
    kept = told.get("recipe")
    if kept is None:
        return None
    steps = comparison.read_steps(folder, told["disturbed_steps"])
    real = float(np.mean([record.get("real_tokens", record["padded_tokens"]) for record in steps]))
    computed = float(np.mean([record["padded_tokens"] for record in steps]))
    memory, seconds = document["memory"], document["step_seconds"]
    on_card = memory["error"] is not None
    predicted = {"step_seconds": seconds["predicted"], "peak_gb_allocator": memory["predicted_bytes"] / 1e9}
    if told.get("program"):
        predicted["program_seconds"] = told["program"]["seconds"] * computed / told["program"]["tokens"]
    receipt = _measured(
        folder.name, told["model"], told["gpu"], kept, real=real, seconds=seconds["measured"],
        peak_bytes=memory["measured_bytes"] if on_card else None, source="this run's metrics.jsonl",
        note=f"{len(steps)} steps on {told['gpu']}", predicted=predicted,
    )  # fmt: skip
    path = folder / RECEIPT
    replace_text(path, json.dumps(receipt, indent=1) + "\n")
    return path


def of_step(
    experiment: Experiment, config: Architecture, engagement: dict[str, Any], device: str, *, seconds: float, real_tokens: int, steps: int,
    peak_bytes: int | None, compiler_peak_bytes: int,
) -> dict[str, Any]:  # fmt: skip
    """Of steps that were timed without a run. device: as jax names it; seconds: of a step; peak_bytes: the allocator's, None where another
    peak hides it."""
    kept, gpu = recipe(experiment, config, engagement), gpus.gpu_name(device)
    model = fitting.model_name(experiment.model.source or str(experiment.model.preset))
    told = program(experiment, config, gpu, kept["micro_batch"] * kept["accumulation"] * experiment.data.longest_row, ())
    predicted = {"peak_gb_allocator": compiler_peak_bytes / 1e9} | ({"program_seconds": told["seconds"]} if told else {})
    name = f"{model}-{kept['accumulation']}x{kept['micro_batch']}x{experiment.data.longest_row}-{gpu}"
    return _measured(
        name, model, gpu, kept, real=real_tokens, seconds=seconds, peak_bytes=peak_bytes, source="benchmarks/step.py",
        note=f"{steps} steps on {device}, random weights and tokens", predicted=predicted,
    )  # fmt: skip


def _measured(
    name: str, model: str, gpu: str, kept: dict[str, Any], *, real: float, seconds: float, peak_bytes: float | None, source: str, note: str,
    predicted: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """kept: `recipe`; real: tokens of a step without padding."""
    version = kept["versions"]["moejax"]
    return {
        "id": name, "model": model, "tool": f"moejax {version}", "tool_name": "moejax", "tool_version": version,
        "gpu": gpu if gpu in gpus.GPUS else None, **kept, "row_tokens_mean": real / (kept["micro_batch"] * kept["accumulation"]),
        "step_seconds": seconds, "tokens_per_second": real / seconds, "peak_gb_allocator": None if peak_bytes is None else peak_bytes / 1e9,
        "source": source, "note": note, "day": datetime.date.today().isoformat(), "predicted": predicted,
    }  # fmt: skip


def before(experiment: Experiment) -> list[Receipt]:
    """Of earlier runs in the same folder; one that another version wrote is no reason to stop."""
    found: list[Receipt] = []
    for file in Path(experiment.runs_dir).glob(f"*/{RECEIPT}"):
        with suppress(UserError):
            found += receipts.read(file)
    return found


def margin_here(experiment: Experiment, gpu: str) -> margin.Margin:
    """What of the memory of a card to leave free, by the runs before."""
    return margin.of_card(gpu, installation.versions().get("jax"), before(experiment))


@dataclass(frozen=True)
class Drift:
    """Of all runs of one version on one device: how many, and predicted over measured less 1, in the median; None: nothing compared."""

    device: str
    version: str
    runs: int
    seconds: float | None
    memory: float | None


def drift(documents: Sequence[comparison.Document]) -> list[Drift]:
    """By device and version of this program and of jax, in the order of the versions."""
    groups: dict[tuple[str, str], list[comparison.Document]] = {}
    for document in documents:
        groups.setdefault((document["gpu"], document["version"]), []).append(document)

    def median(group: list[comparison.Document], what: str) -> float | None:
        errors = [math.log1p(d[what]["error"]) for d in group if d[what]["error"] is not None]
        return math.expm1(float(np.median(errors))) if errors else None

    return [Drift(*key, len(g), median(g, "step_seconds"), median(g, "memory")) for key, g in sorted(groups.items())]

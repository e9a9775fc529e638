"""Peaks of a training step by the compiler, kept on disk; or by the closed form, with the reason.

jax is imported only where something is to be compiled.
"""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from moejax import installation
from moejax.config import Experiment
from moejax.estimator import closed_form, links, memory, spread
from moejax.estimator.closed_form import Breakdown
from moejax.estimator.memory import Largest
from moejax.estimator.targets import MULTIPROCESSORS, target_text
from moejax.gpus import GPU
from moejax.models.config import Architecture
from moejax.models.ops import choice

GIVEN = "--closed-form was given"


def _sources() -> str:
    """Hash of everything that the step is made of: what `program.py` imports, and the tables that choose what is compiled."""
    return memory.digest([*_imported(installation.PACKAGE), *(installation.PACKAGE / "models").rglob("*.json")])


@cache
def _imported(package: Path) -> frozenset[Path]:
    """The modules that a compiled step comes from: `training/program.py`, what it imports, what that imports …"""
    found: set[Path] = set()
    waiting = {"moejax.training.program"}
    while waiting:
        place = package.joinpath(*waiting.pop().split(".")[1:])
        path = place / "__init__.py" if place.is_dir() else place.with_suffix(".py")
        if path in found or not path.is_file():  # no module, but what one of them holds
            continue
        found.add(path)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and node.module is not None and node.module.split(".")[0] == "moejax":
                waiting |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return frozenset(found)


def why_not_compiled(gpu: GPU) -> str | None:
    """Why no compiler can answer for this GPU here; None where one can."""
    if gpu.usable_bytes is not None:
        return None
    if gpu.platform == "tpu":
        missing = f"the extra `aot-tpu` is missing ({installation.for_extra('aot-tpu')})"
        return missing if importlib.util.find_spec("libtpu") is None else None
    if all(importlib.util.find_spec(f"jax_cuda{n}_plugin") is None for n in (12, 13)):
        return f"the extra `aot` is missing ({installation.for_extra('aot')})"
    if target_text(gpu) is not None:
        return None
    if gpu.compiler is not None:
        return f"{gpu.name}: compute capability {gpu.compiler.compute_capability} is none of {', '.join(MULTIPROCESSORS)}"
    return f"{gpu.name}: --gpu-file says no compute_capability, multiprocessors, l2_mb, clock_ghz"


@dataclass
class Oracle:
    """Peaks of one experiment's step on one GPU: compiled and kept, or, with a `reason`, by the closed form. On several, as the
    experiment's mesh says, of each of them; rows are those of all together."""

    experiment: Experiment
    config: Architecture
    gpu: GPU
    row_tokens: int
    reason: str | None
    hits: int = 0
    misses: int = 0
    known: dict[int, int] = field(default_factory=dict)

    @property
    def devices(self) -> int:
        return spread.count(self.experiment)

    @property
    def named(self) -> str:
        """The card, or several; of a TPU its slice and mode."""
        name, mesh = links.several(self.gpu.name, self.devices), self.experiment.mesh
        return name if self.gpu.platform != "tpu" or mesh is None else f"{name}, {mesh.weights}"

    def breakdown(self, rows: int, gpu: GPU | None = None, *, float32: bool = False) -> Breakdown:
        """The closed form on this GPU, or on another; in fp32 throughout, where that is asked."""
        experiment = self.experiment
        if float32:
            experiment = experiment.changed("training", compute_dtype="float32", param_dtype="float32")
        return closed_form.on(gpu or self.gpu, experiment, self.config, rows, self.row_tokens)

    def peak_bytes(self, rows: int) -> int:
        if self.reason is not None:
            return self.breakdown(rows).total
        if rows not in self.known:
            self.known[rows] = self._compiled(rows)
        return self.known[rows]

    def _compiled(self, rows: int) -> int:
        import jax

        from moejax.training.program import TrainProgram

        gpu = None if self.gpu.usable_bytes is not None else self.gpu
        target = str(jax.local_devices()[0].device_kind) if gpu is None else target_text(gpu) or links.several(gpu.name, self.devices)
        key = {
            "experiment": memory.relevant(self.experiment), "architecture": [type(self.config).__name__, dataclasses.asdict(self.config)],
            "versions": installation.versions(), "sources": _sources(), "target": target, "rows": rows, "row_tokens": self.row_tokens,
            "tuned": {} if gpu is not None else choice.adopted(choice.here()),
        }  # fmt: skip
        asked = self.experiment.changed("data", batch_rows=rows)
        peak, there = memory.cached(key, lambda: TrainProgram(asked, self.config, gpu=gpu).peak_of(rows, self.row_tokens))
        self.hits, self.misses = self.hits + there, self.misses + (not there)
        return peak

    def largest(self, limit: float, ratio: float = 1.0) -> Largest:
        """The largest number of rows, as many on each device, within `limit` bytes; the closed form times `ratio` says where to begin.
        Where the closed form itself answers, its error is allowed for."""
        n = self.devices

        def closed(rows: int) -> int:
            return self.breakdown(n * rows).total

        def peak(rows: int) -> int:
            return self.peak_bytes(n * rows)

        if self.reason is not None:
            return memory.largest_rows(peak, memory.by_closed_form(limit, memory.error_on(self.gpu))[0]).times(n)
        guess = max(1, memory.largest_rows(lambda rows: int(ratio * closed(rows)), limit).rows)
        return memory.largest_rows(peak, limit, guess, closed(guess + 1) - closed(guess)).times(n)


def oracle(experiment: Experiment, architecture: Architecture, gpu: GPU, row_tokens: int, closed: bool) -> Oracle:
    """Who answers for one experiment on one GPU: the compiler, or the closed form with the reason."""
    reason = GIVEN if closed else why_not_compiled(gpu)
    return Oracle(experiment, architecture, gpu, row_tokens, reason)

"""The parent: plan, trials in turn, results after each. It holds no device, and a trial that dies takes nothing with it."""

from __future__ import annotations

import datetime
import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

from moejax.errors import UserError
from moejax.runs.folders import differences
from moejax.study.characterize import children, plan, result
from moejax.study.characterize.children import Runner
from moejax.study.characterize.plan import Task
from moejax.study.characterize.presets import queries_of
from moejax.study.characterize.result import Result
from moejax.study.characterize.study import Study
from moejax.study.characterize.trial import told
from moejax.study.report import results
from moejax.study.report.results import Environment, MemoryLimit, Planned, Row, Trial


def environment(study: Study) -> tuple[Environment, MemoryLimit]:
    """Of this machine's device, asked in a process of its own. Raises UserError where there is no limit to the memory of a step."""
    from moejax.runtime import prepare_jax

    first = study.settings[0].experiment
    prepare_jax(first.device)
    command = [sys.executable, "-m", "moejax.study.characterize.environment", first.training.compute_dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=children.environment())
    if done.returncode:
        raise UserError(f"jax finds no device to run on: {(done.stderr.strip().splitlines() or ['no word'])[-1]}; moejax doctor says more")
    content = json.loads(done.stdout.splitlines()[-1])
    found = Environment(**content["environment"])
    usable, asked = content["usable_bytes"], study.memory_limit
    if asked is None and usable is None:
        raise UserError(
            f"{found.device} has no memory limit of its own, so nothing would ever be too large: set one, e.g. --memory-limit 4GB "
            "(a step is then refused by the compiler's figure), or --preset cpu-demo"
        )
    if asked is not None and usable is not None and asked > usable:
        raise UserError(f"--memory-limit {asked:,} bytes: the device has {usable:,} for this process; leave it out, or give less")
    return found, MemoryLimit(asked or usable, asked is not None)


@dataclass
class Sweep:
    """A study in its folder: what is to run, what has run."""

    study: Study
    content: results.Study
    runner: Runner
    tasks: list[Task]
    done: dict[str, Result] = field(default_factory=dict)

    @classmethod
    def open(cls, study: Study, folder: Path, preset: str | None, command: str, env: Environment, limit: MemoryLimit, *,
             start: tuple[str, ...] | None = None) -> Sweep:  # fmt: skip
        """A new study, or the one that is there. Raises UserError for a folder of another one, or one that is in use."""
        config = study.config()
        _check(folder, config, env)
        lock = _lock(folder)
        try:
            _check(folder, config, env)  # another may have begun there before the lock was had
            tasks, created = plan.tasks(study), datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            planned = [
                Planned(t.name, plan.EXPERIMENT[t.kind], round(plan.expected(t, study, env, limit.bytes or 0), 1), told(folder, t.name))
                for t in tasks
            ]
            if (folder / results.STUDY_FILE).exists():
                before = results.read_plan(folder)
                created, env = before.created, before.environment  # one measurement of the peaks for all trials
            content = results.Study(
                1, preset, command, created, config, results.digest(config), study.models(), env, limit, planned, {}, False
            )
            read = {task.name: result.read(result.path_of(folder, task.name)) for task in tasks}
            done = {name: kept for name, kept in read.items() if kept is not None}
            sweep = cls(study, content, Runner(folder, lock, **({"start": start} if start else {})), tasks, done)
            sweep.write()
            return sweep
        except BaseException:
            os.close(lock)
            raise

    def write(self) -> None:
        """The three files, from what is there of every trial."""
        rows: list[Row] = []
        trials: dict[str, Trial] = {}
        prices: dict[str, str] = {}
        for task in self.tasks:
            r = self.done.get(task.name)
            if r is None:
                trials[task.name] = Trial("pending", None, None, told(self.runner.folder, task.name))
                continue
            trials[task.name] = Trial(r.status, r.seconds, r.message, r.command or told(self.runner.folder, task.name))
            rows += r.rows
            prices |= r.facts.get("prices", {})
        finished = all(t.status != "pending" for t in trials.values())
        self.content = replace(self.content, trials=trials, rows=rows, finished=finished, prices=prices)
        results.write(self.content, self.runner.folder)

    def close(self) -> None:
        """Let go of the folder: another study of this process may take it."""
        if self.runner.lock is not None:
            os.close(self.runner.lock)

    @property
    def waiting(self) -> list[Task]:
        """Trials that are to run: never run, or failed; and with them what is computed from all."""
        names = {t.name for t in self.tasks if t.name not in self.done or not self.done[t.name].final}
        return [t for t in self.tasks if t.name in names or (names and t.kind in ("fit", "cost"))]

    def left_seconds(self, waiting: list[Task]) -> float:
        """What these will take, by the plan and by how it held so far."""
        expected = {p.trial: p.expected_seconds for p in self.content.plan}
        pace = [r.seconds / expected[name] for name, r in self.done.items() if r.status == "done" and r.seconds and r.seconds > 1]
        return (median(pace) if pace else 1.0) * sum(expected[t.name] for t in waiting)

    def run(self, tell: Callable[[Task, Result | None, float], None]) -> None:
        """Every waiting trial in turn. tell(task, None, seconds left) before one, tell(task, result, seconds left) after it."""
        waiting = self.waiting
        for task in waiting:
            if task.kind in ("fit", "cost"):
                result.path_of(self.runner.folder, task.name).unlink(missing_ok=True)
        for index, task in enumerate(waiting):
            tell(task, None, self.left_seconds(waiting[index:]))
            self.done[task.name] = self._run(task)
            self.write()
            tell(task, self.done[task.name], self.left_seconds(waiting[index + 1 :]))

    def _run(self, task: Task) -> Result:
        if task.kind == "prove":
            return self._kept(task, self._prove(task))
        if not task.needs_largest:
            return self.runner.run(task.name)
        proof = f"largest_batch/{task.setting.key}/prove"
        before = self.done[proof]
        if before.status != "done":
            return self._kept(task, before.waits(proof))
        largest = before.facts["rows"]
        rows = plan.rows_of(task, largest, self.study)
        queries = queries_of(task.batch or "largest", largest)
        if task.kind == "throughput" and queries > largest:
            return self._kept(task, Result("out_of_memory", f"not run: {queries} queries, and {largest} are the most that fit"))
        same = self._same(task, rows)
        if same:
            return self._kept(task, Result("done", f"not run: {same} had {rows} {'row' if rows == 1 else 'rows'} too"))
        return self.runner.run(task.name, rows)

    def _same(self, task: Task, rows: int) -> str | None:
        """An earlier trial of the same batching with as many rows: where few fit, a half and a quarter may be one."""
        for other in self.tasks[: self.tasks.index(task)]:
            if task.kind == "throughput" == other.kind and (other.setting, other.batching) == (task.setting, task.batching):
                done = self.done.get(other.name)
                if done and done.status == "done" and done.rows and done.command.endswith(f"--rows {rows}"):
                    return other.name
        return None

    def _kept(self, task: Task, made: Result) -> Result:
        made.command = made.command or told(self.runner.folder, task.name)
        result.keep(result.path_of(self.runner.folder, task.name), made)
        return made

    def _prove(self, task: Task) -> Result:
        """Run the predicted batch, and one above it until one fails: each a process of its own."""
        name = f"largest_batch/{task.setting.key}/predict"
        before = self.done[name]
        if before.status != "done":
            return before.waits(name)
        attempts: dict[int, Result] = {}

        def runs(rows: int) -> bool:
            attempts[rows] = self.runner.run(task.name, rows, attempt=True)
            if attempts[rows].status == "failed":
                raise _Failed(rows)
            return attempts[rows].status == "done"

        try:
            low, high = children.search(before.facts["rows"], runs)
        except _Failed as failed:
            return Result("failed", f"{failed.args[0]} rows: {attempts[failed.args[0]].message}", _sum(attempts))
        message = f"{low} ran; {high}: {attempts[high].message}"
        if not low:
            return Result("out_of_memory", f"not one query ran: {message}", _sum(attempts))
        s, facts = task.setting, attempts[low].facts
        values = [("proved_batch", low, "queries"), ("failed_batch", high, "queries"), ("peak_bytes", facts["peak_bytes"], "bytes")]
        rows = [
            Row(task.name, "largest_batch", s.model, s.method, s.routing, s.data, "fixed", s.longest, low, "", *value) for value in values
        ]
        return Result("done", message, _sum(attempts), told(self.runner.folder, task.name, low), rows, facts | {"rows": low})


class _Failed(Exception):
    """An attempt that neither ran nor ran out of memory."""


def _sum(attempts: dict[int, Result]) -> float:
    return sum(a.seconds or 0.0 for a in attempts.values())


def _check(folder: Path, config: dict[str, Any], env: Environment) -> None:
    """Raises UserError for a folder that is not this study's."""
    if not folder.exists() or all(p.name == ".lock" or p.name.startswith(f"{results.STUDY_FILE}.") for p in folder.iterdir()):
        return  # at most what a study left that was killed as it began
    if not (folder / results.STUDY_FILE).exists():
        raise UserError(f"--out {folder} holds other files and no {results.STUDY_FILE}: choose an empty folder (nothing was overwritten)")
    before = results.read_plan(folder)
    changed = differences(before.config, config)
    if changed:
        raise UserError(
            f"--out {folder} holds a study of another configuration. Changed: {'; '.join(changed[:5])}"
            f"{'' if len(changed) <= 5 else f' and {len(changed) - 5} more'}. Undo the change, or choose another folder"
        )
    fields = ("device", "memory_bytes", "versions", "cpu", "git_commit")
    there, here = ({f: getattr(e, f) for f in fields} for e in (before.environment, env))
    moved = differences(there, here)
    if moved:
        raise UserError(
            f"--out {folder} was begun in another environment. Changed: {'; '.join(moved[:5])}. One study is one environment: go back to "
            "it, or choose another folder (`moejax report` compares two)"
        )


def _lock(folder: Path) -> int:
    """Held while this process or a trial of it lives: what a study that was killed left behind cannot write into a resumed one. Its trial
    is killed with it, so a moment is waited."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    for _ in range(50):
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.ftruncate(lock, 0)
            os.pwrite(lock, str(os.getpid()).encode(), 0)
            return lock
        except BlockingIOError:
            time.sleep(0.1)
    holder = os.pread(lock, 20, 0).decode(errors="replace") or "unknown"
    os.close(lock)
    raise UserError(
        f"--out {folder}: another `moejax characterize` (process {holder}), or a trial that it left behind, is at work in it: wait for its "
        "end, or choose another folder"
    )

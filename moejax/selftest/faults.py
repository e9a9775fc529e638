"""Runs that are stopped at random moments, and resumed: nothing may be lost but the steps since the last checkpoint.

A tiny Mixtral trains by QLoRA on sentences made up here, in processes of their own, as `moejax train` does. One run ends undisturbed; each
round's run gets a signal at a moment drawn by the seed, from its first step to its export, and is resumed until it ends.
"""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from moejax import json_lines
from moejax.errors import UserError

STEPS, SAVED_EVERY = 24, 4
KINDS: dict[str, tuple[signal.Signals, ...]] = {
    "SIGKILL": (signal.SIGKILL,), "SIGTERM": (signal.SIGTERM,), "SIGINT": (signal.SIGINT,), "SIGINT twice": (signal.SIGINT, signal.SIGINT),
}  # fmt: skip
_WAIT = 600.0  # seconds for one process


@dataclass
class Report:
    """Of all rounds. lost: steps that were trained again, of each round; none after SIGTERM or one SIGINT."""

    rounds: int = 0
    by_kind: Counter[str] = field(default_factory=Counter)
    lost: list[int] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)  # a line each

    def lines(self) -> list[str]:
        kinds = ", ".join(f"{kind} {count}" for kind, count in sorted(self.by_kind.items()))
        return [
            f"{self.rounds} rounds ({kinds})",
            f"steps trained again: {max(self.lost, default=0)} at most, {sum(self.lost)} in all (a checkpoint every {SAVED_EVERY} steps)",
            *(f"fault: {fault}" for fault in self.faults),
            f"faults: {len(self.faults)} (another result, a state that was damaged, a repeated point, a file or process left behind)",
        ]


def rounds(folder: Path, count: int, seed: int, report: Report) -> Iterator[str]:
    """Run `count` rounds in an empty `folder`, and enter them in `report`; a line after each. Raises UserError where the undisturbed run
    fails."""
    config = _write(folder)
    began = time.monotonic()
    whole = _Process(config, folder / "whole")
    if whole.wait() != 0:
        raise UserError(f"the run that nothing disturbs failed: {whole.tail()}")
    seconds = time.monotonic() - began
    wanted = _result(folder / "whole")
    yield f"an undisturbed run of {STEPS} steps takes {seconds:.0f} s"
    rng = random.Random(seed)
    for number in range(1, count + 1):
        kind = list(KINDS)[(number - 1) % len(KINDS)]
        run = folder / f"round-{number}"
        said = _round(config, run, kind, rng, report, wanted)
        report.rounds += 1
        report.by_kind[kind] += 1
        yield f"round {number}: {said}"


def _round(config: Path, run: Path, kind: str, rng: random.Random, report: Report, wanted: dict[str, Any]) -> str:
    step, delay = rng.randint(0, STEPS), rng.random()
    process = _Process(config, run)
    with process.ended_on_errors():
        process.until_step(run, step)
        time.sleep(delay if step == STEPS else delay / 4)
        for number in KINDS[kind]:
            process.send(number)
            time.sleep(0.05)
        code = process.wait()
    process.check_orphans(report, run.name)
    done, saved = _done(run), _saved(run)
    again = max(0, done - saved) if code != 0 else 0
    # A checkpoint that is being written is not one yet, and the next waits for it: at most two intervals are lost.
    limit = 0 if kind in ("SIGTERM", "SIGINT") and code == 128 + KINDS[kind][0] else 2 * SAVED_EVERY
    if again > limit:
        report.faults.append(f"{run.name}: {kind} after step {done}, and the newest checkpoint is {saved}")
    report.lost.append(again)
    resumed = 0
    while code != 0 and resumed < 3:
        process = _Process(config, run, resume=(run / "config.yaml").exists())
        code, resumed = process.wait(), resumed + 1
        if code != 0:
            report.faults.append(f"{run.name}: {kind} after step {done}, and --resume failed: {process.tail()}")
            return f"{kind} after step {done}: failed"
    found = _result(run)
    report.faults += [f"{run.name}: {kind} after step {done}: {what} differs" for what in wanted if found.get(what) != wanted[what]]
    report.faults += [f"{run.name}: left behind: {path.relative_to(run)}" for path in run.rglob("*.tmp*")]
    return f"{kind} after step {done} (checkpoint {saved}), resumed {resumed} times: the same result"


class _Process:
    """`moejax train` of the config into a run's folder; its output goes to a file next to it."""

    def __init__(self, config: Path, run: Path, resume: bool = False):
        command = [sys.executable, "-m", "moejax", "train", str(run / "config.yaml" if resume else config)]
        command += ["--resume"] if resume else [f"name={run.name}", f"runs_dir={run.parent}"]
        self._log = run.with_name(f"{run.name}.log")
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True, cwd=run.parent, env=_environment(run))

    def until_step(self, run: Path, step: int) -> None:
        """Until its metrics hold the step, or it ended."""
        end = time.monotonic() + _WAIT
        while self._process.poll() is None and time.monotonic() < end:
            if _done(run) >= step and (step or (run / "config.yaml").exists()):
                return
            time.sleep(0.02)

    def send(self, number: signal.Signals) -> None:
        if self._process.poll() is None:
            with suppress(ProcessLookupError):
                self._process.send_signal(number)

    def wait(self) -> int:
        """Its exit code as a shell has it. Kills it after ten minutes."""
        with suppress(subprocess.TimeoutExpired), self.ended_on_errors():
            self._process.wait(_WAIT)
        code = self._process.returncode
        return code if code >= 0 else 128 - code

    @contextmanager
    def ended_on_errors(self) -> Iterator[None]:
        """Ctrl-C of this command among them: its run is in another session, and hears nothing of it."""
        try:
            yield
        except BaseException:
            self.end()
            raise

    def check_orphans(self, report: Report, name: str) -> None:
        """It was the first of its session: anyone who is left of it is an orphan."""
        for _ in range(40):
            try:
                os.killpg(self._process.pid, 0)
            except (ProcessLookupError, PermissionError):
                return
            time.sleep(0.05)
        report.faults.append(f"{name}: a process is left behind")
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def end(self) -> None:
        """Kill what still runs of it."""
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def tail(self) -> str:
        lines = self._log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return lines[-1] if lines else "no output"


def _environment(run: Path) -> dict[str, str]:
    """The first process compiles, the others read what it compiled."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(run.parent / "programs"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
             "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1"}  # fmt: skip
    return cache | dict(os.environ)


def _metrics(run: Path) -> list[dict[str, Any]]:
    path = run / "metrics.jsonl"
    return json_lines.read(path)[0] if path.is_file() else []


def _done(run: Path) -> int:
    """The last step whose metrics are written."""
    return max((record["step"] for record in _metrics(run) if "loss" in record), default=0)


def _saved(run: Path) -> int:
    """The newest step that lies under its own name: orbax writes aside and renames."""
    return max((int(path.name) for path in (run / "checkpoints").glob("*") if path.name.isdecimal()), default=0)


def _result(run: Path) -> dict[str, Any]:
    """What must be the same of every run: the trained weights to the byte, each step's loss, one point a step."""
    records = _metrics(run)
    adapter = run / "adapter" / "adapter_model.safetensors"
    return {
        "the adapter": adapter.read_bytes() if adapter.is_file() else None,
        "a loss, or the number of its records,": [(r["step"], r["loss"]) for r in records if "loss" in r],
        "an evaluation, or their number,": [(r["step"], r["eval_loss"]) for r in records if "eval_loss" in r],
        "the number of TensorBoard's points": _points(run),
    }


def _points(run: Path) -> list[tuple[int, str]]:
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    found = [
        (event.step, value.tag)
        for path in run.glob("events.out.tfevents.*") for event in EventFileLoader(str(path)).Load() for value in event.summary.value
    ]  # fmt: skip
    return sorted(found)


_WORDS = ("the", "a", "red", "blue", "old", "new", "cat", "dog", "sees", "finds", "likes", "small", "big", "house", "tree")


def _write(folder: Path) -> Path:
    """Records, a tokenizer and the config, made up."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    rng = random.Random(0)
    with (folder / "data.jsonl").open("w") as file:
        for _ in range(160):
            question, answer = (" ".join(rng.choices(_WORDS, k=6)) for _ in range(2))
            file.write(json.dumps({"instruction": question, "output": answer}) + "\n")
    vocabulary = ["<unk>", "<s>", "</s>", *_WORDS, "[INST]", "[/INST]"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    path = folder / "config.yaml"
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_layers": 2, "num_experts": 4, "vocab_size": 64}
    path.write_text(yaml.safe_dump({
        "name": "selftest", "model": {"preset": "mixtral-tiny", "overrides": sizes}, "quantization": {"format": "nf4"},
        "adapter": {"rank": 4, "alpha": 8.0, "dropout": 0.1}, "tokenizer": str(folder / "tokenizer.json"),
        "data": {"source": str(folder / "data.jsonl"), "holdout": 16, "batch_rows": 2, "row_tokens": 64, "max_length": 64},
        "training": {"steps": STEPS, "learning_rate": 1e-2, "compute_dtype": "float32", "eval_every": 8},
        "checkpoint": {"every": SAVED_EVERY},
    }))  # fmt: skip
    return path

"""Runs that are stopped and resumed in processes of their own (`moejax selftest`); 50 rounds: `make soak`."""

import json
import os
import random
from contextlib import nullcontext

import pytest

from moejax.commands import selftest
from moejax.selftest import faults


@pytest.mark.long  # three processes that import everything; what is judged, and how one is ended, is below
def test_a_killed_run_ends_with_the_result_of_one_that_nothing_disturbed(tmp_path):
    report = faults.Report()
    assert len(list(faults.rounds(tmp_path, 1, 0, report))) == 2
    assert (report.rounds, report.faults, dict(report.by_kind)) == (1, [], {"SIGKILL": 1})


class Fake:
    """A process that leaves a run of a few steps, as `change` makes it."""

    def __init__(self, change):
        self.change = change

    def __call__(self, config, run, resume=False):
        (run / "adapter").mkdir(parents=True, exist_ok=True)
        (run / "config.yaml").touch()
        records = [{"step": s, "loss": 1.0 / s} for s in range(1, faults.STEPS + 1)]
        (run / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
        (run / "adapter" / "adapter_model.safetensors").write_bytes(b"weights")
        (run / "checkpoints" / str(faults.STEPS)).mkdir(parents=True, exist_ok=True)
        if run.name != "whole":
            self.change(run)
        self.code = 0
        return self

    def wait(self):
        return 0

    def until_step(self, run, step):
        pass

    send = check_orphans = lambda self, *_: None

    def ended_on_errors(self):
        return nullcontext()


def add(path, text):
    path.write_text(path.read_text() + text)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        (lambda run: None, None),
        (lambda run: (run / "adapter" / "adapter_model.safetensors").write_bytes(b"Weights"), "the adapter differs"),
        (lambda run: add(run / "metrics.jsonl", '{"step": 3, "loss": 0.25}\n'), "a loss, or the number of its records, differs"),
        (lambda run: (run / "adapter.host-1-2.tmp").mkdir(), "left behind: adapter.host-1-2.tmp"),
    ],
)
def test_what_went_wrong_is_a_fault(tmp_path, monkeypatch, change, fault):
    monkeypatch.setattr(faults, "_Process", Fake(change))
    monkeypatch.setattr(faults.time, "sleep", lambda _: None)
    report = faults.Report()
    list(faults.rounds(tmp_path, 1, 0, report))
    assert len(report.faults) == (fault is not None) and all(f.endswith(f": {fault}") for f in report.faults)


def test_ctrl_c_leaves_no_process(tmp_path, monkeypatch):
    (tmp_path / "python").write_text("#!/bin/sh\nsleep 60\n")
    (tmp_path / "python").chmod(0o755)
    numbers = []

    def interrupted(self, run, step):
        numbers.append(self._process.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(faults.sys, "executable", str(tmp_path / "python"))
    monkeypatch.setattr(faults._Process, "until_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        faults._round(tmp_path / "config.yaml", tmp_path / "run", "SIGKILL", random.Random(0), faults.Report(), {})
    with pytest.raises(ProcessLookupError):
        os.kill(numbers[0], 0)


def test_a_folder_that_holds_something_is_refused(tmp_path):
    (tmp_path / "mine").touch()
    with pytest.raises(selftest.UserError, match=r"--keep .*: expected an empty folder"):
        selftest.run(selftest.argparse.Namespace(rounds=1, seed=0, keep=tmp_path))

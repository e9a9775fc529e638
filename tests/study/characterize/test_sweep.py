"""The parent, with children that pretend: order, resuming, deaths, other folders."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_study import ENVIRONMENT

from moejax import cli
from moejax.errors import UserError
from moejax.study.characterize import children, plan, presets
from moejax.study.characterize.sweep import Sweep
from moejax.study.report import results

PREDICT = "largest_batch/mixtral-tiny/problems/sparse/predict"
PROVE = "largest_batch/mixtral-tiny/problems/sparse/prove"
PADDED = "throughput/mixtral-tiny/problems/sparse/padded/"
PACKED = "throughput/mixtral-tiny/problems/sparse/packed/largest"


def run(sweep):
    """Run what waits; returns the trials that were reported as ended, with their status."""
    ended = []
    sweep.run(lambda task, result, left: ended.append((task.name, result.status)) if result else None)
    return ended


def close(sweep: Sweep):
    os.close(sweep.runner.lock)


def test_whole_study(open_sweep, ran, tmp_path):
    sweep = open_sweep({PROVE: 6})
    before = results.read(tmp_path / "out")
    assert not before.finished and {t.status for t in before.trials.values()} == {"pending"}
    ended = run(sweep)
    assert [name for name, _ in ended] == [t.name for t in sweep.tasks] and {status for _, status in ended} == {"done"}
    # The prediction says 5; 6 runs too, 7 does not: two neighbours in the end.
    assert [name for name in ran() if PROVE in name] == [f"{PROVE}@{n}" for n in (5, 6, 8, 7)]
    study = results.read(tmp_path / "out")
    assert study.finished and len(study.plan) == len(study.trials) == len(sweep.tasks)
    proved = {r.metric: r.value for r in study.of("largest_batch")}
    assert proved == {"proved_batch": 6, "failed_batch": 7, "peak_bytes": 1000}
    largest = next(r for r in study.rows if r.trial == PADDED + "largest")
    assert largest.batch == 6 and largest.value == 0.1 + 0.2
    assert study.trials[PADDED + "largest"].command.endswith("--rows 6")
    close(sweep)


def test_nothing_finished_runs_again(open_sweep, ran):
    first = open_sweep()
    run(first)
    close(first)
    before = ran()
    again = open_sweep()
    assert again.waiting == [] and run(again) == [] and ran() == before
    close(again)


@pytest.mark.parametrize(
    ("what", "status", "told"),
    [
        ("crash", "failed", "exit code 1: RuntimeError: no luck today"),
        ("abort", "failed", "killed by SIGABRT"),
        ("die", "failed", "out of memory on the host: killed by SIGKILL"),
        ("bad_alloc", "failed", "out of memory on the host: terminate called after throwing"),
    ],
)
def test_a_trial_that_dies_says_so_and_the_others_go_on(open_sweep, ran, tmp_path, what, status, told):
    sweep = open_sweep({PADDED + "1": what})
    ended = dict(run(sweep))
    assert ended.pop(PADDED + "1") == status and set(ended.values()) == {"done"}
    close(sweep)
    study = results.read(tmp_path / "out")
    assert study.finished and told in study.trials[PADDED + "1"].message
    assert PADDED + "1" not in {r.trial for r in study.rows}
    # The same command tries the failed one again, and computes again what depends on all.
    before = ran()
    sweep = open_sweep()
    ended = run(sweep)
    assert ended == [(PADDED + "1", "done"), ("fit/mixtral-tiny", "done"), ("cost/mixtral-tiny", "done")]
    assert ran()[len(before) :] == [name for name, _ in ended]
    close(sweep)


def test_what_waits_for_a_trial_that_the_host_had_no_memory_for_is_tried_again_with_it(open_sweep, ran):
    sweep = open_sweep({PREDICT: "die"})
    ended = dict(run(sweep))
    assert ended[PROVE] == ended[PACKED] == "failed" and "out of memory on the host" in sweep.done[PACKED].message
    close(sweep)
    sweep = open_sweep()
    assert set(dict(run(sweep)).values()) == {"done"} and PACKED in ran()
    close(sweep)


def test_dependent_trials_are_not_run_where_nothing_fits(open_sweep, ran, tmp_path):
    sweep = open_sweep({PREDICT: "oom"})
    ended = dict(run(sweep))
    assert {name: s for name, s in ended.items() if s != "out_of_memory"} == {"fit/mixtral-tiny": "done", "cost/mixtral-tiny": "done"}
    assert [n for n in ran() if not n.startswith(("fit", "cost"))] == [PREDICT]
    assert "RESOURCE_EXHAUSTED" in results.read(tmp_path / "out").trials[PACKED].message
    close(sweep)


def test_dependent_trials_fail_with_what_they_wait_for(open_sweep, ran):
    sweep = open_sweep({PROVE: "crash"})
    ended = dict(run(sweep))
    assert ended[PROVE] == ended[PACKED] == ended[PADDED + "1"] == "failed"
    assert PACKED not in ran()
    assert f"not run: {PROVE}" in sweep.done[PACKED].message and "no luck today" in sweep.done[PACKED].message
    close(sweep)


def test_same_rows_are_not_run_twice(open_sweep, ran):
    sweep = open_sweep({PROVE: 1}, overrides=["sweep.batches=[1, 1/2, largest]"])
    run(sweep)
    assert [n for n in ran() if n.startswith(PADDED)] == [PADDED + "1"]
    assert "had 1 row too" in sweep.done[PADDED + "1of2"].message and sweep.done[PADDED + "largest"].status == "done"
    close(sweep)


def test_what_is_given_twice_is_run_once(open_sweep, ran):
    twice = ["sweep.batches=[1, 1, largest, largest]", "sweep.lengths=[32, 32, 64]", "sweep.routings=[sparse, sparse]"]
    sweep = open_sweep(overrides=twice)
    run(sweep)
    assert len({t.name for t in sweep.tasks}) == len(sweep.tasks) and len(ran()) == len(set(ran()))
    assert [n for n in ran() if n.startswith(PADDED)] == [PADDED + "1", PADDED + "largest"]
    close(sweep)


def test_more_queries_than_fit_are_not_run(open_sweep, ran):
    sweep = open_sweep(overrides=["sweep.batches=[1, 6]", "sweep.packed=[6]"])  # 5 fit
    ended = dict(run(sweep))
    assert ended[PADDED + "1"] == "done" and ended[PADDED + "6"] == ended[PACKED.replace("largest", "6")] == "out_of_memory"
    assert "6 queries, and 5 are the most that fit" in sweep.done[PADDED + "6"].message and PADDED + "6" not in ran()
    close(sweep)


DRIVER = """
import sys; sys.path[:0] = sys.argv[1:3]
from pathlib import Path
from types import SimpleNamespace
import small_study
from moejax.study.characterize import study
from moejax.study.characterize.sweep import Sweep
from moejax.study.report.results import MemoryLimit
folder = Path(sys.argv[3])
wanted = study.resolve(None, [str(folder / "tiny.yaml")], small_study.SIZES, 10**7, False)
start = (sys.executable, str(small_study.FAKE), str(folder))
Sweep.open(wanted, folder / "out", None, "a command", small_study.ENVIRONMENT, MemoryLimit(10**7, True), start=start).run(lambda *_: None)
"""


def gone(process):
    """Whether it ended, waited for by nobody or not."""
    state = Path(f"/proc/{process}/stat")
    return not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z"


@pytest.fixture
def killed_study(open_sweep, tmp_path):
    """killed_study(behaviour): a study that was killed by SIGKILL in the middle of PACKED; returns the process of that trial."""
    started = []

    def kill(behaviour):
        close(open_sweep({PACKED: behaviour}, out=tmp_path / "other"))
        here = Path(__file__).parent
        parent = subprocess.Popen([sys.executable, "-c", DRIVER, str(here), str(here.parents[1]), str(tmp_path)])
        hangs = tmp_path / "hangs.txt"
        while not hangs.exists() or not hangs.read_text():
            assert parent.poll() is None, "the driver ended before its trial was reached"
            time.sleep(0.05)
        started.append(int(hangs.read_text()))
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        return started[0]

    yield kill
    for process in started:
        if not gone(process):
            os.kill(process, signal.SIGKILL)


def test_an_orphan_keeps_a_resumed_study_out(killed_study, open_sweep, tmp_path, monkeypatch):
    """A trial that outlives its study (were it not killed with it) could write into the folder: until it ends, nothing is resumed there."""
    orphan = killed_study("orphan")
    monkeypatch.setattr("moejax.study.characterize.sweep.time.sleep", lambda seconds: None)
    kept = (tmp_path / "out" / results.STUDY_FILE).read_text()
    with pytest.raises(UserError, match=r"or a trial that it left behind, is at work in it"):
        open_sweep()
    assert (tmp_path / "out" / results.STUDY_FILE).read_text() == kept
    os.kill(orphan, signal.SIGKILL)
    while not gone(orphan):
        pass
    close(open_sweep())


def test_a_trial_whose_study_died_before_it_began_does_nothing(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    command = [sys.executable, "-m", children.MODULE, str(tmp_path), "any", "--parent", str(process.pid)]
    done = subprocess.run(command, env=children.environment(), capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stdout, done.stderr) == (1, "", "") and not list(tmp_path.iterdir())


def test_killed_in_the_middle_and_resumed(killed_study, open_sweep, ran, tmp_path):
    """The study is killed while a trial runs: the trial's process is killed with it, what had finished stays, the rest is run."""
    child = killed_study("hang")
    before = ran()
    killed = results.read(tmp_path / "out")
    assert not killed.finished and killed.trials[PACKED].status == "pending" and killed.trials[PADDED + "1"].status == "done"
    sweep = open_sweep()  # waits for the lock that the orphan holds
    assert gone(child)
    assert [name for name, _ in run(sweep)] == [t.name for t in sweep.tasks][-4:]
    assert ran()[len(before) :] == [PACKED, "expert_load/mixtral-tiny/problems/sparse", "fit/mixtral-tiny", "cost/mixtral-tiny"]
    assert results.read(tmp_path / "out").finished
    close(sweep)


class Killed(BaseException):
    """What a kill is to the code: nothing catches it, nothing is put in order."""


@pytest.mark.parametrize(
    ("begun", "renamed"),
    [(False, 0), (False, 2), (True, 1), *(pytest.param(*each, marks=pytest.mark.long) for each in ((False, 1), (True, 0), (True, 2)))],
)
def test_killed_between_the_result_files(open_sweep, ran, tmp_path, monkeypatch, capsys, renamed, begun):
    """Files of two moments: the report refuses them, and the same command goes on and makes them one again."""
    whole, left = results.replace_text, [renamed]

    def replace_text(path, text):
        if not left[0]:
            raise Killed
        left[0] -= 1
        whole(path, text)

    with monkeypatch.context() as patched:
        sweep = None
        if begun:
            sweep = open_sweep()

            def told(task, result, seconds):
                if task.name == PADDED + "largest" and result is None:
                    patched.setattr(results, "replace_text", replace_text)

        else:
            patched.setattr(results, "replace_text", replace_text)
        with pytest.raises(Killed):
            sweep.run(told) if sweep else open_sweep()
    if sweep:
        close(sweep)
    if begun and not renamed:  # the last write had not begun: the files before it are whole
        assert PADDED + "largest" not in {r.trial for r in results.read(tmp_path / "out").rows}
    else:
        assert cli.main(["report", str(tmp_path / "out")]) == 2
        error = capsys.readouterr().err
        assert "run the same `moejax characterize` again" in error or "does not exist: expected" in error
    before = ran()
    sweep = open_sweep()
    run(sweep)
    study = results.read(tmp_path / "out")
    assert study.finished and len(set(ran())) == len(ran()) and ran()[: len(before)] == before
    assert {r.trial for r in study.rows} >= {PADDED + "1", PADDED + "largest", PACKED}
    close(sweep)


def test_folder_in_use(open_sweep, monkeypatch):
    monkeypatch.setattr("moejax.study.characterize.sweep.time.sleep", lambda seconds: None)
    sweep = open_sweep()
    with pytest.raises(UserError, match=rf"another `moejax characterize` \(process {os.getpid()}\)"):
        open_sweep()
    close(sweep)


def test_folder_of_another_configuration(open_sweep, tmp_path):
    close(open_sweep())
    kept = (tmp_path / "out" / results.STUDY_FILE).read_text()
    with pytest.raises(UserError, match=r"another configuration. Changed: settings.*learning_rate: 0.001 -> 0.5"):
        open_sweep(overrides=["training.learning_rate=0.5"])
    with pytest.raises(UserError, match=r"sizes.queries: 8 -> 9"):
        open_sweep(overrides=["sweep.queries=9"])
    with pytest.raises(UserError, match=r"another environment. Changed: versions.jax: '0' -> '1'"):
        open_sweep(environment=dataclasses.replace(ENVIRONMENT, versions={"jax": "1"}))
    assert (tmp_path / "out" / results.STUDY_FILE).read_text() == kept


def test_folder_with_other_files(open_sweep, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("")
    with pytest.raises(UserError, match=r"holds other files and no characterize.json"):
        open_sweep()


def test_folder_of_an_older_schema(open_sweep, tmp_path):
    close(open_sweep())
    file = tmp_path / "out" / results.STUDY_FILE
    file.write_text(json.dumps(json.loads(file.read_text()) | {"schema_version": 0}))
    with pytest.raises(UserError, match=r"schema_version = 0, this moejax reads version 1"):
        open_sweep()


@pytest.mark.parametrize("limit", [0, 1, 2, 5, 40, 99, 100, 101, 130, 1000])
def test_search_ends_at_two_neighbours(limit):
    tried = []

    def runs(rows):
        tried.append(rows)
        return rows <= limit

    assert children.search(100, runs) == (limit, limit + 1)
    assert {limit, limit + 1} - {0} <= set(tried) and len(tried) == len(set(tried)) <= 40
    assert limit != 100 or tried == [100, 101]


def test_lengths_of_a_sweep_are_of_whole_rows():
    """Rows of another length compile for no GPU with two or more of them; a length that comes to the same is run once."""
    asked = ["sweep.lengths=[75, 80, 128]", "sweep.breakdown_tokens=100", "sweep.pack_row_tokens=null", "name=a"]
    sizes, rest = presets.override(presets.STUDY, asked)
    assert (sizes.lengths, sizes.breakdown_tokens, sizes.pack_row_tokens, rest) == ((80, 128), 112, None, ["name=a"])


@pytest.mark.parametrize(("asked", "longest", "row"), [(None, 72, 72), (96, 72, 96), (96, 128, 128)])
def test_a_packed_row_holds_the_longest_query(asked, longest, row):
    setting = SimpleNamespace(longest=longest)
    assert plan.packed_row(dataclasses.replace(presets.STUDY, pack_row_tokens=asked), setting) == row

"""The real thing, as small as it goes: every kind of trial, an artificial out-of-memory, the command line's refusals."""

import argparse
import contextlib
import json
import shlex
import subprocess
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
from small_study import ENVIRONMENT, SIZES, write_config
from support import EXPERIMENTS

from moejax import cli, runtime
from moejax.errors import UserError
from moejax.estimator.prices import SETS
from moejax.study.characterize import children, command, result, sweep, trial
from moejax.study.report import results


@pytest.fixture(scope="module")
def here():
    """Trials run in this process, which has jax and what other trials compiled already; one in a process of its own, as all do."""
    wait = children.Runner._wait

    def in_this_process(self, command, log):
        at = command.index(children.MODULE) + 1
        folder, name, *rest = command[at : command.index("--parent")]
        if name.endswith("/packed/largest") and "a_process_too" in str(folder):
            return wait(self, command, log)
        with log.open("w") as file, contextlib.redirect_stdout(file):
            try:
                return trial.run(Path(folder), name, int(rest[1]) if rest else None)
            except UserError as error:
                print(f"error: {error}")
                return 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(children.Runner, "_wait", in_this_process)
        patch.setattr(runtime, "prepare_jax", lambda device: None)  # of this process, which is the tests'
        yield


@pytest.fixture(scope="module", autouse=True)
def asked_once():
    """What the device is, a process of its own says; but once for all tests."""
    ask = cache(lambda *command: subprocess.run(command, capture_output=True, text=True, check=False, env=children.environment()))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "subprocess", SimpleNamespace(run=lambda command, **settings: ask(*command)))
        yield


@pytest.fixture(scope="module")
def study(tmp_path_factory, here):
    folder = tmp_path_factory.mktemp("a_process_too")
    arguments = ["characterize", "--config", write_config(folder), "--memory-limit", "1MB", "--out", str(folder / "out"), *SIZES]
    assert cli.main(arguments) == 0
    return folder / "out"


@pytest.mark.long  # .ci/run runs a smaller study of two models, and looks at it
def test_every_part_ran(study):
    found = results.read(study)
    assert {name: (t.status, t.message) for name, t in found.trials.items() if t.status != "done"} == {}
    assert found.finished and {r.experiment for r in found.rows} == set(EXPERIMENTS)
    assert found.memory_limit == results.MemoryLimit(1_000_000, True)
    assert found.environment.platform == "cpu" and found.environment.peaks == "measured" and "jax" in found.environment.versions
    assert [p.trial for p in found.plan] == list(found.trials) and all(p.expected_seconds > 0 for p in found.plan)


@pytest.mark.long
def test_the_largest_batch_ran_and_one_above_was_refused(study):
    found = results.read(study)
    values = {r.metric: r for r in found.of("largest_batch")}
    largest = values["proved_batch"].value
    assert values["predicted_batch"].value == largest >= 1 and values["failed_batch"].value == largest + 1
    assert values["peak_bytes"].value <= 1_000_000
    assert (values["memory_limit"].value, values["memory_limit"].scope) == (1_000_000, "artificial")
    trial = found.trials["largest_batch/mixtral-tiny/problems/sparse/prove"]
    assert f"{largest + 1}: RESOURCE_EXHAUSTED (artificial limit" in trial.message
    refused = json.loads((study / "trials" / f"largest_batch/mixtral-tiny/problems/sparse/prove@{largest + 1}.json").read_text())
    assert refused["status"] == "out_of_memory"


@pytest.mark.long
def test_figures_are_consistent(study):
    found = results.read(study)
    for r in found.rows:
        if r.metric == "queries_per_second" and r.experiment == "throughput":
            own = {o.metric: o.value for o in found.rows if (o.trial, o.experiment) == (r.trial, r.experiment)}
            assert own["queries"] >= 8 and own["queries"] / own["seconds"] == pytest.approx(r.value)
            assert own["queries"] / own["steps"] == pytest.approx(r.batch)
    phases = {r.scope: r.value for r in found.of("stages", batch=1)}
    assert set(phases) == {"forward", "recompute", "backward", "optimizer", "other", "idle"}
    layers = sum(r.value for r in found.of("layers", batch=1))
    assert layers == pytest.approx(sum(v for k, v in phases.items() if k != "idle"))
    moe = sum(r.value for r in found.of("kernels", batch=1))
    assert moe == pytest.approx(next(r.value for r in found.of("layers", batch=1, scope="moe")))
    for when in ("before", "after"):
        shares = [r.value for r in found.of("expert_load", metric="share") if r.scope.startswith(f"{when}/")]
        assert len(shares) == 4 and sum(shares) == pytest.approx(1)
    assert not found.of("cost", metric="usd")  # a CPU has no price
    assert {p.gpu for p in SETS["2026"]}.isdisjoint(r.scope for r in found.of("cost"))


def test_a_model_that_cannot_fit(tmp_path, here, capsys):
    out = tmp_path / "out"
    arguments = ["characterize", "--config", write_config(tmp_path), "--memory-limit", "100kB", "--out", str(out), *SIZES]
    assert cli.main(arguments) == 1  # the fits have nothing to be computed from
    found = results.read(out)
    predicted = found.trials["largest_batch/mixtral-tiny/problems/sparse/predict"]
    assert predicted.status == "out_of_memory" and "not one query of 48 tokens fits into 0.1 MB" in predicted.message
    rest = {t.status for name, t in found.trials.items() if name.startswith(("throughput", "length", "stages", "expert_load"))}
    assert rest == {"out_of_memory"} and not found.of("throughput")
    assert "no throughput trial of mixtral-tiny came to an end" in found.trials["fit/mixtral-tiny"].message
    assert "2 of 10 trials failed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("preset", "method", "sections", "mixer"),
    [pytest.param("blackmamba-tiny", "full", {"quantization": {"format": "none"}, "adapter": None}, "mamba", marks=pytest.mark.long),
     pytest.param("qwen3-moe-tiny", "qlora", {"adapter": {"rank": {"experts": 1, "attention": 2}}}, "attention", marks=pytest.mark.long)],
)  # fmt: skip
def test_another_family_dense(preset, method, sections, mixer, tmp_path, monkeypatch):
    """Through all experts: what is measured of it, here in one process."""
    from moejax.study.characterize import study
    from moejax.study.characterize.sweep import Sweep

    small = {"hidden_size": 32, "intermediate_size": 64, "num_layers": 2, "num_experts": 4, "experts_per_token": 1}
    config = write_config(tmp_path, model={"preset": preset, "overrides": small}, **sections)
    wanted = study.resolve(None, [config], [*SIZES, "sweep.routings=[dense]", "sweep.dense_lengths=[32]"], 10**8, False)
    assert [m.family for m in wanted.models()] == ["blackmamba" if mixer == "mamba" else None]
    limit = results.MemoryLimit(10**8, True)
    Sweep.open(wanted, tmp_path / "out", None, "a command", ENVIRONMENT, limit).close()
    monkeypatch.setattr(runtime, "prepare_jax", lambda device: None)  # of this process, which is the tests'
    experiments = set()
    for name in (f"length/{preset}/problems/dense/32", f"throughput/{preset}/problems/dense/padded/largest"):
        assert trial.run(tmp_path / "out", name, 2) == 0
        left = result.read(result.path_of(tmp_path / "out", name))
        assert (left.status, left.message) == ("done", None)
        assert {(r.method, r.routing, r.batch) for r in left.rows} == {(method, "dense", 2)}
        experiments |= {r.experiment for r in left.rows}
        layers = {r.scope for r in left.rows if r.experiment == "layers"}
        assert not layers or (layers & {"mamba", "attention"} == {mixer} and "moe" in layers)
    assert experiments == {"stages", "layers", "kernels", "utilization", "length", "throughput"}


@pytest.mark.parametrize("asked", [32, 4])
def test_the_plan_counts_what_the_model_computes(asked, tmp_path):
    """A step's model FLOPs with the forward pass again, at a quarter of the peak; sparse of a dense config is a quarter of the experts."""
    from moejax.study.characterize import plan, study
    from moejax.training import flops

    config = write_config(tmp_path, model={"preset": "qwen3-moe-tiny", "overrides": {"num_experts": 32}, "experts_per_token": asked})
    wanted = study.resolve(None, [config], [*SIZES, "sweep.routings=[sparse, dense]"], 10**8, False)
    sparse, dense = (s.architecture for s in wanted.settings)
    assert (sparse.experts_per_token, dense.experts_per_token) == (8 if asked == 32 else 4, 32)
    slow = replace(ENVIRONMENT, peak_flops=1e6, peak_bytes_per_second=1e18)
    for s in wanted.settings:
        (task,) = (t for t in plan.tasks(wanted) if t.kind == "breakdown" and t.setting is s)
        of_step = flops.count(s.architecture, s.experiment.adapter.lora).step(32, [32]) * 1.5 / (0.25 * 1e6)
        steps = 3 + wanted.sizes.timed + 2 * wanted.sizes.traced
        assert plan.expected(task, wanted, slow, 10**8) == pytest.approx(steps * of_step, abs=15)


def test_out_of_the_hosts_memory_is_a_result(tmp_path, monkeypatch):
    """A MemoryError of a trial is its row's, to be tried again."""
    from moejax.study.characterize import experiments, study
    from moejax.study.characterize.sweep import Sweep

    wanted = study.resolve(None, [write_config(tmp_path)], SIZES, 10**7, False)
    name = "largest_batch/mixtral-tiny/problems/sparse/predict"
    Sweep.open(wanted, tmp_path / "out", None, "a command", ENVIRONMENT, results.MemoryLimit(10**7, True)).close()

    def predict(t):
        raise MemoryError("Unable to allocate 47 GiB")

    monkeypatch.setattr(experiments, "predict", predict)
    monkeypatch.setattr(runtime, "prepare_jax", lambda device: None)  # of this process, which is the tests'
    assert trial.run(tmp_path / "out", name, None) == 0
    left = result.read(result.path_of(tmp_path / "out", name))
    assert (left.status, left.message) == ("failed", "out of memory on the host: MemoryError: Unable to allocate 47 GiB")
    assert not left.final and left.command.endswith(f"/out {name}")


def test_a_preset_works_from_any_folder(tmp_path, monkeypatch):
    from moejax.study.characterize import study

    here = study.resolve("cpu-demo", [], [], None, False)
    monkeypatch.chdir(tmp_path)
    there = study.resolve("cpu-demo", [], [], None, False)
    assert [s.key for s in there.settings] == [s.key for s in here.settings] and len(there.settings) == 3
    for s in there.settings:
        assert not s.random_weights and not s.random_data and s.run_queries == 3 * (4000 - 200)


def test_commands_are_what_a_shell_takes(tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    typed = ["--config", "my config.yaml", "--out", "a b", "sweep.lengths=[64, 256]", "name=it's"]
    told = shlex.split(command._command(parser.parse_args(typed)))
    assert told[:2] == ["moejax", "characterize"] and told[2:] == typed
    assert shlex.split(trial.told(tmp_path / "a b; rm", "stages/x", 3))[3:] == [str(tmp_path / "a b; rm"), "stages/x", "--rows", "3"]


@pytest.mark.parametrize("out", ["tiny.yaml", "tiny.yaml/below"])
def test_an_out_that_is_no_folder(tmp_path, capsys, out):
    arguments = ["characterize", "--config", write_config(tmp_path), "--memory-limit", "6MB", "--out", str(tmp_path / out), *SIZES]
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --out {tmp_path / out}: ") and "expected a folder that can be written" in error
    assert error.count("\n") == 1


def test_plan_runs_nothing(tmp_path, capsys):
    out = tmp_path / "out"
    assert cli.main(["characterize", "--config", write_config(tmp_path), "--memory-limit", "6MB", "--out", str(out), "--plan", *SIZES]) == 0
    printed = capsys.readouterr().out
    assert "10 trials" in printed and "throughput/mixtral-tiny/problems/sparse/padded/largest" in printed and "artificial limit" in printed
    assert not out.exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--out", "x"], "what is to be characterized? Give a CONFIG (`moejax init` writes one), or --preset study-mixtral |"),
        (["--preset", "fast", "--out", "x"], "--preset fast: expected one of study-mixtral,"),
        (["--preset", "cpu-demo", "--out", "x", "--memory-limit", "lots"], "--memory-limit lots: expected bytes, e.g. 2GB"),
        (["--preset", "quick", "--out", "x", "sweep.querys=3"], "override 'sweep.querys=3': expected sweep.NAME=VALUE with one of"),
        (["--preset", "cpu-demo", "--out", "x", "sweep.batches=[0]"], "override 'sweep.batches=[0]': expected a value like"),
        (["--preset", "cpu-demo", "--out", "x", "sweep.batches=[1"], "override 'sweep.batches=[1': expected a value like"),
        (["--config", "broken.yaml", "--out", "x"], "broken.yaml, line 2: not valid YAML"),
        (["--config", "latin.yaml", "--out", "x"], "latin.yaml: not UTF-8 text"),
        (["--config", "nowhere.yaml", "--out", "x"], "config file nowhere.yaml does not exist"),
        (["--preset", "quick", "--out", "x"], "has no memory limit of its own, so nothing would ever be too large: set one"),
        (["--preset", "quick", "--out", "x", "data.source=nowhere.json"], "data.source = nowhere.json is no file here. --pretrained"),
    ],
)  # fmt: skip
def test_refusals(arguments, told, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {"broken.yaml": b"model: {\ndata: ]", "latin.yaml": "name: Käse".encode("latin-1")}
    for name, content in files.items():
        Path(name).write_bytes(content)
    assert cli.main(["characterize", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and told in error and "Traceback" not in error
    assert {p.name for p in tmp_path.iterdir()} == files.keys()

"""Weights & Biases: what it is given, and that nothing that fails there reaches a run. By a stand-in; one test by the package itself."""

import itertools
import json
import os
import struct
import subprocess
import sys
from importlib.util import find_spec

import pytest
from support import ROOT

from moejax.config import dump, load
from moejax.errors import UserError
from moejax.training import dry_run, loop, wandb_run
from moejax.training.metrics import MetricWriter

STAND_IN = '''
import os
begun, runs, fails, logged_in = [], [], set(), True


class Settings:
    mode = "online"

    def __init__(self, **settings):
        self.settings = self


def _may_fail(what):
    if what in fails:
        raise RuntimeError(f"{what} failed")


class Run:
    def __init__(self, id, folder, mode):
        self.id, self.dir, self.url = id or "abc", f"{folder}/wandb/run/files", "https://there/abc"
        self.offline = "offline" in (mode, os.environ.get("WANDB_MODE"))
        self.logged, self.defined, self.summary, self.finished = [], [], {}, False
        runs.append(self)

    def define_metric(self, name, step_metric=None):
        self.defined.append((name, step_metric))

    def log(self, values):
        _may_fail("log")
        self.logged.append(values)

    def finish(self):
        _may_fail("finish")
        self.finished = True


def setup():
    found = Settings()
    found.settings.mode = os.environ.get("WANDB_MODE", "online")
    return found


def login(prompt, verify):
    assert not prompt and not verify
    return logged_in


def init(mode, dir, id, **others):
    begun.append({"mode": mode, "id": id, **others})
    _may_fail("init")
    if mode is None:
        _may_fail("online")
    return Run(id, dir, mode)
'''


@pytest.fixture
def wandb(tmp_path, monkeypatch):
    """The stand-in in the package's place."""
    package = tmp_path / "packages/wandb"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(STAND_IN)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    sys.modules.pop("wandb", None)
    import wandb

    yield wandb
    sys.modules.pop("wandb", None)


def logged_by(experiment, names):
    return type(experiment).model_validate(experiment.model_dump(mode="json") | {"logging": names})


def test_a_run_sends_what_metrics_jsonl_has(wandb, make_experiment, tmp_path):
    experiment = logged_by(make_experiment(training={"steps": 2}), ["wandb"])
    assert loop.run(experiment, resume=False) == 0
    (run,), (begun,), folder = wandb.runs, wandb.begun, tmp_path / "runs/run"
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert run.logged == [{name: value for name, value in line.items() if not isinstance(value, list)} for line in lines]
    assert {"loss", "eval_loss"} <= {name for values in run.logged for name in values} and run.finished
    assert run.defined == [("step", None), ("*", "step")]
    assert begun["config"] == load(folder / "config.yaml").model_dump(mode="json")
    assert begun["project"] == "moejax" and begun["name"] == "run" and begun["mode"] is None
    assert run.summary["run/last_loss"] == lines[-2]["loss"] and run.summary["run/compiler_peak_bytes"] > 0
    assert not list(folder.glob("events.*"))  # it was named alone


def test_a_resumed_run_goes_on_there(wandb, make_experiment, tmp_path):
    experiment = logged_by(make_experiment(), ["tensorboard", "wandb"])
    MetricWriter(tmp_path, experiment).close()
    (tmp_path / wandb_run.ID).write_text("known")
    MetricWriter(tmp_path, experiment, resume_step=3).close()
    first, second = wandb.begun
    assert (first["id"], first["resume"], second["id"], second["resume"]) == (None, None, "known", "allow")


@pytest.mark.parametrize("what", ["init", "log", "finish", "import"])
def test_a_failure_is_one_warning(what, wandb, make_experiment, tmp_path, capsys):
    wandb.fails.add(what)
    if what == "import":
        (tmp_path / "packages/wandb/__init__.py").write_text("raise OSError('import failed')")
        del sys.modules["wandb"]
    writer = MetricWriter(tmp_path, logged_by(make_experiment(), ["tensorboard", "wandb"]))
    for step in (1, 2):
        writer.write(step, {"loss": 1.0})
    writer.summarize({"run/last_loss": 1.0})
    writer.close()
    assert capsys.readouterr().err.count(f"warning: wandb failed ({what} failed): the run continues without it") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2 and list(tmp_path.glob("events.*"))


def test_without_login_or_network_it_is_offline_and_said(wandb, make_experiment, tmp_path, capsys, monkeypatch):
    experiment = logged_by(make_experiment(), ["wandb"])
    wandb.logged_in = False
    MetricWriter(tmp_path, experiment).close()
    out, err = capsys.readouterr()
    assert err == "wandb: not logged in (`wandb login`, or WANDB_API_KEY): the run is kept offline\n"
    assert out == f"wandb: run abc, offline: wandb sync {tmp_path}/wandb/run sends it\n" and wandb.begun[-1]["mode"] == "offline"
    wandb.logged_in = True
    wandb.fails.add("online")
    MetricWriter(tmp_path, experiment).close()
    assert capsys.readouterr().err == "wandb: online failed: the run is kept offline\n"
    assert [begun["mode"] for begun in wandb.begun] == ["offline", None, "offline"] and wandb.runs[-1].finished
    wandb.fails.clear()
    MetricWriter(tmp_path, experiment).close()
    assert capsys.readouterr() == ("wandb: https://there/abc\n", "")
    monkeypatch.setenv("WANDB_MODE", "offline")  # what its user says there needs no login, and no word
    wandb.logged_in = False
    MetricWriter(tmp_path, experiment).close()
    assert wandb.begun[-1]["mode"] is None and not capsys.readouterr().err


@pytest.mark.parametrize("started", [lambda experiment: loop.run(experiment, resume=False), dry_run.report], ids=["run", "dry run"])
def test_without_the_package_it_is_refused_before_anything_is_read(started, make_experiment, tmp_path, monkeypatch):
    for found in (None, type("Namespace", (), {"origin": None})()):  # not there; a folder wandb/ where python looks
        monkeypatch.setattr(wandb_run.importlib.util, "find_spec", lambda name, found=found: found)
        with pytest.raises(UserError, match=r"the package wandb is not installed\. .*pip install 'wandb>=0.31,<0.32', or take wandb out"):
            started(logged_by(make_experiment(), ["tensorboard", "wandb"]))
    assert not (tmp_path / "runs").exists()


def test_nothing_of_it_is_imported_unasked(make_experiment, tmp_path, wandb):
    del sys.modules["wandb"]
    experiment = make_experiment()
    assert experiment.logging == ("tensorboard",)
    wandb_run.check(experiment)
    writer = MetricWriter(tmp_path, experiment)
    writer.write(1, {"loss": 1.0})
    writer.close()
    assert "wandb" not in sys.modules and list(tmp_path.glob("events.*"))


@pytest.mark.long
@pytest.mark.skipif(find_spec("wandb") is None or find_spec("wandb").origin is None, reason="needs the extra `wandb`")
def test_the_package_offline(make_experiment, tmp_path):
    """A run and what is resumed of it, each in a process: two parts of one run in wandb's own files."""
    from wandb.proto import wandb_internal_pb2

    config = tmp_path / "config.yaml"
    config.write_text(dump(logged_by(make_experiment(training={"steps": 4}, checkpoint={"every": 2}), ["tensorboard", "wandb"])))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")} | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]), "HOME": str(tmp_path),
    }  # fmt: skip
    stopping = (
        "import signal; from moejax import cli; from moejax.training import loop; save = loop.Checkpoints.save\n"
        "def stop(self, step, *rest):\n    save(self, step, *rest)\n    if step == 2:\n        signal.raise_signal(signal.SIGTERM)\n"
        f"loop.Checkpoints.save = stop; raise SystemExit(cli.main(['train', {str(config)!r}]))"
    )
    resuming = f"from moejax import cli; raise SystemExit(cli.main(['train', {str(config)!r}, '--resume']))"
    said = [subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=tmp_path, check=False)
            for code in (stopping, resuming)]  # fmt: skip
    assert [done.returncode for done in said] == [128 + 15, 0], said
    for done in said:
        assert done.stderr.count("not logged in") == 1 and "warning: wandb failed" not in done.stderr + done.stdout, done
    folder = tmp_path / "runs/run"
    id_ = (folder / wandb_run.ID).read_text()
    parts = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    assert len(parts) == 2 and {part.stem for part in parts} == {f"run-{id_}"}
    logged, ids = [], []
    for data in itertools.chain(*map(_records, parts)):
        record = wandb_internal_pb2.Record.FromString(data)
        match record.WhichOneof("record_type"):
            case "history":
                logged.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item})
            case "run":
                ids.append(record.run.run_id)
    assert ids == [id_, id_]
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [values["step"] for values in logged] == [line["step"] for line in lines] and logged[-1]["step"] == 4
    for values, line in zip(logged, lines, strict=True):
        assert {n: v for n, v in values.items() if not n.startswith("_")} == {n: v for n, v in line.items() if not isinstance(v, list)}


def _records(path):
    """The messages in a .wandb file: LevelDB's log behind 7 bytes, blocks of 32 KB with pieces of crc, length, kind and data."""
    content, at, message = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        message += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield message
            message = b""

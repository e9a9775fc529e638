"""Two processes of two devices each, on this machine: they train as one process does with four, and end together. `make test-long`."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import ROOT

pytestmark = pytest.mark.long

COMMON = (
    "data.holdout=8", "data.batch_rows=4", "adapter.rank=2", "training.epochs=null", "training.schedule=constant",
    "training.warmup_steps=0", "checkpoint.every=2", "checkpoint.best=false",
)  # fmt: skip
STEPS = 4
SCORED = (
    "eval.task=problems", f"eval.data={ROOT}/assets/problems/test.json", "eval.limit=4", "eval.rows=4", "eval.max_new_tokens=4",
)  # fmt: skip


def free_port():
    import socket

    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def begin(folder, name, devices, *changes, cwd=ROOT):
    """A training process with this many virtual devices; its output lies in a file."""
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    command = [sys.executable, str(ROOT / "train.py"), "--config", str(ROOT / "configs/demo.yaml"), f"runs_dir={folder}", f"name={name}"]
    output = (folder / f"{name}-{len(list(folder.iterdir()))}.out").open("w+")
    process = subprocess.Popen(
        [*command, *COMMON, *changes], cwd=cwd, env=os.environ | {"XLA_FLAGS": flags}, stdout=output, stderr=subprocess.STDOUT
    )  # fmt: skip
    process.output = output
    return process


def end(process, seconds=900):
    """(exit code, what it said)."""
    code = process.wait(seconds)
    process.output.seek(0)
    return code, process.output.read()


def begin_two(folder, name, *changes, **more):
    """more: changes of each of the two, and where they stand."""
    meet = (f"mesh.coordinator=127.0.0.1:{free_port()}", "mesh.processes=2")
    cwd, own = more.get("cwd", (ROOT, ROOT)), more.get("own", ((), ()))
    return [begin(folder, name, 2, *meet, f"mesh.process_id={i}", *changes, *own[i], cwd=cwd[i]) for i in range(2)]


def metrics(folder, key="loss"):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def close(found, expected, within=2e-6):
    assert found.keys() == expected.keys()
    for step, value in found.items():
        assert abs(value - expected[step]) <= within * abs(expected[step]), (step, value, expected[step])


@pytest.mark.parametrize("mode", ["whole", "spread", "experts"])
def test_two_train_as_one_does_with_as_many_devices(mode, tmp_path):
    changes = (f"mesh.weights={mode}", f"training.steps={STEPS}", "training.eval_every=2", *(SCORED if mode == "experts" else ()))
    code, said = end(begin(tmp_path, "one", 4, *changes))
    assert code == 0, said
    first, second = (end(process) for process in begin_two(tmp_path, "two", *changes))
    assert (first[0], second[0]) == (0, 0), first[1] + second[1]
    for key in ("loss", "eval_loss", "grad_norm", "eval/loss", "eval/accuracy"):
        close(metrics(tmp_path / "two", key), metrics(tmp_path / "one", key))
    assert bool(metrics(tmp_path / "two", "eval/loss")) == (mode == "experts")
    assert f"step {STEPS}/{STEPS}" in first[1] and "step" not in second[1]  # one shows, and one writes
    assert len(list((tmp_path / "two").glob("events.*"))) == 1
    found, expected = (load_file(str(tmp_path / name / "adapter" / "adapter_model.safetensors")) for name in ("two", "one"))
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        np.testing.assert_allclose(tensor, expected[name], atol=2e-5, err_msg=name)
    assert "coordinator: null" in (tmp_path / "two" / "config.yaml").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """The losses of a run of one process with two devices, experts on their own ones."""
    folder = tmp_path_factory.mktemp("undisturbed")
    code, said = end(begin(folder, "run", 2, "mesh.weights=experts", "training.steps=30"))
    assert code == 0, said
    return metrics(folder / "run")


@pytest.fixture(scope="module")
def on_four(tmp_path_factory):
    folder = tmp_path_factory.mktemp("four")
    code, said = end(begin(folder, "run", 4, "mesh.weights=experts", f"training.steps={STEPS}"))
    assert code == 0, said
    return folder / "run"


@pytest.mark.parametrize(("devices", "mode"), [(4, "experts"), (2, "experts"), (1, "whole"), (2, "spread")])
def test_a_run_goes_on_elsewhere(devices, mode, on_four, tmp_path):
    """From its checkpoint of four devices: on four again to the bit."""
    run = tmp_path / "run"
    shutil.copytree(on_four, run, ignore=shutil.ignore_patterns("adapter", str(STEPS)))
    assert [path.name for path in (run / "checkpoints").iterdir() if path.name.isdigit()] == [str(STEPS - 2)]
    code, said = end(begin(tmp_path, "run", devices, f"mesh.weights={mode}", f"training.steps={STEPS}", "--resume"))
    assert code == 0, said
    losses, expected = metrics(run), metrics(on_four)
    adapters = [load_file(str(folder / "adapter" / "adapter_model.safetensors")) for folder in (run, on_four)]
    if (devices, mode) == (4, "experts"):
        assert losses == expected and all(np.array_equal(value, adapters[1][name]) for name, value in adapters[0].items())
    close(losses, expected)


def wait_for(path, processes, seconds=400):
    until = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < until and all(process.poll() is None for process in processes), [end(p, 1)[1] for p in processes]
        time.sleep(0.1)


@pytest.mark.parametrize("killed", [0, 1])
def test_one_is_killed_and_the_run_goes_on_with_fewer(killed, undisturbed, tmp_path):
    two = begin_two(tmp_path, "run", "mesh.weights=experts", "training.steps=30")
    wait_for(tmp_path / "run/checkpoints/4", two)
    two[killed].kill()
    code, said = end(two[1 - killed], 60)
    assert code == 2 and said.rstrip().splitlines()[-1].startswith("error: another process of this run has ended"), said
    code, said = end(begin(tmp_path, "run", 2, "mesh.weights=experts", "training.steps=30", "--resume"))
    assert code == 0, said
    close(metrics(tmp_path / "run"), undisturbed, 1e-4)


def test_both_end_after_the_same_step_where_one_is_asked_to(tmp_path):
    two = begin_two(tmp_path, "run", "mesh.weights=whole", "training.steps=2000")
    wait_for(tmp_path / "run/checkpoints/2", two)
    two[1].send_signal(signal.SIGTERM)
    first, second = (end(process) for process in two)
    assert (first[0], second[0]) == (143, 143) and "SIGTERM: step" in first[1], first[1] + second[1]
    last = max(metrics(tmp_path / "run"))
    assert (tmp_path / f"run/checkpoints/{last}").is_dir()


def test_other_configs_are_refused(tmp_path):
    own = (("training.learning_rate=1e-3",), ("training.learning_rate=2e-3",))
    for number, (code, said) in enumerate(end(p, 200) for p in begin_two(tmp_path, "run", "training.steps=2", own=own)):
        assert code == 2 and "the processes have not the same config: " in said and " in process 0 and " in said, said
        assert "learning_rate = 0.001 in process 0, 0.002 here" in said or number == 0
    assert not (tmp_path / "run").exists()


def test_other_data_are_refused(tmp_path):
    records = json.loads((ROOT / "assets/problems/train.json").read_text())
    for name, some in (("a", records[:100]), ("b", records[1:101])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "data.json").write_text(json.dumps(some))
    two = begin_two(
        tmp_path, "run", "training.steps=2", "data.source=data.json", f"model.source={ROOT / 'assets/tiny-mixtral'}",
        cwd=(tmp_path / "a", tmp_path / "b"),
    )  # fmt: skip
    for code, said in (end(process, 200) for process in two):
        assert code == 2 and "the processes have not the same data: " in said, said

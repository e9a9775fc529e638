"""A run's model over two processes of two devices each: they say what one process on one device says, and the first one writes it.
`make test-long`."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
from support import ROOT

pytestmark = pytest.mark.long

PROBLEMS = str(ROOT / "assets/problems/test.json")


def asked(*command, mesh, processes=1):
    """[(exit code, standard output, standard error) of each process]."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        meet = f"mesh.coordinator=127.0.0.1:{server.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    started = []
    for number in range(processes):
        own = [mesh] if processes == 1 else [mesh, meet, "mesh.processes=2", f"mesh.process_id={number}"]
        line = [sys.executable, "-m", "moejax", *map(str, command), *own]
        more = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(line, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    said = [process.communicate(timeout=400) for process in started]
    gloo = re.compile(r"^\[Gloo\].*\n", re.MULTILINE)  # it prints by itself where it has met
    return [(process.returncode, gloo.sub("", out), error) for process, (out, error) in zip(started, said, strict=True)]


def test_accuracy(run, tmp_path):
    limit = ("--limit", 5, "--rows", 3, "--max-new-tokens", 8)
    command = ("eval", run, "--task", "problems", "--data", PROBLEMS, *limit, "--out")
    (code, _, said), *_ = asked(*command, tmp_path / "one", mesh="mesh=null")
    assert code == 0, said
    first, second = asked(*command, tmp_path / "two", mesh="mesh.weights=experts", processes=2)
    assert (first[0], second[0]) == (0, 0), first[2] + second[2]
    assert "% right" in first[1] and second[1] == ""
    one, two = ((tmp_path / name / "predictions.jsonl").read_text() for name in ("one", "two"))
    assert one == two and len(one.splitlines()) == 5


def test_answers(run):
    prompts = [text for prompt in ("One", "Two and two", "A box holds 12 apples") for text in ("--prompt", prompt)]
    drawn = ("--max-new-tokens", 6, "--temperature", 1, "--seed", 3)
    alone, = asked("generate", run, *prompts, *drawn, mesh="mesh=null")
    first, second = asked("generate", run, *prompts, *drawn, mesh="mesh.weights=spread", processes=2)
    assert (alone[0], first[0], second[0]) == (0, 0, 0), alone[2] + first[2] + second[2]
    assert alone[1] == first[1] and alone[1].count("---") == 3
    assert second[1] == "" and "tokens/s" in first[2] and "tokens/s" not in second[2]


def test_experts_loads(run, tmp_path):
    file = run / "expert_load.json"
    tables = []
    for more, processes in (("mesh=null", 1), ("mesh.weights=whole", 2)):
        for code, _, said in asked("expert-load", run, "--data", PROBLEMS, "--limit", 5, mesh=more, processes=processes):
            assert code == 0, said
        tables.append(json.loads(file.read_text()))
        file.unlink()
    assert tables[0]["models"] == tables[1]["models"]


def test_other_questions_are_refused(run):
    """Named in both."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    meet = ("mesh.weights=whole", f"mesh.coordinator=127.0.0.1:{port}", "mesh.processes=2")
    command = [sys.executable, "-m", "moejax", "generate", str(run), *meet]
    lines = [[*command, f"mesh.process_id={i}", "--prompt", text] for i, text in enumerate("ab")]
    started = [subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) for line in lines]
    for process in started:
        said = process.communicate(timeout=200)[1]
        assert process.returncode == 2 and "the processes have not the same command" in said, said

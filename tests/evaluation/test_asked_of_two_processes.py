"""A run's model over two processes of two devices each: they say what one process on one device says, and the first one writes it.
`make test-long`."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
from support import ROOT, ended

pytestmark = pytest.mark.long

PROBLEMS = str(ROOT / "assets/problems/test.json")


def asked(*command, mesh, processes=1):
    """As `ended`, without what gloo prints."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        meet = f"mesh.coordinator=127.0.0.1:{server.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
    started = []
    for number in range(processes):
        own = [mesh] if processes == 1 else [mesh, meet, "mesh.processes=2", f"mesh.process_id={number}"]
        line = [sys.executable, "-m", "moejax", *map(str, command), *own]
        more = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
        started.append(subprocess.Popen(line, env=os.environ | more, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True))
    gloo = re.compile(r"^\[Gloo\].*\n", re.MULTILINE)  # it prints by itself where it has met
    return [(code, gloo.sub("", out), error) for code, out, error in ended(started)]


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
    for code, _, said in ended(started):
        assert code == 2 and "the processes have not the same command" in said, said


def test_exact_match(run):
    tables = []
    for more, processes in (("mesh=null", 1), ("mesh.weights=experts", 2)):
        (code, shown, said), *others = asked("exact-match", run, "--data", PROBLEMS, "--limit", 4, mesh=more, processes=processes)
        assert code == 0 and all(other[:2] == (0, "") for other in others), said
        tables.append((shown, *((run / name).read_text() for name in ("predictions.jsonl", "exact_match.json"))))
        for name in ("predictions.jsonl", "exact_match.json"):
            (run / name).unlink()
    assert tables[0] == tables[1] and len(tables[0][1].splitlines()) == 8


@pytest.mark.parametrize("kind", [("peft",), ("merged",), ("gguf", "--without-tokenizer")], ids=" ".join)
def test_export(kind, run, tmp_path):
    files = []
    for name, more, processes in (("one", "mesh=null", 1), ("two", "mesh.weights=experts", 2)):
        command = ("export", run, "--format", *kind, "--out", tmp_path / name / "model")
        (code, _, said), *others = asked(*command, mesh=more, processes=processes)
        assert code == 0 and all(other[:2] == (0, "") for other in others), said + "".join(other[2] for other in others)
        files.append({path.name: path.read_bytes() for path in (tmp_path / name / "model").iterdir()})
    assert files[0] == files[1] and files[0]


SCRIPT = """
import json, sys
import lm_eval
import moejax
from lm_eval.tasks import TaskManager
from moejax.evaluation.harness import MoejaxLM
run, tasks, mesh = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
model = MoejaxLM(run, batch_size=3, mesh=mesh)
found = lm_eval.simple_evaluate(
    model, tasks=["sums", "ends"], task_manager=TaskManager(include_path=tasks, include_defaults=False), bootstrap_iters=0, log_samples=True
)
said = None if found is None else [found["results"], [[sample["resps"] for sample in found["samples"][name]] for name in ("sums", "ends")]]
own = moejax.load(run, mesh=mesh)
loss, grads = moejax.loss_and_grads(own.model, own.batch(["One and two are three.", "Tom has 3 apples.", "Four."]))
own.save_adapter(sys.argv[4])
print("said " + json.dumps([said, own.generate("One and", max_new_tokens=4), float(loss)]))
"""


def test_scripts(run, tmp_path):
    """lm-evaluation-harness and the Python API: every process does the same, the first has the results and writes."""
    pytest.importorskip("lm_eval", reason="needs lm-evaluation-harness: pip install -e '.[eval]' (make test does)")
    records = [{"question": f"{a} and {b} are", "answer": f" {a + b}.", "wrong": f" {a}."} for a, b in ((1, 2), (3, 4), (5, 1), (2, 2))]
    (tmp_path / "sums.json").write_text(json.dumps(records))
    common = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(tmp_path / "sums.json")}}, "test_split": "test",
              "doc_to_text": "{{question}}"}  # fmt: skip
    chosen = {"output_type": "multiple_choice", "doc_to_choice": "{{[answer, wrong]}}", "doc_to_target": 0}
    drawn = {"output_type": "generate_until", "doc_to_target": "{{answer}}", "generation_kwargs": {"until": ["."], "max_gen_toks": 5},
             "metric_list": [{"metric": "exact_match"}]}  # fmt: skip
    for name, own in (("sums", drawn), ("ends", chosen)):
        (tmp_path / f"{name}.yaml").write_text(json.dumps({"task": name, **common, **own}))
    found = []
    for name, meshes in (("one", [{"devices": 1}]), ("two", [{"weights": "experts", "processes": 2, "process_id": i} for i in range(2)])):
        with socket.create_server(("127.0.0.1", 0)) as server:
            coordinator = f"127.0.0.1:{server.getsockname()[1]}"
        flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count=2"
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        more = {"XLA_FLAGS": flags, "PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
        started = []
        for mesh in meshes:
            mesh = mesh | ({"coordinator": coordinator} if len(meshes) == 2 else {})
            line = [sys.executable, "-c", SCRIPT, str(run), str(tmp_path), json.dumps(mesh), str(tmp_path / name)]
            started.append(subprocess.Popen(line, env=os.environ | more, **pipes))
        for code, out, error in ended(started):
            assert code == 0, error
            found.append(json.loads(next(line for line in out.splitlines() if line.startswith("said ")).removeprefix("said ")))
    (one, *own), (two, *first), (none, *second) = found
    assert none is None and own[0] == first[0] == second[0] and first == second
    assert abs(own[1] - first[1]) < 1e-5
    assert {path.name: path.read_bytes() for path in (tmp_path / "one").iterdir()} == {
        path.name: path.read_bytes() for path in (tmp_path / "two").iterdir()
    }
    (_, (answers, likely)), (_, (answers_of_two, likely_of_two)) = one, two
    assert answers == answers_of_two and len(answers) == 4
    flat = [[value for of_document in given for ((score, greedy),) in of_document for value in (float(score), str(greedy) == "True")]
            for given in (likely, likely_of_two)]  # fmt: skip
    assert len(flat[0]) == 16 and flat[0] == pytest.approx(flat[1], abs=1e-4)

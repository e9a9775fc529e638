"""What a run says before it steps, and after: prediction.json, comparison.json, and the words for both."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from moejax import cli, device
from moejax.estimator import coefficients, comparison, receipts
from moejax.training import loop, prediction


def fit_for(experiment, device, t0=0.25, u=1e-3):
    """A coefficients.json in the runs' folder, for this experiment's model and a device."""
    Path(experiment.runs_dir).mkdir(parents=True, exist_ok=True)
    spread = np.full((20, 3), (t0, u, 0.0)), np.full(20, 1.1)
    entry = coefficients.Entry(str(experiment.model.preset), "qlora", device, np.array([t0, u, 0.0]), *spread, "a test", 5)
    coefficients.write(Path(experiment.runs_dir) / prediction.COEFFICIENTS, [entry], {})


def announced(experiment, folder, capsys, **change):
    """What is printed at the start of a run of 100 steps of 1000 tokens, and the kept prediction."""
    asked = {"peak_bytes": 2 * 10**9, "tokens": 1000, "step": 1, "last": 100, "first": True} | change
    prediction.announce(experiment, experiment.model.architecture(None), folder, **asked)
    return capsys.readouterr().out, comparison.read_prediction(folder)


def test_with_coefficients_time_is_predicted(make_experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "cpu_name", lambda: "some CPU")
    experiment = make_experiment("x")
    out, _ = announced(experiment, tmp_path, capsys)
    assert "prediction: 2.00 GB by the compiled step; no time: " in out and "coefficients.json is not there" in out
    fit_for(experiment, "another CPU")
    assert "has none of" in announced(experiment, tmp_path, capsys)[0]
    fit_for(experiment, "some CPU")
    out, kept = announced(experiment, tmp_path, capsys)
    assert "1250.0 ms a step of 1,000 tokens" in out and "2.1 min for 100 steps" in out and "USD" not in out
    assert (kept["time"]["t0_seconds"], kept["time"]["token_seconds"]) == (0.25, 1e-3) and kept["disturbed_steps"] == [1]
    assert "extrapolated" not in out and "do not trust" not in out
    known = coefficients.Range((100.0, 200.0), (0.25, 0.25), 64)
    path = Path(experiment.runs_dir) / "coefficients.json"
    coefficients.write(path, [dataclasses.replace(e, range=known, doubt="they miss") for e in coefficients.read(path)])
    out, kept = announced(experiment, tmp_path, capsys)
    assert "extrapolated, which the brackets do not know: 1,000 tokens a step (measured: 100 to 200)" in out
    assert "do not trust it: its coefficients are in doubt (they miss)" in out and comparison.step_time(kept["time"]).range == known
    (Path(experiment.runs_dir) / "coefficients.json").write_text("{")
    assert "no time: " in announced(experiment, tmp_path, capsys)[0]  # a damaged file never stops a run


def test_a_later_program_raises_the_peak_and_silences_its_steps(make_experiment, tmp_path, capsys):
    experiment = make_experiment("x")
    announced(experiment, tmp_path, capsys)
    out, kept = announced(experiment, tmp_path, capsys, peak_bytes=3 * 10**9, step=7, first=False)
    assert out == "" and kept["compiler_peak_bytes"] == 3 * 10**9 and kept["disturbed_steps"] == [1, 6, 7]
    _, kept = announced(experiment, tmp_path, capsys, step=40)  # a resumed process
    assert kept["disturbed_steps"] == [1, 6, 7, 39, 40]


def test_a_run_predicts_and_compares(make_experiment, capsys, monkeypatch):
    monkeypatch.setattr(device, "cpu_name", lambda: "some CPU")
    experiment = make_experiment("x", training={"steps": 5})
    fit_for(experiment, "some CPU")
    assert loop.run(experiment, resume=False) == 0
    out = capsys.readouterr().out
    folder = Path(experiment.runs_dir) / experiment.name
    kept = json.loads((folder / "comparison.json").read_text())
    assert out.index("prediction: ") < out.index("step: predicted ")
    assert "memory: predicted" not in out  # a CPU's allocator does not say its peak
    assert kept["steps"] == 4 and kept["step_seconds"]["measured"] > 0 and kept["memory"]["predicted_bytes"] > 0
    error = kept["step_seconds"]["predicted"] / kept["step_seconds"]["measured"] - 1
    assert kept["step_seconds"]["error"] == pytest.approx(error)
    (receipt,) = receipts.read(folder / receipts.RECEIPT)
    assert (receipt.gpu, receipt.tool_name, receipt.model) == (None, "moejax", kept["model"]) and receipt.rows
    seconds = kept["step_seconds"]
    assert receipt.step_seconds == seconds["measured"] and receipt.predicted["step_seconds"] == seconds["predicted"]
    assert receipt.engagement["experts"] in ("loop", "capacity") and receipt.versions["jax"] and receipt.peak_gb_allocator is None
    assert cli.main(["estimate", "compare", "--runs-dir", experiment.runs_dir]) == 0
    out = capsys.readouterr().out
    assert "1 run, predicted and measured" in out and "drift by version" in out and f"{100 * error:+.1f} %" in out


def test_on_a_card_of_the_table_the_roofline_says_a_time(make_experiment, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(device, "name", lambda: "NVIDIA A40")
    experiment = make_experiment("x")
    out, kept = announced(experiment, tmp_path, capsys)
    assert "s a step (" in out and "no run of moejax was measured" in out and kept["program"]["predicted"] > 0
    steps = [{"step": n, "step_seconds": 0.5, "padded_tokens": 500, "real_tokens": 400, "device_peak_bytes": 10**9} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    step, memory = reversed(prediction.conclude(tmp_path))
    assert memory.startswith("memory: predicted 2.00 GB, measured 1.00 GB: +100.0 %") and step.startswith("step: predicted ")
    (receipt,) = receipts.read(tmp_path / receipts.RECEIPT)
    assert receipt.gpu == "A40" and receipt.peak_gb_allocator == 1.0
    assert receipt.predicted["program_seconds"] == pytest.approx(kept["program"]["seconds"] / 2)  # half the tokens


def test_what_was_not_predicted_is_not_said_at_the_end(make_experiment, tmp_path, capsys):
    """`estimate compare` says it, and why."""
    announced(make_experiment("x"), tmp_path, capsys)
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 1, "step_seconds": 0.5, "padded_tokens": 1000}) + "\n")
    assert prediction.conclude(tmp_path) == []  # its only step compiled: no advice to train longer either
    steps = [{"step": n, "step_seconds": 0.5, "padded_tokens": 1000, "host_peak_bytes": 10**9} for n in (1, 2)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    assert prediction.conclude(tmp_path) == []
    assert capsys.readouterr().out == "" and (tmp_path / "comparison.json").is_file()
    assert cli.main(["estimate", "compare", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "measured 1.00 GB (not comparable: " in out and "step: not predicted (" in out and "measured 500.0 ms" in out


def test_what_cannot_be_compared_is_said(tmp_path):
    (line,) = prediction.conclude(tmp_path)
    assert line.startswith("no comparison: ")

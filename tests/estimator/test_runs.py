"""`estimate.py fit` and `compare` on synthetic runs: known coefficients are found, and what cannot be fitted is said."""

import json
import re

import numpy as np
import pytest

from moejax import cli
from moejax.estimator import coefficients, comparison
from moejax.profiling import schema

T0, U, V = 0.5, 2e-4, 1e-3
C0, C1, MODEL = 0.4, 0.7, 3 * 10**9


def profile(path, queries, k=2, *, seconds=None, arguments=MODEL, **change):
    """The step_profile.json of a run of 150 tokens a query that follows the laws above."""
    tokens, share = 150 * queries, k / 8
    law = T0 + tokens * (U + V * share)
    content = {
        "schema_version": 2, "framework": "jax", "versions": {},
        "device": {"name": "NVIDIA A40", "memory_bytes": None, "peak_flops": None, "peak_bytes_per_second": None, "peaks_measured": None},
        "model": {"name": "mistralai/Mixtral-8x7B-v0.1", "params_total": 10, "params_active": 5, "params_trainable": 1},
        "method": "qlora", "precision": "bfloat16", "remat": "full", "moe": {"experts": 8, "top_k": k, "backend": "loop"},
        "batch": {"batching": "pack", "rows": None, "row_tokens": None, "queries": queries, "tokens": tokens, "real_tokens": None,
                  "supervised_tokens": None},
        "step_seconds": {"median": law if seconds is None else seconds, "p10": None, "p90": None, "n": 5}, "compile_seconds": None,
        "memory": {"compiler_peak_bytes": MODEL + round(1e9 * tokens * ((1 - C1) + C1 * share) / C0), "measured_peak_bytes": None,
                   "arguments_bytes": arguments, "temporaries_bytes": None},
        "phases": None, "layers": None, "moe_kernels": None, "cost": None, "expert_load": None,
        "devices": 1, "mode": None, "collectives": None,
    }  # fmt: skip
    for key, value in change.items():
        content[key] = content[key] | value if isinstance(value, dict) else value
    path.mkdir(parents=True, exist_ok=True)
    schema.write(schema.StepProfile.model_validate(content), path / schema.FILE_NAME)
    return str(path)


def run(capsys, *arguments):
    code = cli.estimate_main(list(arguments))
    return code, *capsys.readouterr()


def sweep(tmp_path, points=((1, 2), (2, 2), (4, 2), (1, 8), (2, 8)), **change):
    return [profile(tmp_path / f"run{i}", float(q), k, **change) for i, (q, k) in enumerate(points)]


def test_known_coefficients_are_found(capsys, tmp_path):
    """Ours, and equation 1's, to rounding; the file predicts."""
    out = tmp_path / "c.json"
    code, printed, _ = run(capsys, "fit", *sweep(tmp_path), "--out", str(out), "--json")
    (found,) = json.loads(printed)["fits"]
    assert code == 0 and (found["model"], found["method"], found["gpu"], found["only_share"]) == ("mixtral", "qlora", "A40", None)
    ours = [found[name] for name in ("t0_seconds", "token_seconds", "expert_token_seconds")]
    np.testing.assert_allclose(ours, (T0, U, V), rtol=1e-6)
    one = found["equation_1"]
    assert (one["c0"], one["c1"], one["model_gb"]) == pytest.approx((C0, C1, 3.0), rel=1e-6) and one["rmse_gb"] < 1e-6
    assert max(abs(r["error"]) for r in found["runs"]) < 1e-9
    assert json.loads(out.read_text())["paper"]["A40"]["equation_1"] == one
    np.testing.assert_allclose(coefficients.read(out)[0].coefficients, (T0, U, V), rtol=1e-6)


def test_equation_2_is_found_in_both_forms(capsys, tmp_path):
    """Each form from steps that follow it."""
    for form in ("printed", "fitted"):
        runs = []
        for i, (q, k) in enumerate(((1, 2), (2, 2), (4, 2), (8, 2), (1, 8), (2, 8))):
            share = k / 8
            rate = 0.3 * np.log(q / (share * 1.8)) + 0.9 if form == "printed" else 0.1 * np.log(q ** (1 / (share * 1.8))) + 0.5
            runs.append(profile(tmp_path / form / str(i), float(q), k, seconds=q / rate))
        _, printed, _ = run(capsys, "fit", *runs, "--out", str(tmp_path / "c.json"), "--json")
        found = json.loads(printed)["fits"][0]["equation_2"][form]
        expected = (0.3, 1.8, 0.9) if form == "printed" else (0.1, 1.8, 0.5)
        assert (found["c2"], found["c3"], found["c4"]) == pytest.approx(expected, rel=1e-6)
        assert found["rmse_queries_per_second"] < 1e-9


def test_one_number_of_experts(capsys, tmp_path):
    """Two coefficients then; they predict for that k only."""
    out, points = tmp_path / "c.json", ((1, 2), (2, 2), (4, 2), (8, 2))
    code, printed, _ = run(capsys, "fit", *sweep(tmp_path, points), "--out", str(out))
    assert code == 0 and "one number of experts per token" in printed and "C1 unknown" in printed and f"written: {out}" in printed
    np.testing.assert_allclose(coefficients.read(out)[0].coefficients, (T0, U + V / 4, 0), rtol=1e-6)
    asked = ("predict", "--dataset", "math_14k", "--gpu", "A40", "--coefficients", str(out))
    code, printed, _ = run(capsys, *asked)
    assert code == 0 and "the closed form of this project's step" in printed and "4 runs, jax, 4 points" in printed
    code, _, err = run(capsys, *asked, "--experts-per-token", "8")
    assert code == 2 and "measured at k/E = 0.25 only, and 1 is asked" in err


def test_coefficients_that_should_not_be_trusted(capsys, tmp_path):
    """Runs that no law fits are warned of by `fit`, in JSON too, and again by `predict`; a good fit is not."""
    out = tmp_path / "c.json"
    runs = sweep(tmp_path / "good")
    _, printed, _ = run(capsys, "fit", *runs, "--out", str(out))
    assert "do not trust" not in printed and coefficients.read(out)[0].doubt is None
    disturbed = profile(tmp_path / "disturbed", 2.0, 2, seconds=2 * (T0 + 300 * (U + V / 4)))
    code, printed, err = run(capsys, "fit", *runs, disturbed, "--out", str(out))
    warning = r"WARNING: do not trust these coefficients: they miss their own runs by up to [3-5]\d%"
    assert code == 0 and err == "" and re.search(warning, printed)
    code, printed, err = run(capsys, "fit", *runs, disturbed, "--out", str(out), "--json")
    assert "they miss their own runs" in json.loads(printed)["fits"][0]["doubt"] and err.startswith("warning: A40: do not trust")
    asked = ("predict", "--dataset", "math_14k", "--gpu", "A40", "--coefficients", str(out), "--json")
    assert any("do not trust these coefficients" in note for note in json.loads(run(capsys, *asked)[1])["predictions"][0]["notes"])
    flat = [profile(tmp_path / f"flat{q}", float(q), 2, seconds=1.0) for q in (1, 2, 4)]
    assert "does not grow with the tokens" in run(capsys, "fit", *flat, "--out", str(out))[1]
    few = sweep(tmp_path / "few", ((1, 2), (2, 2), (2, 8)))
    assert "as many runs as coefficients" in run(capsys, "fit", *few, "--out", str(out))[1]


def test_devices_are_fitted_each_on_its_own(capsys, tmp_path):
    runs = sweep(tmp_path / "a") + sweep(tmp_path / "b", device={"name": "NVIDIA H100 80GB HBM3"})
    _, printed, _ = run(capsys, "fit", *runs, "--out", str(tmp_path / "c.json"), "--json")
    assert [f["gpu"] for f in json.loads(printed)["fits"]] == ["A40", "H100"]


def test_without_the_bytes_equation_1_is_unknown(capsys, tmp_path):
    _, printed, _ = run(capsys, "fit", *sweep(tmp_path, arguments=None), "--out", str(tmp_path / "c.json"))
    assert "equation 1: unknown" in printed


@pytest.mark.parametrize(
    ("points", "message"),
    [(((1, 2),), "1 data point for 3 coefficients: 2 missing"), (((1, 2), (1, 8)), "2 data points for 3 coefficients: 1 missing"),
     (((1, 2), (1, 2), (1, 2)), "1 data point for 3 coefficients: 2 missing")],
)  # fmt: skip
def test_too_few_points(capsys, tmp_path, points, message):
    code, out, err = run(capsys, "fit", *sweep(tmp_path, points), "--out", str(tmp_path / "c.json"))
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1 and not (tmp_path / "c.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"model": {"name": "other"}}, "different model"), ({"method": "lora"}, "different method"), ({"framework": "pytorch"}, "framework"),
     ({"moe": {"experts": 4}}, "different experts"), ({"precision": "float32"}, "different precision"), ({"remat": "none"}, "remat")],
)  # fmt: skip
def test_runs_of_different_models(capsys, tmp_path, change, message):
    runs = [*sweep(tmp_path), profile(tmp_path / "other", 3.0, **change)]
    code, out, err = run(capsys, "fit", *runs, "--out", str(tmp_path / "c.json"))
    assert (code, out) == (2, "") and message in err and str(tmp_path / "other") in err and err.count("\n") == 1


def test_runs_that_say_too_little(capsys, tmp_path):
    (tmp_path / "plain").mkdir()
    empty = profile(tmp_path / "empty", 2.0, step_seconds={"median": None, "n": 0})
    for path, message in ((str(tmp_path / "plain"), "moejax profile CONFIG"), (empty, "step_seconds.median is null or 0")):
        code, _, err = run(capsys, "fit", *sweep(tmp_path), path, "--out", str(tmp_path / "c.json"))
        assert code == 2 and message in err and path in err and err.count("\n") == 1
    code, _, err = run(capsys, "fit", *sweep(tmp_path), "--out", str(tmp_path / "no" / "c.json"))
    assert code == 2 and "No such file" in err


TOLD = {"compiler_peak_bytes": 90, "gpu": "A40", "model": "mixtral", "method": "qlora", "share": 0.25, "time": None,
        "why_no_time": "nobody fitted", "disturbed_steps": [1, 4]}  # fmt: skip


def finished(folder, told=TOLD, **change):
    """A run's folder: steps of 1000 tokens that take 2 s, the disturbed ones 50 s."""
    folder.mkdir(parents=True, exist_ok=True)
    steps = [
        {"step": n, "step_seconds": 50.0 if n in (1, 4) else 2.0, "padded_tokens": 1000, "device_peak_bytes": 100} | change
        for n in range(1, 6)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(s) + "\n" for s in [{"step": 0, "eval_loss": 1.0}, *steps]))
    if told is not None:
        (folder / "prediction.json").write_text(json.dumps(told))
    return str(folder)


def test_compare(capsys, tmp_path):
    """Errors in memory and time, kept in the run's folder; disturbed steps are left out."""
    entry = coefficients.Entry("mixtral", "qlora", "A40", np.array([1.0, 1e-4, 2.8e-3]), np.zeros((0, 3)), np.zeros(0), "test", 3)
    told = TOLD | {"time": comparison.time_prediction(entry, 0.25)}
    folder = finished(tmp_path / "run", told)
    code, out, _ = run(capsys, "compare", folder)
    assert code == 0 and "memory: predicted 90 bytes, measured 100 bytes: -10.0 %" in out
    assert "step: predicted 1800.0 ms, measured 2000.0 ms: -10.0 %" in out
    kept = json.loads((tmp_path / "run" / "comparison.json").read_text())
    assert kept["steps"] == 3 and kept["step_seconds"]["error"] == pytest.approx(-0.1)
    assert kept["memory"]["error"] == pytest.approx(-0.1)


@pytest.mark.parametrize(
    ("change", "message"),
    [({"share": None}, "share = null: expected k/E"), ({"share": "é"}, "share = "), ({"samples": [["é"] * 3]}, "could not convert"),
     ({"samples": [[1e300, 0, 0]]}, "samples: expected a list of numbers below 1e+18"), ({"scatter": 2.5}, "scatter: expected a list")],
)  # fmt: skip
def test_a_damaged_prediction_of_time(capsys, tmp_path, change, message):
    entry = coefficients.Entry("mixtral", "qlora", "A40", np.array([1.0, 1e-4, 2.8e-3]), np.ones((2, 3)), np.zeros(2), "test", 3)
    folder = finished(tmp_path / "run", TOLD | {"time": comparison.time_prediction(entry, 0.25) | change})
    code, out, err = run(capsys, "compare", folder)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1


def test_compare_with_other_coefficients(capsys, tmp_path):
    out = tmp_path / "c.json"
    run(capsys, "fit", *sweep(tmp_path), "--out", str(out))
    folder = finished(tmp_path / "run")
    assert "step: not predicted (nobody fitted), measured 2000.0 ms" in run(capsys, "compare", folder)[1]
    code, printed, _ = run(capsys, "compare", folder, "--coefficients", str(out), "--json")
    predicted = json.loads(printed)[folder]["step_seconds"]["predicted"]
    assert code == 0 and predicted == pytest.approx(T0 + 1000 * (U + V / 4))
    other = finished(tmp_path / "other", TOLD | {"gpu": "H100"})
    code, _, err = run(capsys, "compare", other, "--coefficients", str(out))
    assert code == 2 and "has none of mixtral by qlora on H100" in err


def test_on_a_cpu_memory_is_not_compared(capsys, tmp_path):
    folder = tmp_path / "run"
    finished(folder)
    text = (folder / "metrics.jsonl").read_text().replace("device_peak", "host_peak")
    (folder / "metrics.jsonl").write_text(text)
    assert "not comparable: a CPU's allocator" in run(capsys, "compare", str(folder))[1]


@pytest.mark.parametrize(
    ("told", "steps", "message"),
    [(None, None, "holds no prediction.json"), (TOLD, "", "has 0 steps"), (TOLD, "{", "line 1: no whole JSON"),
     ({"gpu": "A40"}, None, "lacks compiler_peak_bytes, model"), (TOLD | {"disturbed_steps": [1, 2, 3, 4, 5]}, None, "train longer")],
)  # fmt: skip
def test_runs_that_cannot_be_compared(capsys, tmp_path, told, steps, message):
    folder = finished(tmp_path / "run", told)
    if steps is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(steps)
    code, out, err = run(capsys, "compare", folder)
    assert (code, out) == (2, "") and message in err and err.count("\n") == 1
    assert "does not exist" in run(capsys, "compare", str(tmp_path / "nowhere"))[2]

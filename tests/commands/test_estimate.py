"""The command line: what is printed, exit codes, and nothing heavy before it is needed."""

import dataclasses
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from moejax import cli, device
from moejax.estimator import coefficients

ROOT = Path(__file__).parent.parent.parent


def run(capsys, *arguments):
    code = cli.estimate_main(list(arguments))
    out, err = capsys.readouterr()
    return code, out, err


STUDY = ("--tool", "study")
PREDICT = ("predict", *STUDY, "--dataset", "math_14k", "--gpu", "A40,H100")


def test_predict(capsys):
    code, out, _ = run(capsys, *PREDICT, "--prices", "study")
    assert code == 0 and "2.10 USD/h, CUDO, 2024" in out and "0.79 USD/h, CUDO, 2024" in out and "95 %" in out
    assert "USD/h that sellers ask" not in out  # the study read one seller's
    assert "USD/h that sellers ask: H100 3.85 to 12.29" in run(capsys, *PREDICT)[1]


def test_predict_json(capsys):
    code, out, _ = run(capsys, *PREDICT, "--json")
    found = json.loads(out)
    assert code == 0 and [p["gpu"] for p in found["predictions"]] == ["A40", "H100"] and found["job"]["queries"] == 14000
    assert found["predictions"][1]["price"]["day"].startswith("2026") and found["predictions"][0]["price"]["seller"] == "RunPod"


def test_predict_takes_records_or_a_file(capsys, tmp_path):
    (tmp_path / "lengths.txt").write_text("100\n" * 500)
    by = {}
    for name, data in (("file", ("--lengths", str(tmp_path / "lengths.txt"))), ("records", ("--records", "500", "--length", "100"))):
        code, out, _ = run(capsys, "predict", *STUDY, *data, "--gpu", "H100", "--epochs", "1", "--batch", "4", "--json")
        assert code == 0
        by[name] = json.loads(out)["predictions"][0]["hours"]
    assert by["file"] == by["records"] > 0
    code, out, _ = run(capsys, "predict", *STUDY, "--dataset", "gsm8k", "--gpu", "H100")
    assert code == 0 and "no padding is seen" in out


def test_whose_memory_limits_the_batch(capsys):
    fits = {}
    for memory in ("equation-1", "closed-form"):
        code, out, _ = run(capsys, *PREDICT, "--memory", memory, "--json")
        assert code == 0
        fits[memory] = [p["fits"] for p in json.loads(out)["predictions"]]
    ours, theirs = fits["closed-form"], fits["equation-1"]
    assert theirs == [4, 17] and all(more > fewer for more, fewer in zip(ours, theirs, strict=True))


def test_plan(capsys, tmp_path):
    code, out, _ = run(capsys, "plan", *STUDY, "--dataset", "math_14k", "--budget", "30", "--deadline", "12", "--plot", str(tmp_path))
    assert code == 0 and (tmp_path / "plan.png").exists()
    assert "cheapest: RTX-PRO-6000" in out and "fastest under 30 USD: " in out and "cheapest within 12 h: " in out and "2026-11-09" in out
    assert "4.8 GB more than the A10G's 24 GB" in out and "left out: V100-32 has no bf16" in out
    assert out.count("holds 28.1 GB before any activation") == 1, "what is the same of several cards is said once"
    assert "no price known" not in out  # of what does not fit no price is reported
    code, out, _ = run(capsys, "predict", *STUDY, "--dataset", "math_14k", "--gpu", "A6000,H100", "--prices", "study")
    assert code == 0 and "no price known in study: A6000 (--prices 2026 has one); --prices FILE brings your own" in out
    code, out, _ = run(capsys, "plan", *STUDY, "--dataset", "math_14k", "--gpu", "A100-80,H100", "--budget", "0.5", "--deadline", "0.5")
    assert "fastest under 0.5 USD: none; the cheapest needs 25.55 USD" in out and "A100-80, batch 17" in out
    assert "cheapest within 0.5 h: none; the fastest needs 8." in out and "H100, batch 17" in out
    code, out, _ = run(capsys, "plan", *STUDY, "--dataset", "math_14k", "--budget", "0.5", "--json")
    assert code == 0 and json.loads(out)["answers"]["fastest under 0.5 USD"] is None


def test_the_first_line_says_whose_software(capsys, tmp_path):
    for command in (PREDICT, ("plan", *STUDY, "--dataset", "math_14k")):
        _, out, _ = run(capsys, *command)
        assert out.startswith("Times are those of PyTorch in 2024 as the study measured them on its GPUs, not this project's")
    file = tmp_path / "c.json"
    for framework, named in (("jax", "this project (JAX)"), ("pytorch", "PyTorch"), (None, "software that the file does not name")):
        coefficients.write(file, [dataclasses.replace(e, framework=framework) for e in coefficients.study()])
        _, out, _ = run(capsys, *PREDICT, "--coefficients", str(file))
        assert out.splitlines()[0] == f"Times are those of {named}, as fitted in {file}"
        assert f"in steps of {16 if framework == 'jax' else 8} tokens (--pad-multiple)" in out


def test_a_few_lengths_stand_for_many_records(capsys, tmp_path):
    """Five lengths for 10,000 records: a batch is not limited to five."""
    file = tmp_path / "lengths.txt"
    file.write_text("100\n" * 4 + "300\n")
    asked = ("predict", *STUDY, "--lengths", str(file), "--gpu", "A100-80", "--json")
    assert json.loads(run(capsys, *asked)[1])["predictions"][0]["batch"] <= 5
    code, out, _ = run(capsys, *asked, "--records", "10000")
    assert code == 0 and json.loads(out)["predictions"][0]["batch"] > 5 and json.loads(out)["job"]["mean_tokens"] == 140


def test_numbers_as_people_write_them(capsys):
    short = ("predict", *STUDY, "--records", "3", "--length", "8", "--gpu", "A100-80", "--epochs", "1")
    row = next(line for line in run(capsys, *short)[1].splitlines() if line.startswith("│ A100"))
    assert "│ 0.00" in row and not re.search(r"│ 0\.0+ ", row)  # two digits of a small number, never 0.00
    _, out, _ = run(capsys, "plan", *STUDY, "--dataset", "math_14k", "--gpu", "A100-80", "--budget", "1000000", "--experts-per-token", "1")
    assert "fastest under 1,000,000 USD: A100-80" in out and "1 expert a token" in out


def test_a_gpu_that_does_not_do_is_gone_past(capsys):
    code, out, _ = run(capsys, "predict", *STUDY, "--dataset", "math_14k", "--gpu", "L4,H100,T4")
    assert code == 0 and "H100" in out and "left out: T4 has no bf16" in out and "4.8 GB more than the L4's 24 GB; " in out
    code, out, _ = run(capsys, "predict", *STUDY, "--dataset", "math_14k", "--gpu", "L4,H100,T4", "--json")
    found = json.loads(out)
    assert [p["gpu"] for p in found["predictions"]] == ["H100"] and found["left_out"].keys() == {"L4", "T4"}
    assert found["software"].startswith("Times are those of PyTorch") and found["job"]["cut_tokens"] == 1024


def test_a_tail_of_long_queries_costs(capsys, tmp_path):
    """A tenth of 8,000 tokens: not the price of 1,024."""
    file, usd = tmp_path / "lengths.txt", {}
    for long in (1024, 8000):
        file.write_text("200\n" * 90 + f"{long}\n" * 10)
        code, out, _ = run(capsys, "plan", *STUDY, "--lengths", str(file), "--gpu", "A100-80", "--epochs", "1", "--json")
        (option,) = json.loads(out)["options"]
        usd[long] = option["usd"]
        assert code == 0 and any("extrapolated" in note for note in option["notes"]) == (long == 8000)
    assert usd[8000] > 3 * usd[1024]
    _, out, _ = run(capsys, "plan", *STUDY, "--lengths", str(file), "--gpu", "A100-80", "--seq-len", "1024")
    assert "10 of 100 queries are longer than 1,024 tokens and cut there (--seq-len)" in out
    assert "as in the study, because nothing else was said: 10 epochs (--epochs), qlora (--method), 2 experts a token" in out
    assert "x 1 epoch (" in run(capsys, "plan", *STUDY, "--lengths", str(file), "--gpu", "A100-80", "--epochs", "1")[1]


def test_this_machine(capsys, tmp_path, monkeypatch):
    """A CPU has no times by the study; with coefficients of its own it is predicted for, in its own memory."""
    code, out, err = run(capsys, *PREDICT[:5], "--gpu", "here")
    assert code == 2 and out == "" and "--gpu here: this machine has a CPU only" in err and "--coefficients FILE" in err
    file, name = tmp_path / "c.json", device.this_machine(0.9).name
    entry = dataclasses.replace(coefficients.study()[0], gpu=name, framework="jax", coefficients=np.array([9.0, 1.0, 1.0]))
    coefficients.write(file, [entry])
    for gb, batch in ((200, 1), (20, None)):
        monkeypatch.setattr(device, "usable_bytes", lambda gb=gb: gb * 10**9)
        code, out, err = run(capsys, *PREDICT[:5], "--gpu", "here,here", "--coefficients", str(file), "--epochs", "1", "--json")
        if batch:
            (p,) = json.loads(out)["predictions"]
            assert code == 0 and p["gpu"] == name and p["measured"] and p["fits"] > 1 and p["usd"] is None and p["hours"] > 14000 / 3600
        else:
            assert code == 2 and "GB more than the 20.00 GB usable on" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("predict", *STUDY, "--dataset", "math_14k", "--gpu", "H1000"), "did you mean H100"),
     (("predict", *STUDY, "--dataset", "math_14k", "--gpu", ""), "--gpu '': expected names of GPUs"),
     (("plan", *STUDY, "--dataset", "math_14k", "--gpu", ","), "--gpu ',': expected names of GPUs"),
     (("predict", *STUDY, "--dataset", "math", "--gpu", "H100"), "expected one of commonsense_15k, math_14k"),
     (("predict", *STUDY, "--gpu", "H100"), "which data?"),
     (("predict", *STUDY, "--gpu", "H100", "--dataset", "math_14k", "--length", "4"), "(--dataset and --length were given)"),
     (("predict", *STUDY, "--gpu", "H100", "--length", "100"), "--length needs --records"),
     (("predict", *STUDY, "--gpu", "H100", "--records", "-5", "--length", "100"), "--records -5"),
     (("predict", *STUDY, "--gpu", "H100", "--records", "5", "--length", "0"), "--length 0"),
     ((*PREDICT, "--batch", "-1"), "batch = -1"), ((*PREDICT, "--epochs", "0"), "epochs = 0"),
     ((*PREDICT, "--experts-per-token", "12"), "expected 1 to 8"), ((*PREDICT, "--model", "llama"), "--model llama"),
     ((*PREDICT, "--method", "dora"), "--method dora"), ((*PREDICT, "--method", "full"), "no coefficients for mixtral by full"),
     ((*PREDICT, "--batching", "rows"), "batching 'rows'"), ((*PREDICT, "--batching", "fixed"), "--batching fixed: how many tokens"),
     ((*PREDICT, "--prices", "nowhere.csv"), "nowhere.csv does not exist"), ((*PREDICT, "--coefficients", "nowhere.json"), "No such file"),
     ((*PREDICT, "--spot"), "no spot price"), (("predict", *STUDY, "--dataset", "math_14k", "--gpu", "L4"), "4.8 GB more than the L4's"),
     (("plan", *STUDY, "--dataset", "math_14k", "--deadline", "-1"), "deadline = -1"),
     (("plan", *STUDY, "--dataset", "math_14k", "--gpu", "A10G"), "4.8 GB more than the A10G's")],
)  # fmt: skip
def test_mistakes_are_one_message(capsys, arguments, message):
    code, out, err = run(capsys, *arguments)
    assert code == 2 and out == ""
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


def test_moejax_estimate_is_the_same(capsys):
    assert cli.main(["estimate", *PREDICT, "--json"]) == 0
    one = capsys.readouterr().out
    assert cli.estimate_main([*PREDICT, "--json"]) == 0
    assert capsys.readouterr().out == one


@pytest.mark.parametrize("arguments", [("--help",), PREDICT])
def test_nothing_heavy_is_imported(arguments):
    """What would cost the 0.6 s that `--help` and `predict` may take."""
    program = (
        "import sys\nfrom moejax import cli\n"
        f"try:\n    cli.estimate_main({list(arguments)!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'scipy', 'matplotlib', 'jax', 'flax', 'pydantic', 'transformers', 'pandas', 'yaml'} & set(sys.modules)\n"
        f"sys.exit(str(heavy | ({{'numpy'}} & set(sys.modules) if {arguments == ('--help',)} else set())) if heavy else 0)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def test_the_script(tmp_path):
    command = [sys.executable, str(ROOT / "estimate.py"), "predict", *STUDY, "--dataset", "math_14k", "--gpu", "V999"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.startswith("error: unknown GPU 'V999'")


def test_changes_without_a_config_and_tools(capsys):
    """What options describe takes key.sub=value too; another tool's version must be one."""
    given = ("predict", "--model", "olmoe-1b-7b", "--records", "800", "--length", "190", "--batch", "2", "--gpu", "A40", "--json")
    seconds = {}
    for changes in ((), ("training.gradient_accumulation=4",), ("training.gradient_accumulation=4", "placement.experts=host")):
        code, out, _ = run(capsys, *given, *changes)
        (found,) = json.loads(out)["predictions"]
        seconds[len(changes)] = found["step_seconds"], found["peak_gb"], json.loads(out)["job"]["accumulation"]
        assert code == 0 and found["step_seconds_interval"][0] < found["step_seconds"] < found["step_seconds_interval"][1]
    assert seconds[1][0] == pytest.approx(4 * seconds[0][0]) and seconds[1][2] == 4 and seconds[2][1] < seconds[1][1]
    for more, message in (
        (("--tool-version", "0.49"), "--tool-version: of another tool"),
        (("--tool", "e4b", "--tool-version", "new"), "--tool-version new: expected a number"),
        (("--tool", "unsloth", "--coefficients", "x.json"), "which --tool unsloth has not"),
        (("--receipts", "nowhere"), "--receipts nowhere does not exist"),
        (("--model", "nothing"), "--model nothing: expected one of mixtral-8x7b"),
    ):
        code, _, err = run(capsys, *given, *more)
        assert code == 2 and message in err


def test_plan_of_a_config(capsys):
    config = str(ROOT / "configs/mixtral_8x7b.yaml")
    code, out, _ = run(capsys, "plan", config, "--gpu", "RTX-4090,H100", "training.gradient_accumulation=4")
    assert code == 0 and "mixtral_8x7b on RTX-4090: 4 rows of 2048 tokens a step" in out and "placement.experts=host would fit" in out
    assert f"first: moejax train {config} placement.experts=16 data" in " ".join(out.split()) and f"first: moejax train {config}" in out
    assert "16 of 32 layers on the device" in " ".join(out.split())
    assert "fastest first\n" in out
    of_qwen3 = str(ROOT / "configs/qwen3_30b_a3b_24gb.yaml")
    out = run(capsys, "plan", of_qwen3, "--gpu", "RTX-3090", "adapter.rank=16")[1]
    assert "fastest first, lower ranks last: they train another adapter" in out
    code, out, _ = run(capsys, "plan", config, "--gpu", "RTX-4090", "--seq-len", "1024", "--json")
    found = json.loads(out)
    ways = found["gpus"]["RTX-4090"]
    assert found["row_tokens"] == 1024 and ways[0]["changes"]["placement.experts"] == 24 and ways[0]["refused"] is None
    (host,) = (way for way in ways if way["changes"] == {"placement.experts": "host"})
    assert host["bus_seconds"] > 1 and host["host_gb"] > 20 and host["refused"] is None and ways[-1]["refused"]
    for arguments, message in (
        ((config,), "Without the data: --records N --length TOKENS"),
        ((config, "--gpu", "H100", "--records", "9", "--length", "9", "--memory", "equation-1"), "--memory takes no CONFIG"),
        ((config, "--gpu", "H100", "--seq-len", "100000000"), "rows of 100000000 tokens exceed the model's max_position_embeddings"),
        ((config, "--gpu", "T4"), "T4 has no bf16, which the training section asks for"),
        ((config, "--gpu", "RTX-9999"), "unknown GPU 'RTX-9999'"),
        ((config, "--gpu", "here"), "this machine has a CPU only"),
    ):
        code, _, err = run(capsys, "plan", *arguments)
        assert code == 2 and message in err


def test_several_cards(capsys):
    """This program's time is shared, what goes between the cards is added, and each card is paid."""
    asked = ("predict", "--model", "mixtral-8x7b", "--records", "1000", "--length", "256", "--batching", "fixed", "--batch", "8", "--json")
    asked += ("--gpu", "H100")
    code, out, _ = run(capsys, *asked, "--devices", "1,2")
    one, two = json.loads(out)["predictions"]
    assert code == 0 and (one["devices"], two["devices"]) == (1, 2) and two["link"] == "NVLink 4"
    assert two["link_seconds"] == pytest.approx(two["link_bytes"] / 360e9) and two["step_seconds"] < one["step_seconds"]
    assert two["usd"] == pytest.approx(2 * two["price"]["usd_per_hour"] * two["hours"])
    code, out, _ = run(capsys, *asked, "--devices", "2", "--overlap", "1", "--weights", "spread", "--link", "10")
    (hidden,) = json.loads(out)["predictions"]
    assert hidden["link_seconds"] == 0 and hidden["link"] == "10 GB/s" and hidden["link_bytes"] > 20e9
    for more, message in ((("--devices", "x"), "--devices 'x'"), (("--devices", "3"), "do not divide among 3 devices"),
                          (("--devices", "2", "--overlap", "2"), "--overlap 2"), (("--link", "0"), "--link 0"),
                          (("--devices", "2", "--tool", "unsloth"), "what --tool unsloth does on several cards")):  # fmt: skip
        code, _, err = run(capsys, *asked, *more)
        assert code == 2 and message in err


def test_a_query_is_whole_in_a_packed_row(capsys):
    """Of 400 tokens one fits a row of 512: 100 rows, by lengths alone as by the data."""
    rows = ("data.row_tokens=512", "data.max_length=512", "data.batch_rows=4", "training.gradient_accumulation=1", "training.epochs=1")
    asked = ("predict", str(ROOT / "configs/olmoe_1b_7b.yaml"), "--records", "100", "--length", "400", "--gpu", "H100", *rows)
    assert "25 steps" in run(capsys, *asked, "training.steps=null", "training.warmup_steps=0")[1]


ONE_RUN = "--records", "90", "--length", "90", "--batch", "2"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(("--pad-multiple", "8"), "--pad-multiple 8: only with --tool study"),
     (("configs/demo.yaml", "--pad-multiple", "8"), "--pad-multiple 8: only with --tool study"),
     (("configs/demo.yaml", "--model", "olmoe-1b-7b", "--method", "full"), "--model (model.source, model.preset), --method (adapter"),
     (("configs/demo.yaml", "--seq-len", "64"), "--seq-len 64: configs/demo.yaml says it: data.max_length and data.row_tokens"),
     (("configs/demo.yaml", "--experts-per-token", "400"), "--experts-per-token 400: experts_per_token = 400 exceeds")],
)  # fmt: skip
def test_no_option_is_ignored(capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(ROOT)
    code, out, err = run(capsys, "predict", *arguments, "--gpu", "H100", *ONE_RUN)
    assert code == 2 and not out and message in err and "Traceback" not in err


def test_small_figures_have_small_units_and_a_card_without_a_price_is_named(capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    code, out, _ = run(capsys, "predict", "configs/demo.yaml", "--gpu", "H100,RTX-4060", *ONE_RUN)
    out = " ".join(out.split())
    assert code == 0 and "MB of 84.9 GB" in out and "nothing to download" in out
    assert "no price known in 2026: RTX-4060; --prices FILE brings your own" in out
    out = " ".join(run(capsys, "predict", "--model", "olmoe-1b-7b", "--gpu", "H100", *ONE_RUN)[1].split())
    assert "a download of 13.84 GB (2 min at 1 Gbit/s)" in out

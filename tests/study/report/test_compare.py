"""`moejax compare`: reading runs, the table, the test problem by problem, the figure."""

import json
from pathlib import Path

import pytest
from support import ROOT, tiny_experiments

from moejax import cli, config
from moejax.evaluation.answers import wilson_interval
from moejax.evaluation.recorded import open_scored
from moejax.study.report import accuracy
from moejax.study.report.accuracy import best_step, reached_step, sign_test


@pytest.fixture
def make_run(tmp_path):
    """make_run(name, verdicts by step, k of 8 experts) -> the folder that such a run would leave."""
    make = tiny_experiments(tmp_path)

    def write(name, verdicts, k=2, **asked):
        settings = {"task": "problems", "data": "test.json", "each_epoch": True} | asked
        experiment = make(name, eval=settings)
        folder = tmp_path / "runs" / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config.dump(experiment))
        counts = {"real_tokens": 5, "expert_counts": [[5] * k + [0] * (8 - k)]}
        lines = [{"step": s, "loss": 1.0, "step_seconds": 0.1 * s} | counts for s in (1, 2, 3)]
        for step, right in verdicts.items():
            n = len(right)
            low, high = wilson_interval(sum(right), n)
            lines.append(
                {
                    "step": step, "eval/epoch": step / 2, "eval/accuracy": sum(right) / n, "eval/accuracy_low": low,
                    "eval/accuracy_high": high, "eval/loss": 1 / (1 + step), "eval/problems": n, "eval/seconds": 1.0,
                }
            )  # fmt: skip
            (folder / f"eval/step-{step}").mkdir(parents=True)
            # Written as evaluate.write does, with a separator of Unicode's in an answer.
            answers = [{"prompt": f"{i}?", "output": "a\x85b\u2028c", "expected": "1", "correct": r} for i, r in enumerate(right)]
            lines_ = "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers)
            (folder / f"eval/step-{step}/predictions.jsonl").write_text(lines_, encoding="utf-8")
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return str(folder)

    return write


def right(count, of=100, start=0):
    return [start <= i < start + count for i in range(of)]


@pytest.fixture
def two(make_run):
    sparse = make_run("sparse", {0: right(2), 2: right(80), 4: right(78)})
    dense = make_run("dense", {0: right(1), 2: right(90), 4: right(90, start=5)}, k=8)
    return sparse, dense


def test_the_table(two, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "160")  # a narrow terminal breaks the lines that are looked for
    assert cli.main(["compare", *two]) == 0
    out = capsys.readouterr().out
    assert "sparse, 2 of 8 experts" in out and "dense, 8 of 8 experts" in out
    rows = {line.split("│")[1].strip(): [c.strip() for c in line.split("│")[2:4]] for line in out.splitlines() if line.startswith("│")}
    assert rows["1"][0].startswith("80.0 % (71.1 to 86.7)")
    assert rows["best"] == ["80.0 %, epoch 1", "90.0 %, epoch 1"]
    assert rows["loss, lowest"] == ["0.2000, epoch 2", "0.2000, epoch 2"]
    assert rows["median step"] == ["200.0 ms", "200.0 ms"]
    # The last: 0 to 77 right in the one, 5 to 94 in the other.
    assert "5 right in the first alone, 17 in the second alone (p = 0.017" in out
    assert "Mixtral-8x7B, HellaSwag" in out and "85.0 %, epoch 1" in out


def test_best_and_first_in_its_interval(make_run):
    run = open_scored(Path(make_run("one", {0: right(10), 2: right(75), 4: right(80), 6: right(80)})))
    assert run.kind == "sparse" and (run.top_k, run.experts) == (2, 8)
    assert best_step(run) == 4 and reached_step(run) == 2  # 80 of 100: 71.1 to 86.7


def test_sign_test():
    """Against binomial sums by hand: 2 · (1 + 10 + 45) / 1024 of 2 and 8; even splits and none at all say nothing."""
    assert sign_test(2, 8) == sign_test(8, 2) == pytest.approx(2 * 56 / 1024)
    assert sign_test(5, 5) == 1 and sign_test(0, 0) == 1
    assert sign_test(0, 1) == 1


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_figure(two, suffix, tmp_path):
    path = tmp_path / f"figure{suffix}"
    assert cli.main(["compare", *two, "--plot", str(path)]) == 0
    content = path.read_bytes()
    assert len(content) > 10_000 and content.startswith(b"\x89PNG" if suffix == ".png" else b"<?xml")


def test_colours_go_by_kind(two, monkeypatch, tmp_path):
    """Blue is sparse and orange dense, ours and the study's, in whatever order the runs are named."""
    seen = []
    monkeypatch.setattr(accuracy, "save_figure", lambda figure, *a, **k: seen.append(figure))
    accuracy.draw([open_scored(Path(f)) for f in reversed(two)], tmp_path / "x.png")
    panels = seen[0].axes
    assert [panel.get_title() for panel in panels][1:] == ["the study's Figure 3: HellaSwag", "the study's Figure 3: GSM8K"]
    lines = [line for panel in panels for line in panel.get_lines()]
    assert len(lines) == 2 + 4 + 4
    for line in lines:
        assert line.get_color() == accuracy.COLORS["dense" if "dense" in line.get_label() else "sparse"]
    assert list(panels[1].get_lines()[0].get_ydata()[:2]) == [12.0, 76.0]


def test_mistakes(two, make_run, tmp_path, capsys):
    def said(*arguments):
        assert cli.main(["compare", *arguments]) == 2
        return capsys.readouterr().err

    assert "is not a run" in said(str(tmp_path / "nowhere"))
    other = make_run("other", {0: right(1)}, task="gsm8k")
    assert "has eval.task = problems" in said(two[0], other) and "cannot be compared" in said(two[0], other)
    changed = make_run("changed", {0: right(1), 4: right(3, of=50)})
    assert "asked other problems: has test.json changed" in said(two[0], changed)
    assert "expected a file that ends in .png" in said(*two, "--plot", str(tmp_path / "x.gif"))
    assert "there is no folder" in said(*two, "--plot", str(tmp_path / "no/x.png"))
    assert "not even the untrained model" in said(make_run("begun", {}))
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "config.yaml").write_text(config.dump(tiny_experiments(tmp_path)("plain")))
    assert "its config has no eval: section" in said(str(plain))


def test_the_demo_differs_from_demo_yaml_only_where_it_says():
    """No rate, seed or adapter was chosen by the result: they are the demo's."""
    demo, ours = (config.load(ROOT / f"configs/{name}.yaml").model_dump(mode="json") for name in ("demo", "demo_sparse_vs_dense"))
    different = {
        f"{key}.{sub}" if isinstance(value, dict) else key
        for key, value in demo.items()
        for sub in (value if isinstance(value, dict) else [None])
        if (value if sub is None else value[sub]) != (ours[key] if sub is None else ours[key][sub])
    }
    assert different == {"name", "eval", "training.epochs", "training.eval_every", "checkpoint.every"}

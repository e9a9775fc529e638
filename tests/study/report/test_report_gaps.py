"""Sweeps that are not whole, settings that do not fit, and folders that are none."""

import json
import re
from dataclasses import replace

import made
import pages
import pytest
from support import EXPERIMENTS
from test_report import shown

from moejax import cli
from moejax.study.report import compare, document, results
from moejax.study.report import page as page_model
from moejax.study.report.results import Trial


def written(tmp_path, study, capsys):
    """The page of a study and what was printed."""
    results.write(study, tmp_path / "study")
    assert cli.main(["report", str(tmp_path / "study")]) == 0
    capsys.readouterr()
    return pages.read(tmp_path / "study" / "report.html"), (tmp_path / "study" / "report.html").read_text()


def section(content, name):
    return re.search(rf'<section id="{name}".*?</section>', content, flags=re.S)[0]


def test_an_unfinished_sweep_says_what_is_missing(tmp_path, capsys):
    study = made.study(finished=False)
    trials = dict(study.trials)
    trials["length-mixtral-made-dense-512"] = Trial("pending", None, None, "run this")
    trials["stages-mixtral-made-sparse-8"] = Trial("failed", 3.0, "ValueError: <script>alert(1)</script>", "run that")
    trials["throughput-mixtral-made-sparse-cs-8"] = Trial("out_of_memory", 2.0, "RESOURCE_EXHAUSTED: 49 GB", "run it")
    del trials["cost-mixtral-made-cs"]  # planned, and not there
    rows = [r for r in study.rows if trials.get(r.trial, Trial("pending", None, None, "")).status == "done"]
    page, content = written(tmp_path, replace(study, trials=trials, rows=rows), capsys)
    head = content[: content.index("<nav")]
    assert "This sweep is not finished: of 136 trials 2 have not run, 1 failed, 1 out of memory" in re.sub("<[^>]*>", "", head)
    assert "moejax characterize --preset made-up" in head
    told = section(content, "environment")
    assert "<script>" not in content and "&lt;script&gt;alert(1)" in told and "RESOURCE_EXHAUSTED: 49 GB" in told
    assert "planned, and not among the trials" in told
    listed = re.findall(r"<code>([^<]*-made-[^<]*)</code>", told)
    assert sorted(listed) == sorted([*(n for n, t in trials.items() if t.status != "done"), "cost-mixtral-made-cs"])
    assert "132 of 136 trials gave a result" in page.text


def test_a_trial_without_result_is_told_in_a_finished_sweep_too(tmp_path, capsys):
    study = made.study()
    name = "length-mixtral-made-dense-512"
    trials = study.trials | {name: Trial("out_of_memory", 1.0, "too large", "run it")}
    rows = [r for r in study.rows if r.trial != name]
    _, content = written(tmp_path, replace(study, trials=trials, rows=rows), capsys)
    assert "Not every trial has a result: of 136 trials 1 out of memory" in re.sub("<[^>]*>", "", content)
    assert "To go on" not in content


def test_nothing_has_run_yet(tmp_path, capsys):
    study = made.study(finished=False)
    trials = {k: Trial("pending", None, None, t.command) for k, t in study.trials.items()}
    page, content = written(tmp_path, replace(study, trials=trials, rows=[]), capsys)
    assert page.text.count("Nothing was measured: its trials have no result, or none was planned.") == len(EXPERIMENTS)
    assert not page.cells and "0 of 136 trials gave a result" in content


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_any_experiment_may_be_missing_or_alone(experiment, tmp_path, capsys):
    study = made.study(largest={"sparse": 2})
    alone = [r for r in study.rows if r.experiment == experiment]
    page, _ = written(tmp_path, replace(study, rows=alone), capsys)
    assert {c.place for c in page.cells if c.source == "ours"} == set(shown([tmp_path / "study"]))
    assert len(page.ids) == len(set(page.ids))
    results.write(replace(study, rows=[r for r in study.rows if r not in alone]), tmp_path / "without")
    report = document.build(compare.load([tmp_path / "without"]))
    assert {n.place for n in page_model.numbers(report) if n.place} == set(shown([tmp_path / "without"]))


@pytest.fixture
def folder(tmp_path):
    results.write(made.study(), tmp_path / "study")
    return tmp_path / "study"


def change(folder, file, **values):
    content = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps(content | values))


def older(folder):
    change(folder, "characterize.json", schema_version=0)


def cut(folder):
    whole = (folder / "characterize.json").read_text()
    (folder / "characterize.json").write_text(whole[: len(whole) // 2])


def of_another_moment(folder):
    """Results of a later moment next to the plan of an earlier: killed between two renames."""
    before = (folder / "characterize.json").read_text()
    study = made.study()
    results.write(replace(study, rows=study.rows[:-1]), folder)
    (folder / "characterize.json").write_text(before)


def at_odds(folder):
    lines = (folder / "results.csv").read_text().splitlines()
    (folder / "results.csv").write_text("\n".join(lines[:-1]) + "\n")


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (older, "schema_version = 0, this moejax reads version 1"),
        (cut, "was it cut off"),
        (at_odds, "hold different rows"),
        (of_another_moment, "was written with other rows than those of results.json"),
        (lambda f: (f / "characterize.json").unlink(), "does not exist: expected what `moejax characterize"),
        (lambda f: f.rename(f.with_name("elsewhere")), "expected a folder that `moejax characterize --out` wrote"),
    ],
)
def test_what_is_no_whole_folder_of_results(spoil, said, folder, capsys):
    spoil(folder)
    assert cli.main(["report", str(folder)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and str(folder) in error and error.count("\n") == 1
    assert not list(folder.parent.rglob("report*"))


def test_arguments_that_cannot_be(folder, tmp_path, capsys):
    for arguments, said in (
        ([folder, folder], "a folder is given twice"),
        ([folder, "--out", "page.pdf"], "--out page.pdf: expected a file's name that ends in .html"),
        ([folder, "--out", folder / "results.csv" / "page.html"], "the report cannot be written"),
        ([tmp_path], "characterize.json does not exist"),
    ):
        assert cli.main(["report", *map(str, arguments)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and said in error and error.count("\n") == 1

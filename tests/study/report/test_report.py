"""The report: every number against the CSV, what stands where, what a broken sweep looks like."""

import json
import re
import shlex
from dataclasses import replace

import made
import pages
import pytest
from support import EXPERIMENTS, ROOT

from moejax import cli
from moejax.study import reference
from moejax.study.report import compare, document, grid, results
from moejax.study.report.page import Number

SECTIONS = [e.replace("_", "-") for e in EXPERIMENTS]


def report(tmp_path, *studies, names=()):
    """Write studies and the report about them; (folders, the page, its file)."""
    folders = [tmp_path / (names[i] if names else f"study{i}") for i in range(len(studies))]
    for folder, study in zip(folders, studies, strict=True):
        results.write(study, folder)
    file = tmp_path / "out" / "page.html"
    assert cli.main(["report", *map(str, folders), "--out", str(file)]) == 0
    return folders, pages.read(file), file


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    return report(tmp_path_factory.mktemp("one"), made.study())


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    bigger = made.study("made-up bigger GPU", 2.0, {"sparse": 16, "dense": 6})
    return report(tmp_path_factory.mktemp("two"), made.study(), bigger)


DEMO = ROOT / "tests" / "study" / "report" / "fixtures" / "cpu_demo"  # of `moejax characterize --preset cpu-demo`, as it wrote them


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    file = tmp_path_factory.mktemp("demo") / "page.html"
    assert cli.main(["report", str(DEMO), "--out", str(file)]) == 0
    return [DEMO], pages.read(file), file


SCALES = {"ns": 1e-9, "µs": 1e-6, "ms": 1e-3, "s": 1, "min": 60, "h": 3600, "%": 0.01, "TB": 1e12, "GB": 1e9, "MB": 1e6, "kB": 1e3, "B": 1}


def read_number(text, unit):
    """What a reader takes a rounded text for, in the row's own unit."""
    number, _, suffix = text.replace(",", "").lstrip("$").partition(" ")
    scale = SCALES[suffix] if suffix else 1
    return float(number) * (1 if unit == "GB" else scale)


def shown(folders):
    """"FOLDER:LINE" -> the cells of each CSV's lines that a section is about."""
    about = {spec.experiment: spec for spec in document.SECTIONS}
    return {
        f"{i}:{n}": row for i, folder in enumerate(folders) for n, row in pages.csv_lines(folder).items()
        if row["metric"] in about[row["experiment"]].metrics
        and (not about[row["experiment"]].scopes or row["scope"] in about[row["experiment"]].scopes)
    }  # fmt: skip


def check_values(folders, page):
    """Every value that a section is about is on the page, exactly; nothing on it claims to be measured that no CSV has."""
    lines = shown(folders)
    ours = [c for c in page.cells if c.source == "ours"]
    assert {c.place for c in ours} == set(lines) and len(lines) > 100
    for cell in ours:
        row = lines[cell.place]
        assert cell.value == row["value"], cell
        # Three digits; dollars in cents.
        absolute = 0.0051 if row["unit"] == "USD" else 0
        assert read_number(cell.text, row["unit"]) == pytest.approx(float(row["value"]), rel=0.0051, abs=absolute), cell
    assert not [c for c in page.cells if c.source != "ours" and c.place]
    return lines, ours


@pytest.mark.parametrize("which", ["one", "two", "demo"])
def test_the_numbers_are_exactly_the_csvs(which, request):
    folders, page, _ = request.getfixturevalue(which)
    check_values(folders, page)


@pytest.mark.parametrize("which", ["one", "two", "demo"])
def test_every_value_stands_in_the_row_and_column_of_its_name(which, request):
    folders, page, _ = request.getfixturevalue(which)
    lines = shown(folders)
    devices = [json.loads((f / "characterize.json").read_text())["environment"]["device"] for f in folders]
    checked = 0
    for cell in page.cells:
        if cell.source != "ours" or not cell.section:  # what to do, above all sections: the next test
            continue
        row, said = lines[cell.place], f"{cell.group} {cell.line}"
        where = f"{row} in {cell}"
        # Figure 13 shows the batches that ran once more.
        assert cell.section.replace("-", "_") == row["experiment"] or (cell.section, row["metric"]) == ("fit-batch", "proved_batch"), where
        assert row["model"] in said, where
        assert not row["routing"] or row["routing"] in said, where
        data = {"cs": "commonsense", "math": "math"}.get(row["data"])  # the demo has one data set: said once
        assert not data or data in said, where
        if row["experiment"] in ("stages", "layers"):
            assert cell.line == {"moe": "MoE", "layers": "rest of the layers"}.get(row["scope"], row["scope"]), where
        if row["experiment"] in ("kernels", "utilization"):
            name = "rest of the MoE" if row["scope"] == "moe" else row["scope"].removeprefix("moe/").replace("_", " ")
            assert cell.line == name, where
        if row["experiment"] == "throughput":
            assert f"batch {float(row['batch']):g}" in cell.line, where
        if row["experiment"] == "length":
            assert row["seq_len"] in said, where
        if row["experiment"] == "cost":
            assert cell.line.startswith(f"{row['scope']}, "), where
        assert cell.head == devices[int(cell.place.split(":")[0])], where
        checked += 1
    assert checked >= len(lines)


def study_cells(page, section, group, line):
    return [float(c.value) for c in page.cells if (c.source, c.section, c.group, c.line) == ("study", section, group, line)]


def test_the_reference_stands_beside_by_meaning(one):
    _, page, _ = one
    stages = reference.stage_seconds()
    for model in reference.MODELS:
        largest = {k: max(r.batch for r in stages.rows if (r.model, r.kind) == (model, k)) for k in ("sparse", "dense")}
        for group, kind, batch in (
            ("sparse, batch 1", "sparse", 1),
            ("sparse, largest batch", "sparse", largest["sparse"]),
            ("sparse, dense's largest batch", "sparse", largest["dense"]),
            ("dense, largest batch", "dense", largest["dense"]),
        ):
            row = stages.row(model, kind, batch).values
            assert study_cells(page, "stages", f"{model}-made, {group}", "forward") == [row["forward"]]
            # The study's backward pass holds its recomputation: it must not stand next to ours without.
            assert study_cells(page, "stages", f"{model}-made, {group}", "backward") == []
            assert study_cells(page, "stages", f"{model}-made, {group}", "backward with recomputation") == [row["backward"]]
    table = {(m.model, m.dataset, m.kind): m for m in reference.max_batches()}
    three = table["mixtral", "math_14k", "sparse"]
    assert study_cells(page, "largest-batch", "mixtral-made, math", "sparse") == [three.printed] == [3]
    assert study_cells(page, "largest-batch", "mixtral-made, math", "sparse, in the study's sweeps") == [three.swept] == [4]
    (curve,) = (c for c in reference.curves() if (c.gpu, c.model, c.dataset) == ("a40", "mixtral", "commonsense_15k"))
    for batch, rate in curve.kind("sparse"):
        assert study_cells(page, "throughput", "mixtral-made, commonsense, sparse", f"batch {batch}") == [rate]
    for row in reference.cost_table():
        gpu = {"A100": "A100-80"}.get(row.gpu, row.gpu)
        assert row.usd in [float(c.value) for c in page.cells if (c.section, c.source, c.line) == ("cost", "study", f"{gpu}, $")]
    latency = reference.sequence_length_sensitivity("latency_seconds").row("blackmamba", "dense").values
    for tokens, value in latency.items():
        assert study_cells(page, "length", "blackmamba-made, dense, seconds a step", tokens) == [value]


@pytest.mark.parametrize("which", ["one", "demo"])
def test_the_page_begins_with_what_to_do(which, request):
    """For each model and data set: the fastest batch that was measured, and the card on which the run costs or takes least."""
    folders, page, file = request.getfixturevalue(which)
    assert "$<data" not in file.read_text()  # a number of dollars brings its sign
    lines = shown(folders)
    told = [lines[cell.place] for cell in page.cells if cell.source == "ours" and not cell.section]
    rates = [row for row in told if row["experiment"] == "throughput"]
    assert len(rates) == len({(row["model"], row["data"]) for row in lines.values() if row["experiment"] == "throughput"})
    for row in rates:
        same = [r for r in lines.values() if all(r[k] == row[k] for k in ("experiment", "model", "data", "metric"))]
        assert float(row["value"]) == max(float(r["value"]) for r in same)
        costs = [r for r in lines.values() if r["experiment"] == "cost" and all(r[k] == row[k] for k in ("model", "data", "routing"))]
        for metric in ("usd", "hours"):  # the least of each, where any is known
            least = min((float(r["value"]) for r in costs if r["metric"] == metric), default=None)
            assert least is None or least in [float(r["value"]) for r in told if r in costs and r["metric"] == metric]


@pytest.mark.parametrize("which", ["one", "two", "demo"])
def test_every_reference_says_its_model(which, request):
    """Nobody shall compare a tiny model with Mixtral-8x7B without knowing it: where the study's number stands, its model's name does."""
    _, page, _ = request.getfixturevalue(which)
    cells = [c for c in page.cells if c.source == "study"]
    assert len(cells) > 100
    models = set()
    for cell in cells:
        said = [name for name in ("Mixtral-8x7B", "BlackMamba-2.8B") if name in f"{cell.group} {cell.beside}"]
        assert len(said) == 1, cell
        models.add((cell.section, *said))
        assert cell.head == "study: PyTorch, A40", cell
    assert {s for s, _ in models} == set(SECTIONS)


def test_a_model_of_no_family_of_the_studys_stands_alone(tmp_path):
    """The study has no number for it: none stands on a page of such models, nor in its rows and figures next to others'."""
    alone, mixtral = (("qwen-made", None, "qlora"),), made.MODELS[0]
    folders, page, file = report(tmp_path / "alone", made.study(models=alone, experts=128))
    check_values(folders, page)
    content = file.read_text()
    assert not [c for c in page.cells if c.source == "study"] and "study: PyTorch" not in content
    assert "had no model like qwen-made: none of its numbers are shown there" in content and "Next to ours" not in content
    sections = content.partition('id="environment"')[0]
    assert not re.search(r"study: |A40:|ours / study|[Tt]he study's (PyTorch|backward|share|seconds|are)", sections)
    assert {c.line for c in page.cells if c.section == "expert-load"} >= {"expert 0", "expert 127"}
    folders, page, file = report(tmp_path / "both", made.study(models=(mixtral, *alone)))
    check_values(folders, page)
    theirs = [c for c in page.cells if c.source == "study"]
    assert theirs and not [c for c in theirs if "qwen-made" in c.group]
    content = file.read_text()
    assert "Next to ours" in content and "The study had no model like qwen-made" in content


def test_lengths_are_sorted_whoever_measured_them(one, demo):
    for _, page, _ in (one, demo):
        groups = {}
        for cell in page.cells:
            if cell.section == "length" and cell.line.isdigit():
                groups.setdefault(cell.group, []).append(int(cell.line))
        assert len(groups) >= 6 and all(lengths == sorted(lengths) and {64, 128, 1024} <= set(lengths) for lengths in groups.values())


def test_an_artificial_limit_is_said_where_batches_fit(one, demo):
    for (_, page, _), limit in ((one, None), (demo, "90 MB")):
        assert ("a step was held to 90 MB: an artificial limit" in page.text) == (limit is not None)


def test_precision_and_command(tmp_path, demo):
    assert "float32, trained weights in float32" in demo[1].text
    folders, page, _ = report(tmp_path, made.study(), names=["my study; echo"])
    # And the command is what a shell takes.
    command = re.search(r"This page: (moejax report .*?) \(moejax", page.text)[1]
    assert shlex.split(command) == ["moejax", "report", str(folders[0])]


def test_table_4_says_hours_and_whose_price(one):
    _, page, _ = one
    cells = {c.line: c for c in page.cells if (c.section, c.group, c.source) == ("cost", "mixtral-made, commonsense, sparse", "ours")}
    assert cells["A40, measured here (1) or carried over (0)"].value == "1"
    assert cells["A100-80, measured here (1) or carried over (0)"].value == "0"
    assert "A100-80: made-up seller, 2026-11-01" in page.text and "CUDO's prices of 2024" in page.text
    (hours,) = {c.value for c in page.cells if (c.section, c.line, c.head[:5], c.source) == ("cost", "A40, hours", "study", "derived")}
    assert float(hours) == pytest.approx(32.7 / 0.79)


def test_shares_and_sums_are_computed_from_the_rows(one):
    folders, page, _ = one
    study = results.read(folders[0])
    where = {"model": "mixtral-made", "routing": "sparse", "batch": 8}
    seconds = {r.scope: r.value for r in study.of("stages", **where)}
    busy = sum(v for k, v in seconds.items() if k != "idle")
    cells = [c for c in page.cells if (c.section, c.group) == ("stages", "mixtral-made, sparse, largest batch") and c.head == "made-up GPU"]
    derived = {c.line: float(c.value) for c in cells if c.source == "derived" and c.text.endswith("%")}
    assert derived["forward"] == pytest.approx(seconds["forward"] / busy)
    assert derived["backward with recomputation"] == pytest.approx((seconds["recompute"] + seconds["backward"]) / busy)
    assert "idle" not in derived


def test_the_studys_conclusions_are_computed_alike(one, demo):
    """From our rows, and from its own numbers."""
    folders, page, _ = one
    study = results.read(folders[0])
    found = {(c.group, c.line, c.head): float(c.value) for c in page.cells if not c.section}
    layers = {r.scope: r.value for r in study.of("layers", model="mixtral-made", routing="sparse", batch=8)}
    theirs = reference.layer_seconds().row("mixtral", "sparse", 32).values
    group, line = "mixtral-made, QLoRA, commonsense", "MoE, of the layers' time"
    ours, study_ = layers["moe"] / sum(layers[k] for k in ("moe", "attention", "norm")), theirs["moe"] / sum(theirs.values())
    values = [found[group, line, head] for head in ("made-up GPU", "study: PyTorch, A40", "ours / study")]
    assert values == pytest.approx([ours, study_, ours / study_])
    assert found[group, "largest batch, sparse over dense", "study: PyTorch, A40"] == 8 / 2
    assert found[group, "largest batch, sparse over dense", "made-up GPU"] == pytest.approx(8 / 3)
    cost = [r.value for r in study.of("cost", metric="usd", model="mixtral-made", data="cs")]
    dollars = "dollars of the whole run at least, sparse"
    assert [found[group, dollars, head] for head in ("made-up GPU", "study: PyTorch, A40")] == [min(cost), 17.9]
    # Of a model without dense trials, what needs them is not there.
    lines = {c.line for c in demo[1].cells if not c.section and c.group.startswith("tiny-blackmamba")}
    assert "optimizer, of the step" in lines and "largest batch, sparse over dense" not in lines


def test_ours_stands_over_the_studys(one):
    _, page, _ = one
    cells = [c for c in page.cells if (c.section, c.group, c.line) == ("largest-batch", "mixtral-made, math", "sparse")]
    assert [(c.source, float(c.value)) for c in cells] == [("ours", 8), ("study", 3), ("derived", 8 / 3)]
    # Of shares where there are any: seconds are of another device.
    cells = [c for c in page.cells if (c.section, c.group, c.line) == ("stages", "mixtral-made, sparse, largest batch", "forward")]
    assert float(cells[-1].value) == pytest.approx(float(cells[1].value) / float(cells[3].value)) and len(cells) == 5


def test_a_bar_is_the_share_of_its_columns_largest():
    values = {"a": 1.0, "b": 4.0, "c": 0.0}
    sources = [compare.Source(0, None, "here", None)]
    filled = grid.Grid(sources, "")
    for line, value in values.items():
        filled.put("group", line, sources[0], Number("x", repr(value), bar=value))
    rows = filled.table("").groups[0].rows
    assert [row[1][0].bar for row in rows] == [0.25, 1.0, 0.0]


def test_two_are_compared(two):
    _, page, file = two
    heads = re.findall(r"<thead><tr>(.*?)</tr>", file.read_text())
    assert any("made-up GPU</th>" in h and "made-up bigger GPU</th>" in h and "2nd / 1st" in h and "study: PyTorch" in h for h in heads)
    ratios = [c for c in page.cells if (c.section, c.group, c.line) == ("largest-batch", "mixtral-made, commonsense", "sparse")]
    assert [(c.source, float(c.value)) for c in ratios] == [("ours", 8), ("ours", 16), ("study", 8), ("derived", 2)]
    # By meaning, not by size: largest next to largest.
    group = "mixtral-made, sparse, largest batch"
    cells = [c for c in page.cells if (c.section, c.group, c.line, c.source) == ("stages", group, "forward", "ours")]
    assert [c.head for c in cells] == ["made-up GPU", "made-up bigger GPU"]


def test_the_studys_batch_stands_with_its_own_data_and_apart_from_others(tmp_path):
    """A folder on the study's data next to one on word problems."""
    _, page, _ = report(tmp_path, *(replace(s, rows=s.of("largest_batch")) for s in (made.study(), results.read(DEMO))))
    for group in ("mixtral-made, commonsense, 1024 tokens", "Mixtral-8x7B, commonsense"):
        assert study_cells(page, "largest-batch", group, "sparse") == [8], {c.group for c in page.cells}


def test_the_page_stands_alone(one):
    _, page, file = one
    assert all(tag not in ("script", "iframe", "img", "object") for tag, _ in page.tags)
    assert [f for f in page.fetched if not f.startswith("#")] == ["data:,"]
    assert not re.findall(r"(?:src|href)=\"https?:|@import|url\((?!#)", file.read_text())


def test_links_arrive(two):
    _, page, _ = two
    assert len(page.ids) == len(set(page.ids)) and set(SECTIONS) <= set(page.ids)
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids) and len(page.links) > len(SECTIONS)


def test_the_same_as_markdown(one):
    _, page, file = one
    content = file.with_suffix(".md").read_text()
    for anchor in re.findall(r"\]\(#([^)]+)\)", content):
        assert f'<a id="{anchor}"></a>' in content
    plain = content.replace("\\", "")
    texts = {c.text for c in page.cells}
    assert len(texts) > 100 and all(t in plain for t in texts)


def test_the_same_input_gives_the_same_bytes(one, tmp_path):
    folders, _, file = one
    again = tmp_path / "page.html"
    assert cli.main(["report", str(folders[0]), "--out", str(again)]) == 0
    assert again.read_bytes() == file.read_bytes()


def test_where_it_goes(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        study = made.study(name)
        results.write(replace(study, rows=study.of("length")), tmp_path / name)
    assert cli.main(["report", "a"]) == 0 and (tmp_path / "a" / "report.html").exists() and (tmp_path / "a" / "report.md").exists()
    assert cli.main(["report", "a", "b"]) == 0 and (tmp_path / "comparison.html").exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_demo_by_hand(demo):
    """Some of the fixture's values, read by a person from results.csv."""
    _, page, _ = demo
    assert "29 of 29 trials gave a result" in page.text
    cells = {(c.section, c.group, c.line): c.value for c in page.cells if c.source == "ours"}
    assert cells["largest-batch", "tiny-mixtral", "sparse"] == "37"
    assert cells["largest-batch", "tiny-mixtral", "dense"] == "8"
    assert cells["stages", "tiny-mixtral, dense, batch 1", "optimizer"] == "0.0027523257000000006"
    assert cells["length", "tiny-mixtral, sparse, seconds a step", "256"] == "0.30797472899985223"
    assert cells["expert-load", "tiny-blackmamba, sparse, after fine-tuning", "expert 7"] == "7.828125"
    # The study has no word problems: its commonsense stands apart, and says so.
    assert study_cells(page, "largest-batch", "Mixtral-8x7B, commonsense", "sparse") == [8]
    assert study_cells(page, "throughput", "Mixtral-8x7B, commonsense, dense", "batch 2")[0] == pytest.approx(0.5138618605, abs=0)
    assert study_cells(page, "largest-batch", "tiny-mixtral", "sparse") == []

"""The report: every number against the CSV, what stands where, what a broken sweep looks like."""

import json
import re
import xml.etree.ElementTree as ET

import made
import pages
import pytest
from support import ROOT

from moejax import cli, reference
from moejax.report import compare, results

SECTIONS = [e.replace("_", "-") for e in results.EXPERIMENTS]


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


DEMO = ROOT / "tests" / "report" / "fixtures" / "cpu_demo"  # of `moejax characterize --preset cpu-demo`, as it wrote them


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


def check_values(folders, page):
    """Every value of every CSV is on the page, exactly; nothing on it claims to be measured that no CSV has."""
    lines = {f"{i}:{n}": row for i, folder in enumerate(folders) for n, row in pages.csv_lines(folder).items()}
    ours = [c for c in page.cells if c.source == "ours"]
    assert {c.place for c in ours} == set(lines) and len(lines) > 100
    for cell in ours:
        row = lines[cell.place]
        assert cell.value == row["value"], cell
        if cell.text in ("measured", "carried over"):
            assert row["metric"] == "measured" and (cell.text == "measured") == (row["value"] == "1")
        else:
            assert read_number(cell.text, row["unit"]) == pytest.approx(float(row["value"]), rel=0.006, abs=0.0051), cell
    assert not [c for c in page.cells if c.source != "ours" and c.place]
    return lines, ours


@pytest.mark.parametrize("which", ["one", "two", "demo"])
def test_the_numbers_are_exactly_the_csvs(which, request):
    folders, page, _ = request.getfixturevalue(which)
    check_values(folders, page)


@pytest.mark.parametrize("which", ["one", "two", "demo"])
def test_every_value_stands_in_the_row_and_column_of_its_name(which, request):
    folders, page, _ = request.getfixturevalue(which)
    lines = {f"{i}:{n}": row for i, folder in enumerate(folders) for n, row in pages.csv_lines(folder).items()}
    devices = [json.loads((f / "characterize.json").read_text())["environment"]["device"] for f in folders]
    checked = 0
    for cell in page.cells:
        if cell.source != "ours" or not cell.section:  # the summary's have no row
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
            assert cell.line == {"moe": "MoE", "layers": "loops, slices"}.get(row["scope"], row["scope"]), where
        if row["experiment"] in ("kernels", "utilization"):
            name = "loops, slices" if row["scope"] == "moe" else row["scope"].removeprefix("moe/").replace("_", " ")
            other = f"batch {row['batch']}: {row['scope']}, seconds".replace("_", " ")  # among the other values
            assert name in cell.line.replace("_", " ") or cell.line.replace("_", " ") == other, where
        if row["experiment"] in ("throughput", "fit_throughput") and row["batch"]:
            assert f"batch {float(row['batch']):g}" in cell.line, where
        if row["experiment"] == "length":
            assert row["seq_len"] in said, where
        if cell.section == "cost":
            assert cell.line == row["scope"] + (f" ({devices[int(cell.place[0])]})" if len(folders) > 1 else ""), where
        else:
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
            # The study's backward pass holds its recomputation: it must not stand beside ours without.
            assert study_cells(page, "stages", f"{model}-made, {group}", "backward") == []
            assert study_cells(page, "stages", f"{model}-made, {group}", "backward with recomputation") == [row["backward"]]
    table = {(m.model, m.dataset, m.kind): m for m in reference.max_batches()}
    three = table["mixtral", "math_14k", "sparse"]
    assert study_cells(page, "largest-batch", "mixtral-made, math", "sparse") == [three.printed, three.swept] == [3, 4]
    (curve,) = (c for c in reference.curves() if (c.gpu, c.model, c.dataset) == ("a40", "mixtral", "commonsense_15k"))
    for batch, rate in curve.kind("sparse"):
        assert study_cells(page, "throughput", "mixtral-made, commonsense, sparse", f"batch {batch} (padded to the longest)") == [rate]
    for row in reference.cost_table():
        assert row.usd in [float(c.value) for c in page.cells if (c.section, c.source, c.line) == ("cost", "study", row.gpu)]
    latency = reference.sequence_length_sensitivity("latency_seconds").row("blackmamba", "dense").values
    for tokens, value in latency.items():
        assert study_cells(page, "length", "blackmamba-made, dense: seconds a step", tokens) == [value]


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
    layers = {r.scope: r.value for r in study.of("layers", **where)}
    moe = layers["moe"] / sum(layers[k] for k in ("moe", "attention", "norm"))
    assert f"takes {100 * moe:.3g} % of mixtral-made's layers' time (study: " in page.text


def test_the_summary_is_five_sentences_of_the_data(one, two):
    for folders, _, file in (one, two):
        (items,) = re.findall(r"<ul>(.*?)</ul>", file.read_text().split("<nav")[0], flags=re.S)
        sentences = re.findall(r"<li>(.*?)</li>", items)
        assert len(sentences) == 5 and all(s.endswith(".") for s in sentences)
        rows = results.read(folders[0]).of("throughput", metric="queries_per_second", model="mixtral-made", data="cs", routing="sparse")
        best = max(r.value for r in rows if r.batching != "pack")
        assert f'value="{best!r}"' in sentences[2]


def test_two_are_compared(two):
    _, page, file = two
    heads = re.findall(r"<thead><tr>(.*?)</tr>", file.read_text())
    assert any("made-up GPU</th>" in h and "made-up bigger GPU</th>" in h and "2nd / 1st" in h and "study: PyTorch" in h for h in heads)
    ratios = [c for c in page.cells if (c.section, c.group, c.line) == ("largest-batch", "mixtral-made, commonsense", "sparse")]
    assert [(c.source, float(c.value)) for c in ratios] == [("ours", 8), ("ours", 16), ("derived", 2), ("study", 8)]
    # By meaning, not by size: largest beside largest.
    group = "mixtral-made, sparse, largest batch"
    cells = [c for c in page.cells if (c.section, c.group, c.line, c.source) == ("stages", group, "forward", "ours")]
    assert [c.head for c in cells] == ["made-up GPU", "made-up bigger GPU"]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ([{"device": "A"}, {"device": "B"}], ["A", "B"]),
        ([{"versions": {"jax": "0.10.2"}}, {"versions": {"jax": "0.11.0"}}], ["jax 0.10.2", "jax 0.11.0"]),
        ([{"config": {"moe": {"backend": "loop"}}}, {"config": {"moe": {"backend": "tiles"}}}], ["backend loop", "backend tiles"]),
        (
            [{"device": d, "versions": {"jax": v}} for d, v in ("A1", "B1", "B2")],
            ["A, jax 1", "B, jax 1", "B, jax 2"],
        ),
        ([{}, {}], ["first", "second"]),
    ],
)
def test_labels_say_what_differs(changes, expected, tmp_path):
    folders = [tmp_path / n for n in ("first", "second", "third")[: len(changes)]]
    assert compare.labels([made.study(**c) for c in changes], folders) == expected


def test_figures_are_whole_and_do_not_clash(two):
    _, page, file = two
    content = file.read_text()
    assert len(page.ids) == len(set(page.ids))
    assert {link.removeprefix("#") for link in page.links} <= set(page.ids) and len(page.links) >= len(SECTIONS)
    assert set(SECTIONS) <= set(page.ids)
    used = set(re.findall(r"url\(#([^)]+)\)", content)) | {f.removeprefix("#") for f in page.fetched if f.startswith("#")}
    assert used and used <= set(page.ids)
    figures = re.findall(r"<svg.*?</svg>", content, flags=re.S)
    assert len(figures) >= 13
    for figure in figures:
        root = ET.fromstring(figure)
        assert root.get("role") == "img" and root.find("{*}title").text and len(root.find("{*}desc").text) > 60
        assert "#010203" not in figure and "#fefdfc" not in figure  # the page's own ink and paper


def test_the_page_stands_alone(one):
    _, page, file = one
    assert all(tag not in ("script", "iframe", "img", "object") for tag, _ in page.tags)
    assert [f for f in page.fetched if not f.startswith("#")] == ["data:,"]
    assert not re.findall(r"(?:src|href)=\"https?:|@import|url\((?!#)", file.read_text())


def test_the_same_as_markdown(one):
    _, page, file = one
    content = file.with_suffix(".md").read_text()
    for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", content):
        assert ET.parse(file.parent / path).getroot().tag.endswith("svg")
    assert content.count("![") == file.read_text().count("<svg")
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
        results.write(made.study(name), tmp_path / name)
    assert cli.main(["report", "a"]) == 0 and (tmp_path / "a" / "report.html").exists() and (tmp_path / "a" / "report.md").exists()
    assert cli.main(["report", "a", "b"]) == 0 and (tmp_path / "comparison.html").exists()
    stale = tmp_path / "a" / "report_figures" / "old.svg"
    stale.write_text("<svg/>")
    assert cli.main(["report", "a"]) == 0 and not stale.exists()
    assert not list(tmp_path.rglob("*.tmp"))


def test_the_demo_by_hand(demo):
    """Some of the fixture's values, read by a person from results.csv."""
    _, page, file = demo
    assert "42 of 42 trials gave a result" in page.text
    cells = {(c.section, c.group, c.line): c.value for c in page.cells if c.source == "ours" and c.section}
    assert cells["largest-batch", "tiny-mixtral", "sparse"] == "78"
    assert cells["largest-batch", "tiny-blackmamba", "dense"] == "9"
    assert cells["stages", "tiny-mixtral, dense, batch 1", "optimizer"] == "0.0013161539"
    assert cells["length", "tiny-mixtral, sparse: seconds a step", "1024"] == "0.24387368699535728"
    assert cells["expert-load", "tiny-blackmamba, sparse, after fine-tuning", "expert 7"] == "6.3671875"
    # The study has no word problems: its commonsense stands apart, and says so.
    assert study_cells(page, "largest-batch", "study: mixtral, commonsense", "sparse") == [8]
    assert study_cells(page, "throughput", "study: mixtral, commonsense, dense", "batch 2")[0] == pytest.approx(0.5138618605, abs=0)
    assert study_cells(page, "largest-batch", "tiny-mixtral", "sparse") == []
    (figure,) = re.findall(r'<figure><svg[^>]*aria-labelledby="fit_throughput-1-title.*?</svg>', file.read_text(), flags=re.S)
    for said in ("sparse: measured", "dense: measured", "sparse: step model", "dense: equation 2"):
        assert f">{said}</text>" in figure

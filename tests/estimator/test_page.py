"""The plan as one page: nothing from elsewhere, every card, the frontier."""

import html
import re
import shutil
import subprocess
from dataclasses import replace

import pytest

from moejax import cli
from moejax.estimator.prices import Price
from moejax.estimator.tools import page
from moejax.estimator.tools.forecast import Forecast

ONE = Forecast(
    "A40", 1.0, (0.5, 2.0), 100.0, 3600, 1.0, (0.5, 2.0), 0.1, 2.0, (1.0, 4.0), Price("A40", 2.0, "me", "2026-11-01"), 20.0, (19.0, 21.0),
    48.0, True, "receipts",
)  # fmt: skip
SLOW = replace(ONE, gpu="L4", hours=2.0, hours_interval=(1.0, 4.0), usd=3.0, usd_interval=(2.0, 6.0), measured=False)
CHEAP = replace(ONE, gpu="T4", hours=8.0, hours_interval=(4.0, 16.0), usd=0.5, usd_interval=(0.2, 1.0), changes="placement.experts=host")
FREE = replace(ONE, gpu="H100", usd=None, usd_interval=None, price=None)


def test_the_frontier_is_what_nothing_beats():
    assert page.frontier([ONE, SLOW, CHEAP, FREE]) == {"A40", "T4"}


def test_a_chart_lies_within_its_frame():
    made = page.chart([ONE, SLOW, CHEAP, FREE])
    assert len(made["points"]) == 3  # without a price it is in the table alone
    for p in made["points"]:
        assert page.LEFT <= p["x_low"] < p["x"] < p["x_high"] <= page.RIGHT and page.TOP <= p["y_high"] < p["y"] < p["y_low"] <= page.BOTTOM
    assert page.chart([FREE]) is None and [t["label"] for t in made["x"]] == ["0.5", "1", "2", "5", "10"]


def test_a_page_is_whole_and_asks_nothing_of_a_network(tmp_path):
    file = tmp_path / "plan.html"
    found = [ONE, SLOW, CHEAP, FREE]
    page.write(file, "<a title>", "Times are those of moejax.", found, {"cheapest": "T4"}, ["x is too small"], ["so"], "me")
    text = file.read_text()
    assert "&lt;a title&gt;" in text and "L4 *" in text and "never measured" in text and "placement.experts=host" in text
    assert "x is too small" in text and "no price" in text and not re.search(r"https?://|<script|src=|@import", text)


def test_a_file_that_cannot_be_written(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    given = ["plan", "--model", "olmoe-1b-7b", "--records", "9", "--length", "9", "--gpu", "A40", "--html"]
    assert cli.estimate_main([*given, str(tmp_path / "file" / "x.html")]) == 2 and "--html" in capsys.readouterr().err



@pytest.mark.long
@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium here: apt-get install chromium")
def test_in_a_browser_of_390_px(tmp_path, capsys):
    """Nothing is wider than the phone."""
    file = tmp_path / "plan.html"
    assert cli.estimate_main(["plan", "configs/mixtral_8x7b.yaml", "--records", "900", "--length", "99", "--html", str(file)]) == 0
    probe = "<script>parent.postMessage(document.documentElement.scrollWidth + ' of ' + innerWidth, '*')</script></body>"
    framed = html.escape(file.read_text().replace("</body>", probe))
    listening = "<script>onmessage = e => document.title = e.data</script>"
    file.write_text(f'<html>{listening}<body><iframe width="390" height="800" frameborder="0" srcdoc="{framed}"></iframe></body></html>')
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom", file.as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120).stdout
    scroll, inner = map(int, re.search(r"<title>(\d+) of (\d+)</title>", dom).groups())
    assert scroll <= inner == 390

"""A real browser opens the report: no error, every link arrives, nothing wider than a phone, ink that follows the reader."""

import shutil
import time

import made
import pytest
from support import EXPERIMENTS, ROOT

from docs.make_screenshots import Browser
from moejax import cli
from moejax.study.report import results

pytestmark = pytest.mark.skipif(
    not any(shutil.which(b) for b in ("chromium", "chromium-browser", "google-chrome")), reason="no Chromium here: apt-get install chromium"
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    found = Browser(str(tmp_path_factory.mktemp("profile")))
    for domain in ("Log", "Runtime", "Page", "Network"):
        found.ask(f"{domain}.enable")
    yield found
    found.process.terminate()
    found.process.wait(timeout=30)


DEMO = ROOT / "tests" / "study" / "report" / "fixtures" / "cpu_demo"


@pytest.fixture(scope="module", params=["demo", "two"])
def opened(request, browser, tmp_path_factory):
    """The report of cpu-demo, and of two made-up studies."""
    folder = tmp_path_factory.mktemp(request.param)
    # Real GPUs have long names: nothing of them may widen the page.
    results.write(made.study("NVIDIA A100-SXM4-40GB"), folder / "a")
    results.write(made.study("NVIDIA RTX PRO 6000 Blackwell Server Edition", 2.0, {"sparse": 6, "dense": 2}), folder / "b")
    file = folder / "report.html"
    folders = [DEMO] if request.param == "demo" else [folder / "a", folder / "b"]
    assert cli.main(["report", *map(str, folders), "--out", str(file)]) == 0
    browser.events.clear()
    browser.ask("Page.navigate", url=file.as_uri())
    browser.until("document.readyState == 'complete'")
    return browser


def test_no_error_and_nothing_fetched(opened):
    time.sleep(0.5)
    opened.run("0")  # an answer: what was reported before it has been read
    methods = [e["method"] for e in opened.events]
    assert "Page.loadEventFired" in methods  # the events are heard at all
    assert not [e for e in opened.events if e["method"] in ("Log.entryAdded", "Runtime.exceptionThrown", "Runtime.consoleAPICalled")]
    asked = [e["params"]["request"]["url"] for e in opened.events if e["method"] == "Network.requestWillBeSent"]
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert sum(url.startswith("file:") for url in asked) == 1


def test_an_error_would_be_heard(opened):
    opened.run("console.error('heard')")
    opened.run("0")
    assert any(e["method"] == "Runtime.consoleAPICalled" for e in opened.events)


def test_links_arrive(opened):
    links = opened.run("document.querySelectorAll('nav a').length")
    assert links == len(EXPERIMENTS) + 1
    for i in range(links):
        opened.run(f"document.querySelectorAll('nav a')[{i}].click()")
        target, top = opened.run(
            f"(() => {{ const a = document.querySelectorAll('nav a')[{i}]; const t = document.querySelector(a.getAttribute('href')); "
            "return [a.hash == location.hash, Math.min(t.getBoundingClientRect().top, "
            "document.documentElement.scrollHeight - scrollY - innerHeight)]; })()"
        )
        assert target and abs(top) < 60


@pytest.mark.parametrize("width", [360, 390, 1280])
def test_the_page_does_not_scroll_sideways(opened, width):
    opened.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=width < 500)
    try:
        assert opened.run("document.documentElement.scrollWidth") <= width
        # What a table hides on a narrow screen is hinted at.
        unsaid = opened.run(
            "[...document.querySelectorAll('.scroll')].filter(d => d.scrollWidth > d.clientWidth + 1 && "
            "!getComputedStyle(d.querySelector('caption span'), '::after').content.includes('Scroll sideways')).length"
        )
        assert width > 500 or unsaid == 0
    finally:
        opened.ask("Emulation.clearDeviceMetricsOverride")


def test_ink_follows_the_reader(opened):
    inks = {}
    for scheme in ("light", "dark"):
        opened.ask("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        inks[scheme] = opened.run(
            "[getComputedStyle(document.body).backgroundColor, getComputedStyle(document.querySelector('td')).color]"
        )
    assert inks["light"] == ["rgb(255, 255, 255)", "rgb(29, 33, 41)"]
    assert inks["dark"] == ["rgb(22, 24, 29)", "rgb(228, 231, 235)"]

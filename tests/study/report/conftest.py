"""A figure of the report that was drawn before from the same arguments is not drawn again: drawing takes nearly all of a report's time."""

import io

import matplotlib
import pytest

from moejax.study.report import figures

DRAWN = {}  # what is drawn and by which name its parts are called -> SVG


class Once:
    """In a figure's place until it is saved."""

    def __init__(self, draw, *arguments, **settings):
        self.draw = lambda: draw(*arguments, **settings)
        self.what = (draw.__name__, repr(arguments), repr(settings))

    def savefig(self, file, **settings):
        key = (*self.what, matplotlib.rcParams["svg.hashsalt"])
        if key not in DRAWN:
            self.draw().savefig(text := io.StringIO(), **settings)
            DRAWN[key] = text.getvalue()
        file.write(DRAWN[key])


@pytest.fixture(scope="module", autouse=True)
def drawn_once():
    with pytest.MonkeyPatch.context() as patch:
        for draw in (figures.shares, figures.curves, figures.dots, figures.grouped):
            patch.setattr(figures, draw.__name__, lambda *a, draw=draw, **s: Once(draw, *a, **s))
        yield


@pytest.fixture
def drawn_anew(monkeypatch):
    """Nothing is known that was drawn before."""
    monkeypatch.setitem(globals(), "DRAWN", {})

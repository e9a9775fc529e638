"""matplotlib figures as SVG that takes its ink from the page: readable on white, on black and on paper."""

from __future__ import annotations

import hashlib
import io
import re
from html import escape
from typing import TYPE_CHECKING, Any

from moejax.study.report import page

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Drawn in these and then replaced: a figure does not know whether its page is light or dark.
INK, FAINT, PAPER = "#010203", "#030201", "#fefdfc"
# Points to the widest in pixels: drawn narrow, so that letters stay legible on a phone, and shown larger where there is room.
WIDER = 1.85
_REPLACED = {INK: "currentColor", FAINT: "var(--faint, #999)", PAPER: "var(--paper, #fff)"}
SETTINGS: Any = {
    "svg.fonttype": "none", "font.family": "DejaVu Sans", "font.size": 8.5, "axes.titlesize": 9, "axes.titleweight": "bold",
    "axes.titlelocation": "left", "text.color": INK, "axes.edgecolor": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": FAINT, "grid.linewidth": 0.4, "axes.facecolor": "none",
    "figure.facecolor": "none", "legend.frameon": False, "legend.labelcolor": INK,
}  # fmt: skip


def embed(figure: Figure, name: str, title: str, description: str) -> page.Figure:
    """The figure as one <svg> element for an HTML page. Its ids begin with `name`, so that they differ from other figures'.

    title, description: what it shows, for who cannot see it.
    """
    import matplotlib

    out = io.StringIO()
    with matplotlib.rc_context({**SETTINGS, "svg.hashsalt": hashlib.sha256(name.encode()).hexdigest()[:8]}):
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    return page.Figure(name, title, _own(out.getvalue(), name, title, description))


def _own(source: str, name: str, title: str, description: str) -> str:
    content = source[source.index("<svg") :]
    content = re.sub(r"<metadata>.*?</metadata>\s*", "", content, flags=re.S)
    content = re.sub(r"<!--.*?-->\s*", "", content, flags=re.S)
    for drawn, taken in _REPLACED.items():
        content = content.replace(drawn, taken)
    # Any sans-serif of the reader's is at most as wide as the one the figure was laid out with.
    content = re.sub(r"'DejaVu Sans'", "'DejaVu Sans', Verdana, system-ui, sans-serif", content)
    used = set(re.findall(r"(?:url\(#|href=\"#)([^)\"]+)", content))
    content = re.sub(r' id="([^"]+)"', lambda m: f' id="{name}-{m[1]}"' if m[1] in used else "", content)
    content = re.sub(r"url\(#", f"url(#{name}-", content)
    content = re.sub(r'xlink:href="#', f'href="#{name}-', content)
    head, rest = content.split(">", 1)
    view = re.search(r'viewBox="[^"]+"', head)
    width = re.search(r'width="([\d.]+)pt"', head)
    if view is None or width is None:
        raise ValueError("matplotlib's svg has no viewBox and width")
    # A style sheet of matplotlib's own would hold for the whole page: what it says (round joins) is written here.
    rest = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>\s*", "", rest, flags=re.S)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" {view[0]} style="width:100%;max-width:{float(width[1]) * WIDER:.0f}px;height:auto;'
        f'stroke-linejoin:round;stroke-linecap:butt" role="img" aria-labelledby="{name}-title {name}-desc">'
        f'<title id="{name}-title">{escape(title)}</title><desc id="{name}-desc">{escape(description)}</desc>{rest.strip()}'
    )


def alone(svg: str) -> str:
    """The same as a file of its own: it follows the reader's choice of light or dark itself."""
    style = (
        "<style>svg{color:#1d2129;--faint:#aaa;--paper:#fff}"
        "@media(prefers-color-scheme:dark){svg{color:#e6e6e6;--faint:#777;--paper:#16181d}}</style>"
    )
    return f'<?xml version="1.0" encoding="utf-8"?>\n{svg.replace("<title", style + "<title", 1)}\n'

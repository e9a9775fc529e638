"""A plan as one page that people send to each other: hours against dollars, every card, what does not fit, what it rests on. No jax."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from moejax.estimator.tools.forecast import Forecast
from moejax.files import replace_text

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 380, 330, 40, 366, 22, 286
"""Of the chart: as wide as a phone, and text in it as large as next to it."""


@dataclass(frozen=True)
class Axis:
    """A logarithmic one, from pixel to pixel."""

    low: float
    high: float
    start: float
    end: float

    def at(self, value: float) -> float:
        share = (math.log(value) - math.log(self.low)) / (math.log(self.high) - math.log(self.low))
        return round(self.start + min(max(share, 0.0), 1.0) * (self.end - self.start), 1)

    @property
    def ticks(self) -> list[dict[str, Any]]:
        """1, 2 and 5 of every power of ten that lies within; of a long axis the powers alone."""
        decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        steps = (1, 2, 5) if len(decades) < 5 else (1,)
        values = [step * 10.0**d for d in decades for step in steps]
        return [{"at": self.at(v), "label": f"{v:,.10g}"} for v in values if self.low <= v <= self.high]


def frontier(found: Sequence[Forecast]) -> set[str]:
    """Cards with a price than which no other is both faster and cheaper."""
    priced = [p for p in found if p.usd is not None]
    return {p.on for p in priced if not any(o.hours < p.hours and (o.usd or 0) < (p.usd or 0) for o in priced)}


def chart(found: Sequence[Forecast]) -> dict[str, Any] | None:
    """What the template draws; None where no card has a price."""
    priced = [p for p in found if p.usd is not None and p.usd_interval is not None]
    if not priced:
        return None
    best = frontier(found)
    x = Axis(*_ends([p.hours_interval for p in priced]), LEFT, RIGHT)
    y = Axis(*_ends([p.usd_interval for p in priced if p.usd_interval]), BOTTOM, TOP)
    points = []
    for p in sorted(priced, key=lambda p: p.on in best):  # the frontier on top
        hours, dollars = p.hours_interval, p.usd_interval or (0.0, 0.0)
        points.append({
            "name": p.named, "frontier": p.on in best, "x": x.at(p.hours), "y": y.at(p.usd or 0.0), "x_low": x.at(hours[0]),
            "x_high": x.at(hours[1]), "y_low": y.at(dollars[0]), "y_high": y.at(dollars[1]),
        })  # fmt: skip
    sides = {"width": WIDTH, "height": HEIGHT, "left": LEFT, "right": RIGHT, "top": TOP, "bottom": BOTTOM}
    return {**sides, "x": x.ticks, "y": y.ticks, "points": points}


def _ends(intervals: Sequence[tuple[float, float]]) -> tuple[float, float]:
    return min(low for low, _ in intervals) / 1.1, max(high for _, high in intervals) * 1.1


def write(
    path: Path, title: str, software: str, found: Sequence[Forecast], answers: Mapping[str, str], left_out: Sequence[str],
    assumptions: Sequence[str], made: str,
) -> None:  # fmt: skip
    """The page. Raises OSError where it cannot be written."""
    best = frontier(found)

    def between(ends: tuple[float, float] | None) -> str:
        return "" if ends is None else f"{ends[0]:.3g} to {ends[1]:.3g}"

    rows = [
        {
            "name": p.named, "frontier": p.on in best, "hours": f"{p.hours:.3g}", "hours_between": between(p.hours_interval),
            "usd": "no price" if p.usd is None else f"{p.usd:.3g}", "usd_between": between(p.usd_interval),
            "memory": p.memory, "changes": p.changes,
        }
        for p in found
    ]  # fmt: skip
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(Path(__file__).with_name("plan.html.j2").read_text(encoding="utf-8"))
    text = template.render(
        title=title, software=software, chart=chart(found), rows=rows, answers=list(answers.items()), left_out=left_out,
        assumptions=assumptions, unmeasured=not all(p.measured for p in found), made=made,
    )  # fmt: skip
    replace_text(path, text)

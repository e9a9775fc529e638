"""What is made of any trace, anyone who took it: busy time by phase and stage. Python's library alone."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from moejax.profiling.scopes import COLLECTIVES, OUTSIDE, PHASES, Place


@dataclass(frozen=True)
class Times:
    """All times in seconds per step."""

    steps: int  # how many were traced
    step_seconds: float  # from the first step's start to the last one's end, busy or not
    seconds: dict[Place, float]  # busy time by phase and stage

    @property
    def busy_seconds(self) -> float:
        return sum(self.seconds.values())

    @property
    def attributed(self) -> float:
        """Share of busy time under a named stage."""
        return 1.0 - self.sums("stage").get(OUTSIDE, 0.0) / self.busy_seconds

    def sums(self, by: str, phase: str | None = None) -> dict[str, float]:
        """Busy seconds by "phase", "stage" or "layer" (of one phase only, if given), longest first."""
        total: dict[str, float] = defaultdict(float)
        for where, seconds in self.seconds.items():
            if phase in (None, where.phase):
                total[getattr(where, by)] += seconds
        return dict(sorted(total.items(), key=lambda item: -item[1]))

    @property
    def phases(self) -> dict[str, float]:
        """forward, recompute, backward, optimizer, other; collectives where there are any; and idle: together `step_seconds`."""
        sums = self.sums("phase")
        between = {COLLECTIVES: sums[COLLECTIVES]} if COLLECTIVES in sums else {}
        return {p: sums.get(p, 0.0) for p in PHASES} | between | {"idle": max(0.0, self.step_seconds - self.busy_seconds)}

    @property
    def layers(self) -> dict[str, float]:
        """By layer kind: norm, attention or mamba, moe, embed, loss, optimizer, other."""
        return self.sums("layer")

    @property
    def moe_kernels(self) -> dict[str, float]:
        """By kernel of the mixture of experts: "moe/w1", "moe/w1_dequant" …; "moe" is what has no kernel's name."""
        return {stage: s for stage, s in self.sums("stage").items() if stage.split("/")[0] == "moe"}


def partition(events: Sequence[Any], container: Sequence[bool]) -> list[float]:
    """Wall time of each event, in the events' own unit: what runs (an operation, or a part of one on another thread) shares it equally; a
    container (the innermost) has it only when nothing else runs. The sum is the time in which anything ran."""
    moments: list[tuple[float, int, int]] = []  # when, 1 for a start, event
    for index, event in enumerate(events):
        for start, end in ((event.start, event.end), *event.tasks):
            if end > start:
                moments += [(start, 1, index), (end, 0, index)]
    moments.sort()
    shared = 0.0  # the integral of 1 / (number of running parts)
    spent = [0.0] * len(events)
    running = 0
    outer: dict[int, int] = {}  # open containers and how many parts of each run, in the order in which they began
    before = moments[0][0] if moments else 0
    for moment, starts, i in moments:
        if running:
            shared += (moment - before) / running
        elif outer:
            spent[next(reversed(outer))] += moment - before
        before = moment
        if not container[i]:
            running += 1 if starts else -1
            spent[i] += -shared if starts else shared
        else:
            outer[i] = outer.get(i, 0) + (1 if starts else -1)
            if not outer[i]:
                del outer[i]
    return spent

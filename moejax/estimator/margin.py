"""How far the allocator's peak may be above the compiler's: an assumption, until runs on a card have measured both. No jax."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from moejax.estimator.receipts import Receipt

ASSUMED = 0.03
"""Of the usable memory, left free by what is not the last resort."""
ENOUGH = 3
"""This many runs on a card stand for it alone; fewer only raise the assumption."""
BEYOND = 0.005
"""What is added to the worst that was measured."""


class Margin(NamedTuple):
    """share: of the usable memory; why: in words, for the line that says what was chosen."""

    share: float
    why: str


def of_card(gpu: str, jax_version: str | None, receipts: Iterable[Receipt]) -> Margin:
    """From receipts of this tool on this card with the same jax, which hold the peak that the compiler predicted and the allocator's."""
    errors = [
        r.peak_gb_allocator / r.predicted["peak_gb_allocator"] - 1
        for r in receipts
        if r.tool_name == "moejax" and r.gpu == gpu and (r.versions or {}).get("jax") == jax_version
        and r.peak_gb_allocator and r.predicted and r.predicted.get("peak_gb_allocator")
    ]  # fmt: skip
    if not errors:
        return Margin(ASSUMED, f"{ASSUMED:.0%} stay free, as assumed: no run on this card has measured it")
    worst = max(errors)
    measured = f"{len(errors)} {'run' if len(errors) == 1 else 'runs'} on {gpu} took at most {worst:+.1%} of the compiler's peak"
    share = max(worst, 0.0) + BEYOND
    share = share if len(errors) >= ENOUGH else max(share, ASSUMED)
    return Margin(share, f"{share:.1%} stay free: {measured}")

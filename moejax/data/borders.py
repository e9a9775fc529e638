"""Where in a text's tokens a place of the text is: exactly, or not at all.

Offsets do not say it: tokenizers trim spaces from them, and a character may be several tokens. What stands before the place is encoded as
well, from the last control token on (at which every text is cut), and must be the tokens that the whole text has there.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

from moejax.data.text_tokens import TextTokens

_REMEMBERED = 200  # characters: headers of turns repeat


class Borders:
    """Of texts of one tokenizer."""

    def __init__(self, tokens: TextTokens) -> None:
        self._tokens = tokens
        self._known: dict[str, list[int]] = {}

    def of(self, text: str, ids: list[int], places: Iterable[int]) -> list[int | None]:
        """For each place in a rendered text, how many of its `ids` stand before it; None where a token reaches across it, or where the
        text before it alone has other tokens."""
        ends, numbers = self._anchors(text, ids)
        return [self._at(text, ids, ends, numbers, place) for place in places]

    def _anchors(self, text: str, ids: list[int]) -> tuple[list[tuple[int, int]], list[int]]:
        """(end, begin) of the control tokens in the text, and which of the ids they are; none where the two disagree."""
        spans, numbers = self._tokens.controls_in(text), self._tokens.controls_of(ids)
        return (spans, numbers) if len(spans) == len(numbers) else ([], [])

    def _at(self, text: str, ids: list[int], ends: list[tuple[int, int]], numbers: list[int], place: int) -> int | None:
        last = bisect.bisect_right(ends, (place, place)) - 1
        begin, first = (0, 0) if last < 0 else (ends[last][1], numbers[last])
        before = self._encoded(text[begin:place])
        return first + len(before) if ids[first : first + len(before)] == before else None

    def nearest(self, text: str, ids: list[int], place: int) -> int:
        """The same, and where a token reaches across, the number of those before it."""
        before = self._encoded(text[:place])
        return next((at for at, (a, b) in enumerate(zip(before, ids, strict=False)) if a != b), min(len(before), len(ids)))

    def _encoded(self, text: str) -> list[int]:
        found = self._known.get(text)
        if found is None:
            found = self._tokens.encode([text])[0]
            if len(text) <= _REMEMBERED and len(self._known) < 100_000:
                self._known[text] = found
        return found

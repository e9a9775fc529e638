"""The final number of an answer, and exact match."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

# A comma belongs to a number only between groups of three digits: `3,4` are two numbers.
_NUMBER = re.compile(r"-?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|-?\.\d+")


def final_number(text: str) -> float | None:
    """The last number in a text: `The answer is 1,234.50.` gives 1234.5. A hyphen between two digits (`3-4`) is no sign."""
    found = None
    for match in _NUMBER.finditer(text):
        digits = match.group().replace(",", "")
        joined = match.start() > 0 and text[match.start() - 1].isdigit()
        found = float(digits.lstrip("-") if joined else digits)
    return found


def correct(text: str, answer: str) -> bool:
    """Whether the final number of `text` equals that of `answer`."""
    said, expected = final_number(text), final_number(answer)
    return said is not None and expected is not None and abs(said - expected) < 1e-6


def wilson_interval(right: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's score interval of a share (95 % by default): honest also where all answers are right, or none."""
    share = right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count)) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def commonest(answers: Sequence[str]) -> str:
    """The answer that a guesser would always give."""
    return Counter(answers).most_common(1)[0][0]

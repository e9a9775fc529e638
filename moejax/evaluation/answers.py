"""The final number of an answer, and exact match."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence

# A comma belongs to a number only between groups of three digits: `3,4` are two numbers. A minus (hyphen or U+2212) is a sign unless
# it follows a letter or a digit: `10-4`, `COVID-19`. A point belongs to a number if a digit follows: `5.`, `...5`.
_NUMBER = re.compile(
    r"(?:(?<![^\W_])(?P<minus>[-\u2212])[$\u20ac\u00a3]?)?"
    r"(?P<digits>(?:\d{1,3}(?:,\d{3})+(?![\d])|\d+)(?:\.\d+)?|(?<![\d.])\.\d+)"
)


def final_number(text: str) -> float | None:
    """The last number in a text: `The answer is 1,234.50.` gives 1234.5.

    As in LLM-Adapters, nothing is worked out: a fraction's last number is its denominator, and a unit or a per cent sign is left out.
    """
    found = None
    for match in _NUMBER.finditer(text):
        found = _value(match)
    return found


def strict_number(text: str) -> float | None:
    """The number that follows the first `####`, as GSM8K's own solutions end; None without one."""
    found = re.search(rf"####\s*[$\u20ac\u00a3]?{_NUMBER.pattern}", text)
    return None if found is None else _value(found)


def _value(match: re.Match[str]) -> float:
    size = float(match["digits"].replace(",", ""))
    return -size if match["minus"] else size


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

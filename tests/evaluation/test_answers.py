"""The final number of an answer, exact match, and the guesser."""

import json

import pytest
from support import ROOT

from moejax.evaluation.answers import commonest, correct, final_number, wilson_interval


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("First 4 + 5 = 9. Then 9 - 2 = 7. The answer is 7.", 7),
        ("The answer is 1,234,567.", 1234567),
        ("It costs $1,234.50.", 1234.5),
        ("The answer is -12.", -12),
        ("5 - 8 = -3", -3),
        ("The rest is 10-4", 4),
        ("A share of .25", 0.25),
        ("12 apples, 13 pears", 13),
        ("the pair 3,4", 4),
        ("#### 72", 72),
        ("The answer is 007", 7),
        ("so 5.", 5),
        ("no number at all", None),
        ("", None),
    ],
)
def test_final_number(text, number):
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "answer", "right"),
    [
        ("The answer is 12.", "12", True),
        ("The answer is 12.0.", "12", True),
        ("The answer is 1,200.", "1200", True),
        ("The answer is 13.", "12", False),
        ("The answer is -12.", "12", False),
        ("12 was my guess, but the answer is 3.", "12", False),
        ("The answer is 123.", "12", False),
        ("I do not know.", "12", False),
        ("12", "no number", False),
    ],
)
def test_correct(text, answer, right):
    assert correct(text, answer) is right


def test_commonest_takes_the_earliest_of_equals():
    assert commonest(["3", "7", "7", "3", "7"]) == "7"
    assert commonest(["5", "2", "2", "5"]) == "5"


def test_the_guesser_is_weak_on_the_bundled_problems():
    """The answers are spread: always saying the commonest one earns next to nothing."""
    train, test = (json.loads((ROOT / "assets" / "problems" / f"{part}.json").read_text()) for part in ("train", "test"))
    guess = commonest([record["answer"] for record in train])
    right = sum(correct(guess, record["answer"]) for record in test)
    assert right == sum(record["answer"] == guess for record in test)
    assert 0 < right / len(test) < 0.05


def test_wilson_interval():
    """Against the closed form for no and all right, and the textbook's 10 of 20."""
    z2 = 1.96**2
    assert wilson_interval(400, 400) == pytest.approx((400 / (400 + z2), 1.0))
    assert wilson_interval(0, 400) == pytest.approx((0.0, z2 / (400 + z2)))
    assert wilson_interval(10, 20) == pytest.approx((0.2993, 0.7007), abs=1e-4)

"""The final number of an answer, exact match, and the guesser."""

import json

import pytest
from support import ROOT

from moejax.evaluation.answers import commonest, correct, final_number, strict_number, wilson_interval


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
        ("$1,234.50", 1234.5),
        ("They earn -$1,250.75 a day", -1250.75),
        ("a loss of $-8", -8),
        ("It grew by 50%", 50),
        ("that is 12.5 %", 12.5),
        ("1/2", 2),  # nothing is worked out: a fraction's last number is its denominator
        ("3 1/4 cups", 4),
        ("The answer is 3.", 3),
        ("-7", -7),
        ("The answer is \u22127.", -7),  # a typeset minus
        ("x=-7", -7),
        ("(-7)", -7),
        ("pages 3\u20137", 7),  # an en dash is no minus
        ("2024-11-25", 25),
        ("on 11/25/2024", 2024),
        ("at 10:30", 30),
        ("the 3rd", 3),
        ("COVID-19", 19),
        ("a 12-year-old", 12),
        ("version 1.2.3", 3),
        ("The answer is ...5", 5),
        ("I think 5...", 5),
        ("12,34", 34),  # no group of three
        ("1,2345", 2345),
        ("1,234,56", 56),
        ("one of 1,000,000, or 2,000", 2000),
        ("5 km/h or 3 m", 3),
        ("9 apples \u00d7 $2 = $18", 18),
        ("**42**", 42),
        ("\\boxed{42}", 42),
        ("42\n\n7", 7),
        ("4 2", 2),
        ("2e3", 3),
        ("x\u00b2 + y\u00b2", None),  # superscripts are no digits
        ("-", None),
        ("$.75", 0.75),
        ("\uff11\uff12", 12),  # full-width digits
        ("The answer is seventy-two.", None),
        ("-.5", -0.5),
        ("--5", -5),
        ("+5", 5),
        ("\u20ac3.00!", 3),
    ],
)
def test_final_number(text, number):
    """The rule: the last number in the text, however it stands there. A minus counts unless it follows a letter or a digit; a comma
    between groups of three; a point before a digit."""
    assert final_number(text) == number


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so 5 + 4 = 9\n#### 9", 9),
        ("#### 1,234", 1234),
        ("#### -3", -3),
        ("#### $12.50", 12.5),
        ("####7", 7),
        ("#### 7 #### 8", 7),  # the first, as GSM8K's own evaluation
        ("9", None),
        ("The answer is 9.", None),
        ("#### nine 9", None),
        ("### 9", None),
        ("", None),
    ],
)
def test_strict_number(text, number):
    assert strict_number(text) == number


def test_a_number_too_large_for_a_float_is_wrong_and_no_error():
    assert not correct("9" * 400, "9" * 400)


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
